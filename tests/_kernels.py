"""Inputs and comparisons of the kernel tests.

Where Triton interprets (conftest.py decides) the kernels run on the CPU, otherwise on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from dsv4fuse.kernels import _common as common
from hypothesis import settings
from torch import Tensor

DEVICE = "cpu" if common.INTERPRETED else "cuda"
GPU = DEVICE == "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
MARKS = [] if common.INTERPRETED else [pytest.mark.gpu]
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32}
TOKENS = [1, 3, 127, 129] + ([1500] if GPU else [])


def huge(test):
    """A test that takes tens of gigabytes of a GPU, by one process at a time."""
    return pytest.mark.xdist_group("gigabytes")(pytest.mark.gpu(test))


def drawn(examples: int) -> settings:
    """So many examples, for an interpreted kernel takes long; on a GPU with HYPOTHESIS_PROFILE=long
    as many as that profile has (``--hypothesis-show-statistics`` counts them)."""
    long = GPU and os.environ.get("HYPOTHESIS_PROFILE") == "long"
    return settings() if long else settings(max_examples=examples)


def rand(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def tables(batch: int, length: int, rope: int, kind: str = "fp32") -> tuple[Tensor, Tensor]:
    """cos and sin ``[batch, length, rope/2]`` in the strides and dtypes that models produce."""
    angle = torch.randn(batch, length, rope // 2, device=DEVICE) * 3
    if kind == "complex":
        real = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
        assert real.stride(-2) == 2
        return real[..., 0], real[..., 1]
    if kind == "expanded":
        angle = angle[:1].expand(batch, -1, -1)
        return angle[:1].cos().expand(angle.shape), angle[:1].sin().expand(angle.shape)
    dtype = {"fp32": FP32, "bf16": BF16}[kind]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(SIGNED[x.element_size()])


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Distance in representable values; two NaNs are equal, +0 and -0 are one apart."""
    assert a.dtype == b.dtype and a.shape == b.shape
    lowest = torch.iinfo(SIGNED[a.element_size()]).min
    ordered = [torch.where(x < 0, lowest - x.long() - 1, x.long()) for x in (bits(a), bits(b))]
    both = a.float().isnan() & b.float().isnan()
    return torch.where(both, 0, (ordered[0] - ordered[1]).abs())


def same(a: Tensor, b: Tensor) -> None:
    """Equal bytes (NaN equals NaN), dtype, shape and strides."""
    assert a.stride() == b.stride(), (a.stride(), b.stride())
    wrong = (ulps(a, b) != 0).sum().item()
    assert wrong == 0, f"{wrong} of {a.numel()} differ"


def close(a: Tensor, b: Tensor, *, worst: int, fraction: float) -> None:
    assert a.stride() == b.stride(), (a.stride(), b.stride())
    off = ulps(a, b)
    if off.numel() == 0:
        return
    assert off.max().item() <= worst, f"{off.max().item()} ulp apart"
    share = (off != 0).double().mean().item()
    assert share <= fraction, f"{share:.2e} of the values differ"


def summed(a: Tensor, b: Tensor, group: int = 1) -> None:
    """Equal but for a sum of squares in another order: in fp32 4 eps (up to 3.2 were seen), else
    1 eps in 1 % of the values, relative to the length of each ``group`` of lanes."""
    assert a.dtype == b.dtype and a.stride() == b.stride(), (a.stride(), b.stride())
    wide, eps = a.dtype == FP32, torch.finfo(a.dtype).eps
    x, y = (t.double().unflatten(-1, (-1, group)) for t in (a, b))
    off = (x - y).abs() / y.norm(dim=-1, keepdim=True).clamp_min(1e-30) / eps
    assert not (off > (4 if wide else 1)).any(), f"{off.max().item()} eps"
    assert wide or (off > 0).sum() <= 0.01 * off.numel()


def poisoned(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.full(shape, 777.0, dtype=dtype, device=DEVICE)


def all_equal(a: list[Tensor], b: list[Tensor]) -> None:
    """Equal bytes (NaN equals NaN), dtypes and shapes, in whatever memory order."""
    for x, y in zip(a, b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        same = bits(x) == bits(y) if x.element_size() <= 4 else x == y
        nan = x.float().isnan() & y.float().isnan() if x.dtype.is_floating_point else same
        assert (same | nan).all()


def all_near(
    found: list[Tensor], wanted: list[Tensor], slack: float = 0.0, of: object = None
) -> None:
    """NaN and infinities in their places; else within rounding steps at a row's largest value, or
    some numbers below the least normal, of which some units make zeros and others do not."""
    for x, y in zip(found, wanted, strict=True):
        if not x.dtype.is_floating_point:
            assert torch.equal(x, y), of
            continue
        x, y = x.double(), y.double()
        assert torch.equal(x.isnan(), y.isnan()), of
        assert torch.equal(x.where(x.isinf(), 0), y.where(y.isinf(), 0)), of
        finite = x.isfinite()
        x, y = x.where(finite, 0), y.where(finite, 0)
        if x.numel():
            step = 2 * torch.finfo(wanted[0].dtype).eps + slack
            off, largest = (x - y).abs(), y.abs().amax(-1, keepdim=True)
            bound = step * largest + 128 * torch.finfo(torch.float32).tiny
            assert (off <= bound).all(), (of, (off / largest).nan_to_num().max().item())
