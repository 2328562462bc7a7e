"""Hyper-connections as people write them, in pieces that spellings and mutants exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import BF16, FP32, Draw

STREAMS, DIM, BATCH, SEQ = 4, 64, 2, 3
NORM_EPS, EPS = 0.0123, 0.0321
SIZES = [STREAMS, STREAMS, STREAMS * STREAMS]
Fn = Callable[..., Any]


# ---- streams to mixes ----------------------------------------------------------------------------


def rms(flat: Tensor) -> Tensor:
    return torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + NORM_EPS)


def mixes_of_normed(x: Tensor, fn: Tensor) -> Tensor:
    """As transformers: normalised, then multiplied."""
    flat = x.flatten(2).float()
    return F.linear(flat * rms(flat), fn.float())


def mixes_scaled(x: Tensor, fn: Tensor) -> Tensor:
    """As the reference: multiplied, then scaled."""
    flat = x.flatten(2).float()
    return F.linear(flat, fn) * rms(flat)


def mixes_of_rows(x: Tensor, fn: Tensor) -> Tensor:
    """Tokens in one axis, a plain matrix product."""
    flat = x.reshape(-1, fn.shape[1]).float()
    return (flat * rms(flat) @ fn.t()).view(*x.shape[:2], -1)


def mixes_by_mean_of_streams(x: Tensor, fn: Tensor) -> Tensor:
    """The mean over both axes of the streams, in front of the flattening."""
    wide = x.float()
    rstd = torch.rsqrt((wide * wide).mean(dim=(-2, -1), keepdim=True) + NORM_EPS)
    return torch.matmul((wide * rstd).flatten(2), fn.mT)


def mixes_over_root(x: Tensor, fn: Tensor) -> Tensor:
    flat = x.flatten(2).float()
    root = torch.sqrt(flat.square().mean(-1, keepdim=True) + NORM_EPS)
    return F.linear(flat / root, fn)


def mixes_of_each_stream(x: Tensor, fn: Tensor) -> Tensor:
    """Not the same: each stream over its own RMS."""
    wide = x.float()
    return F.linear((wide * rms(wide)).flatten(2), fn)


def mixes_in_bf16(x: Tensor, fn: Tensor) -> Tensor:
    """Not the same: the product in the streams' dtype."""
    flat = x.flatten(2).float()
    return F.linear((flat * rms(flat)).to(x.dtype), fn.to(x.dtype)).float()


# ---- logits to comb ------------------------------------------------------------------------------


def sinkhorn(comb: Tensor, iters: int = 3, **edit: Any) -> Tensor:
    """Rows by a softmax, then columns and rows in turn; ``edit`` names what a mutant changes."""
    eps = edit.get("eps", EPS)
    comb = comb.softmax(edit.get("soft", -1)) + eps
    first, second = edit.get("axes", (-2, -1))
    comb = comb / (comb.sum(first, keepdim=True) + edit.get("first", eps))
    for _ in range(iters - 1):
        comb = comb / (comb.sum(second, keepdim=True) + eps)
        comb = comb / (comb.sum(first, keepdim=True) + eps)
    return comb / (comb.sum(second, keepdim=True) + eps) if edit.get("row") else comb


def sinkhorn_in_place(comb: Tensor) -> Tensor:
    comb = torch.softmax(comb, dim=3)
    comb += EPS
    comb /= comb.sum(dim=2, keepdim=True) + EPS
    for _ in range(2):
        for axis in (3, 2):
            comb.div_(comb.sum(dim=axis).unsqueeze(axis).add(EPS))
    return comb


# ---- all of it -----------------------------------------------------------------------------------


def collapse(pre: Tensor, x: Tensor) -> Tensor:
    return (pre.unsqueeze(-1) * x).sum(dim=2).to(x.dtype)


def collapse_by_einsum(pre: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("bsh,bshd->bsd", pre, x.float()).to(x.dtype)


def collapse_by_matmul(pre: Tensor, x: Tensor) -> Tensor:
    return torch.matmul(pre[:, :, None], x.float()).squeeze(-2).type_as(x)


def collapse_rounded(pre: Tensor, x: Tensor) -> Tensor:
    """Not the same: pre rounded first."""
    return (pre.to(x.dtype).unsqueeze(-1) * x).sum(dim=2)


def split(mixes: Tensor, scale: Tensor, base: Tensor, comb: Fn = sinkhorn, **edit: Any) -> Any:
    """(pre, post, comb) in transformers' words."""
    (pre, post, logits), parts = mixes.split(SIZES, dim=-1), base.split(SIZES)
    scales = edit.get("scales", scale.unbind(0))
    pre = torch.sigmoid(pre * scales[0] + parts[0]) + edit.get("eps", EPS)
    post = edit.get("twice", 2) * torch.sigmoid(post * scales[1] + parts[1])
    shift = parts[2].view(STREAMS, STREAMS)
    logits = logits.view(*logits.shape[:-1], STREAMS, STREAMS)
    logits = logits * scales[2] + (shift.t() if edit.get("shift") else shift)
    return pre, post, comb(logits)


def split_by_slices(mixes: Tensor, scale: Tensor, base: Tensor) -> Any:
    """(pre, post, comb) in the reference's words: one function, indices counted by hand."""
    n = STREAMS
    pre = (base[:n] + scale[0] * mixes[..., :n]).sigmoid() + EPS
    post = torch.sigmoid(mixes[..., n : 2 * n] * scale[1] + base[n : 2 * n]) * 2.0
    logits = mixes[..., 2 * n :].unflatten(-1, (n, n)) * scale[2]
    return pre, post, sinkhorn(logits + base[2 * n :].unflatten(0, (n, n)))


def connection(mixes: Fn = mixes_of_normed, parts: Fn = split, y: Fn = collapse) -> Fn:
    def fn(x: Tensor, w: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        pre, post, comb = parts(mixes(x, w), scale, base)
        return y(pre, x), post, comb

    return fn


def inputs(
    *lead: int, dtype: torch.dtype = BF16, small: torch.dtype = FP32, outputs: int = 24,
    width: int = DIM,
) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
    """x, fn, scale, base: mixes of about one."""

    def make() -> tuple[Tensor, ...]:
        draw, scales = Draw(), 1 if outputs == STREAMS else 3
        x = draw(*(lead or (BATCH, SEQ)), STREAMS, width, dtype=dtype)
        w = draw(outputs, STREAMS * width, dtype=FP32, scale=(STREAMS * width) ** -0.5)
        return x, w.to(small), *(draw(k, dtype=small, scale=1.0) for k in (scales, outputs))

    return make
