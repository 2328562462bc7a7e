"""clamp_swiglu and clamp_swiglu_quant: values, scale layouts, padding."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import clamp_swiglu_quant as swiglu
from torch import Tensor

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, FP16, FP32, GPU, MARKS, close, rand, same, ulps

pytestmark = MARKS


def packed(tokens: int, columns: int, layout: str, dtype: torch.dtype = BF16):
    if layout == "two":
        return rand(tokens, columns, dtype=dtype, scale=6), rand(tokens, columns, dtype=dtype,
                                                                 scale=6)  # fmt: skip
    both = rand(tokens, 2 * columns, dtype=dtype, scale=6)
    return both.chunk(2, -1) if layout == "chunk" else (both[:, 0::2], both[:, 1::2])


def swiglu_agrees(got: Tensor, want: Tensor) -> None:
    """Bit-exact on a GPU; the interpreter's exp is NumPy's, at most an ulp from PyTorch's."""
    if GPU:
        same(got, want)
    else:
        close(got, want, worst=4 if got.dtype == FP32 else 1,
              fraction=1.0 if got.dtype == FP32 else 2e-3)  # fmt: skip


SWIGLU = [
    # T, I, layout, weight, limit, rounding, dtype
    (1, 3072, "chunk", None, 10.0, "silu", BF16),
    (3, 1536, "interleaved", (FP32, 2), 10.0, "once", BF16),
    (129, 96, "two", (FP32, 1), 7.3, "silu", BF16),
    (127, 96, "chunk", (BF16, 1), None, "silu", BF16),
    (3, 100, "two", None, 7.3, "once", FP16),
    (3, 33, "interleaved", (BF16, 1), 5.0, "silu", FP16),
    (5, 256, "two", None, 10.0, "once", FP32),
] + ([(1500, 2048, "chunk", None, 10.0, r, BF16) for r in ("once", "silu")] if GPU else [])


def swiglu_inputs(tokens, columns, layout, weight, dtype):
    gate, up = packed(tokens, columns, layout, dtype)
    if weight is not None:
        shape = (tokens,) if weight[1] == 1 else (tokens, 1)
        weight = rand(*shape, dtype=weight[0])
    return gate, up, weight


@pytest.mark.parametrize("tokens, columns, layout, weight, limit, rounding, dtype", SWIGLU)
def test_clamp_swiglu(tokens, columns, layout, weight, limit, rounding, dtype):
    args = swiglu_inputs(tokens, columns, layout, weight, dtype)
    kw = dict(limit=limit, rounding=rounding)
    swiglu_agrees(swiglu.clamp_swiglu(*args, **kw), swiglu.reference(*args, **kw))


@pytest.mark.parametrize("scale", ["fp32", "pow2", "e8m0"])
@pytest.mark.parametrize("col_major", [False, True])
@pytest.mark.parametrize("tokens, columns, group", [(1, 3072, 128), (3, 1536, 64), (9, 96, 32)])
def test_clamp_swiglu_quant(tokens, columns, group, scale, col_major):
    """Equal to quantising what clamp_swiglu returns, bytes and scales and strides and padding."""
    gate, up = packed(tokens, columns, "chunk")
    gate[0, 3], up[-1, 40], gate[0, 50] = float("nan"), float("inf"), -200.0
    up[0, 64:96] = 0.0
    up[0, 64:96:2] = -0.0
    w = rand(tokens, dtype=FP32)
    kw = dict(limit=10.0, rounding="silu")
    quant = dict(group=group, floor=1e-10, scale=scale, via="mul" if columns == 96 else "div")
    codes, scales = swiglu.clamp_swiglu_quant(gate, up, w, col_major=col_major, **kw, **quant)
    y = swiglu.clamp_swiglu(gate, up, w, **kw)
    quant["scale"] = "fp32" if scale == "fp32" else "pow2"
    want, s = atoms.group_quant(y, **quant)
    same(codes, want)
    if scale == "e8m0":
        s = s.to(torch.float8_e8m0fnu)
        assert torch.equal(scales.view(torch.uint8), s.view(torch.uint8))
    else:
        assert torch.equal(scales.nan_to_num(-1.0), s.nan_to_num(-1.0))
    assert scales.dtype == s.dtype and scales.shape == s.shape
    aligned = (tokens + 3) // 4 * 4
    assert scales.stride() == ((1, aligned) if col_major else (columns // group, 1))
    if col_major:
        check_padding(scales, aligned, columns // group)


def test_codes_by_the_reciprocal():
    """Enough values that some of them round the other way than a quotient's."""
    gate, up = packed(64, 1024, "chunk")
    kw, quant = dict(limit=10.0, rounding="silu"), dict(group=128, floor=1e-10, scale="fp32")
    codes, scales = swiglu.clamp_swiglu_quant(gate, up, None, by="mul", **kw, **quant)
    y = swiglu.clamp_swiglu(gate, up, None, **kw)
    want, s = atoms.group_quant(y, by="mul", **quant)
    same(codes, want)
    assert torch.equal(scales, s)
    assert not torch.equal(codes.float(), atoms.group_quant(y, **quant)[0].float())


def check_padding(scales: Tensor, aligned: int, groups: int) -> None:
    """The rows behind the view exist and are zero."""
    raw = scales.view(torch.uint8) if scales.element_size() == 1 else scales
    physical = raw.as_strided((groups, aligned), (aligned, 1))
    assert (physical[:, scales.shape[0] :] == 0).all()
    assert raw.untyped_storage().nbytes() == groups * aligned * raw.element_size()


@pytest.mark.parametrize("col_major", [False, True])
def test_clamp_swiglu_quant_1500(col_major):
    """M = 1500: padding to a program's rows instead of 4 would show here."""
    gate, up = packed(1500, 32, "interleaved")
    kw = dict(limit=10.0, rounding="once", group=32, scale="fp32", col_major=col_major)
    saved = swiglu.CONFIGS
    try:
        swiglu.CONFIGS = ((None, common.Config(rows=64, warps=4, columns=32)),)
        codes, scales = swiglu.clamp_swiglu_quant(gate, up, None, **kw)
    finally:
        swiglu.CONFIGS = saved
    y = swiglu.clamp_swiglu(gate[:40], up[:40], None, limit=10.0, rounding="once")
    want, s = atoms.group_quant(y, group=32, floor=1e-10, scale="fp32")
    same(codes[:40], want)
    assert torch.equal(scales[:40], s)
    if col_major:
        check_padding(scales, 1500, 1)


@pytest.mark.parametrize("weight", [None, FP32])
def test_clamp_swiglu_precise(weight):
    gate, up = packed(9, 256, "two")
    w = None if weight is None else rand(9, dtype=weight)
    kw = dict(limit=10.0, rounding="silu")
    got = swiglu.clamp_swiglu(gate, up, w, precise=True, **kw)
    eager = swiglu.reference(gate, up, w, **kw)
    exact = gate.double().clamp(max=10.0)
    exact = exact * exact.sigmoid() * up.double().clamp(-10.0, 10.0)
    exact = exact if w is None else exact * w.double().unsqueeze(-1)
    error, eager_error = (got.double() - exact).abs(), (eager.double() - exact).abs()
    half = 0.5 * torch.finfo(got.dtype).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
    assert (error <= half + 2e-6 * exact.abs()).all()
    assert error.mean() <= eager_error.mean()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_silu_of_every_16_bit_value(dtype):
    """All 2^16 gates, infinities and NaN included, with up = 1; bit-exact on a GPU."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).to(DEVICE).view(256, 256)
    for limit in (None, 10.0):
        kw = dict(limit=limit, rounding="silu")
        got = swiglu.clamp_swiglu(gate, torch.ones_like(gate), None, **kw)
        want = swiglu.reference(gate, torch.ones_like(gate), None, **kw)
        if GPU:
            same(got, want)
        assert torch.equal(got.isnan(), want.isnan())
        near = ulps(got, want)[want.float().abs() > 1e-30]
        assert near.max() <= 1


def calls(small):
    gate, up = small(small.length, 128), small(small.length, 128)
    how = dict(limit=10.0, rounding="silu")
    return {
        "clamp_swiglu": ((gate, up, small.fp32(small.length, 1)), how),
        "clamp_swiglu_quant": ((gate, up, None), dict(how, group=64, col_major=True)),
    }
