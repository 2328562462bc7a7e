"""Inputs and fp64 results of the hyper-connection kernels' tests."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, FP32

NORM_EPS, EPS = 1e-6, 1e-6


def mixing(
    tokens: int, width: int, outputs: int = 24, dtype: torch.dtype = BF16,
    small: torch.dtype = FP32,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x, fn, scale, base: mixes of about one, so that no gate saturates."""
    x = torch.randn(tokens, 4, width).to(dtype)
    fn = torch.randn(outputs, 4 * width) / (4 * width) ** 0.5
    scale, base = torch.rand(1 if outputs == 4 else 3) + 0.5, torch.randn(outputs)
    return (x.to(DEVICE), *(t.to(small).to(DEVICE) for t in (fn, scale, base)))


def exact(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iters: int) -> tuple[Tensor, ...]:
    """y, post, comb in fp64 from the same inputs."""
    x, fn, scale, base = (t.double() for t in (x, fn, scale, base))
    flat = x.flatten(-2)
    mixes = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + NORM_EPS) @ fn.T
    pre, post, comb = atoms.hyper_weights(mixes, scale, base, eps=EPS, iters=iters)
    return (pre.unsqueeze(-1) * x).sum(-2), post, comb


def near(found: Tensor, wanted: Tensor, error: float) -> None:
    """Within ``error`` of each row's largest value."""
    assert found.shape == wanted.shape
    off = (found.double() - wanted).abs()
    assert (off <= error * wanted.abs().amax(-1, keepdim=True)).all(), off.max().item()
