"""Sums over the partial results of a split product, in front of a norm, and edits of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _norms, _ropes
from ._case import BF16, FP32, Draw
from ._layouts import BATCH, DIM, HEADS, NORM, SEQ
from ._steps import tables

S = 3  # parts
ROWS = (S, BATCH, SEQ, HEADS, DIM)
FLAT = (S, BATCH * SEQ, HEADS * DIM)
Sum = Callable[[Tensor], Tensor]  # parts to [B, S, H, D]

SUMS: dict[str, tuple[Sum, tuple[int, ...], torch.dtype]] = {
    "rows": (lambda p: p.sum(0), ROWS, BF16),
    "rows and merged heads": (
        lambda p: p.sum(dim=0).unflatten(-1, (HEADS, DIM)), (S, BATCH, SEQ, HEADS * DIM), BF16
    ),
    "flat": (lambda p: p.sum(0).view(BATCH, SEQ, HEADS, DIM), FLAT, BF16),
    "fp32": (lambda p: p.sum(0), ROWS, FP32),
    "fp32, rounded": (lambda p: p.sum(0).bfloat16(), ROWS, FP32),
    "fp32, rounded and shaped": (
        lambda p: p.sum(0).view(BATCH, SEQ, HEADS, DIM).to(BF16), FLAT, FP32
    ),
    "widened first": (lambda p: p.float().sum(0).to(p.dtype), ROWS, BF16),
    "summed in fp32": (lambda p: p.sum(0, dtype=FP32).to(p.dtype), ROWS, BF16),
    "from the end": (lambda p: p.sum(-5), ROWS, BF16),
    "one part": (lambda p: p.sum(0), (1, *ROWS[1:]), BF16),
    "heads first": (
        lambda p: p.sum(0).transpose(1, 2), (S, BATCH, HEADS, SEQ, DIM), BF16
    ),
    "a slice of it": (lambda p: p.sum(0)[..., 16 : 16 + DIM], (*ROWS[:-1], DIM + 32), BF16),
}  # fmt: skip

# Of "rows". Each is a norm of something else than the sum over the first axis.
MUTANTS: dict[str, Sum] = {
    "mean": lambda p: p.mean(0),
    "maximum": lambda p: p.amax(0),
    "one left out": lambda p: p[1:].sum(0) + p[0].abs(),
    "scaled": lambda p: p.sum(0) * 0.5,
    "rounded twice": lambda p: (p.float().sum(0) * 1.1).half().bfloat16(),
    "product": lambda p: p.prod(0),
}


def parts_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = BF16
) -> Callable[[], tuple[Tensor, ...]]:
    """The parts, a weight, tables ``[B,S,1,R/2]``."""

    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        w = draw(DIM, dtype=BF16)
        return (draw(*shape, dtype=dtype), w, *tables(draw, BATCH, SEQ, 1))

    return inputs


def both_of_parts(
    parts: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: Tensor
) -> Tensor:
    """One split product of which q and kv are columns."""
    q, kv = parts.sum(0).split([HEADS * DIM, DIM], dim=-1)
    q = _norms.PLAIN["hf_unweighted"](q.unflatten(-1, (HEADS, DIM)), w)
    q = _ropes.REAL["hf"](q, cos.unsqueeze(2), sin.unsqueeze(2))
    kv = _ropes.REAL["hf"](NORM(kv, w), cos, sin)
    cache[torch.arange(BATCH)[:, None], at % cache.shape[1]] = kv
    return q


def both_of_parts_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    parts, w = draw(S, BATCH, SEQ, (HEADS + 1) * DIM), draw(DIM)
    at = torch.arange(SEQ) + torch.tensor([[3], [9]])
    return parts, w, *tables(draw, BATCH, SEQ), draw(BATCH, 8, DIM), at
