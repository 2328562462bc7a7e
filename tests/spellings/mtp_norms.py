"""The input norms of a multi-token-prediction layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from examples.deepseek_v4.common import RMSNorm

from ._case import BF16, EPS, FP16, FP32, Case, Draw, plain

NAME = "mtp_norms"
BATCH, SEQ, STREAMS, DIM, OUT = 2, 5, 4, 64, 48
Fn = Callable[..., Any]


def inputs(
    *lead: int, dtype: torch.dtype = BF16, weight: torch.dtype = FP32,
    streams: int | None = STREAMS, index: torch.dtype = torch.int64,
) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
    """e ``[.., D]``, h ``[.., n, D]``, positions ``[..]`` with zeros, two weights, two factors."""
    lead = lead or (BATCH, SEQ)

    def make() -> tuple[Tensor, ...]:
        draw = Draw()
        middle = () if streams is None else (streams,)
        e, h = draw(*lead, DIM, dtype=dtype), draw(*lead, *middle, DIM, dtype=dtype)
        at = torch.arange(e[..., 0].numel()).view(lead) % 3
        weights = draw(2, DIM, dtype=weight)
        return e, h, at.to(index), *weights, *draw(2, DIM, OUT, dtype=dtype, scale=0.2)

    return make


def norm(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    return (weight * y).to(x.dtype)


def hf(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * y.to(x.dtype)


def summed(zeroed: Fn, e_norm: Fn = norm, h_norm: Fn = norm) -> Fn:
    """DeepSeek-V4's: a projection of each, summed."""

    def fn(e: Tensor, h: Tensor, at: Tensor, w: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return (e_norm(zeroed(e, at), w) @ p).unsqueeze(-2) + h_norm(h, v) @ q

    return fn


def joined(zeroed: Fn) -> Fn:
    """DeepSeek-V3's: both side by side in front of one projection; no streams."""

    def fn(e: Tensor, h: Tensor, at: Tensor, w: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return torch.cat((norm(zeroed(e, at), w), norm(h, v)), dim=-1) @ torch.cat((p, q))

    return fn


def as_it_is(e: Tensor, at: Tensor) -> Tensor:
    return e


def by_where(e: Tensor, at: Tensor) -> Tensor:
    return torch.where(at.unsqueeze(-1) == 0, torch.zeros_like(e), e)


def by_fill(e: Tensor, at: Tensor) -> Tensor:
    return e.masked_fill((at == 0).unsqueeze(-1), 0.0)


def by_the_others(e: Tensor, at: Tensor) -> Tensor:
    return torch.where((at != 0)[..., None], e, 0.0)


def by_positive(e: Tensor, at: Tensor) -> Tensor:
    return torch.where(at[..., None] > 0, e, 0.0)


def by_below_one(e: Tensor, at: Tensor) -> Tensor:
    return e.masked_fill((at < 1).unsqueeze(-1), 0.0)


def by_assignment(e: Tensor, at: Tensor) -> Tensor:
    """vLLM's."""
    e = e.clone()
    e[at == 0] = 0
    return e


class Modules(nn.Module):
    """Ours: RMSNorm modules and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enorm, self.hnorm = RMSNorm(DIM, EPS), RMSNorm(DIM, EPS)
        self.e_proj, self.h_proj = (nn.Linear(DIM, OUT, bias=False) for _ in range(2))
        draw = Draw(1)
        for p in self.parameters():
            p.data = draw(*p.shape, dtype=FP32, scale=0.2)
        self.requires_grad_(False)

    def forward(self, e: Tensor, h: Tensor, *_: Tensor) -> Tensor:
        return self.e_proj(self.enorm(e)).unsqueeze(2) + self.h_proj(self.hnorm(h))


def _case(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    return Case(plain(fn), make or inputs(), {NAME: 1}, parts or ("zeroed at position 0",), **more)


USUAL = _case(summed(by_where))
SPELLINGS: dict[str, Case] = {
    "where": USUAL,
    "masked_fill": _case(summed(by_fill)),
    "what is not 0": _case(summed(by_the_others)),
    "positive": _case(summed(by_positive)),
    "below 1": _case(summed(by_below_one)),
    "an assignment": _case(summed(by_assignment)),
    "an assignment, one row of tokens": _case(summed(by_assignment), inputs(7)),
    "joined": _case(joined(by_where), inputs(streams=None)),
    "joined, one row of tokens": _case(joined(by_fill), inputs(7, streams=None)),
    "modules, nothing zeroed": Case(
        Modules, inputs(dtype=FP32), {NAME: 1}, ("streams: norm",), ("zeroed",)
    ),
    "transformers' norm": _case(summed(by_where, hf, hf), inputs(weight=BF16)),
    "two kinds of norm": _case(summed(by_fill, hf, norm), inputs(weight=BF16)),
    "fp16, int32 positions": _case(summed(by_fill), inputs(dtype=FP16, index=torch.int32)),
    "fp32": _case(summed(by_fill), inputs(dtype=FP32)),
    "one token": _case(summed(by_where), inputs(1, 1)),
    "dynamic": _case(
        summed(by_where), inputs(3, 5), dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1)}
    ),
}  # fmt: skip


def _edited(fn: Fn, make: Fn | None = None, counts: dict[str, int] | None = None) -> Case:
    return Case(plain(fn), make or inputs(), counts or {}, like=USUAL)


def _mean_first(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float() - x.float().mean(-1, keepdim=True)
    return (weight * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _over_all_streams(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean((-2, -1), keepdim=True) + EPS)
    return (weight * y).to(x.dtype)


def _eps_outside(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    y = y / (y.square().mean(-1, keepdim=True).sqrt() + EPS)
    return (weight * y).to(x.dtype)


def _after_the_norm(e: Tensor, h: Tensor, at: Tensor, w: Tensor, v: Tensor, p: Tensor, q: Tensor):
    """No mask, but a read of the norm in between: two readers, one launch all the same."""
    y = norm(e, w)
    return (y @ p).unsqueeze(-2) + norm(h * y.unsqueeze(-2), v) @ q


def _product(e: Tensor, h: Tensor, at: Tensor, w: Tensor, v: Tensor, p: Tensor, q: Tensor):
    return (norm(by_where(e, at), w) @ p).unsqueeze(-2) * (norm(h, v) @ q)


MUTANTS: dict[str, Case] = {
    "the mean taken off": _edited(summed(by_where, h_norm=_mean_first)),
    "over all streams": _edited(summed(by_where, h_norm=_over_all_streams)),
    "eps outside of the root": _edited(summed(by_where, e_norm=_eps_outside)),
    "one norm on the other": _edited(_after_the_norm),
    "a product of projections": _edited(_product),
    "no norm of the streams": _edited(summed(by_where, h_norm=lambda x, w: x * w.to(x.dtype))),
}  # fmt: skip
# Taken, but with the zeroing left in front: it is another one than the kernel's.
for _name, _zeroed in {
    "zeroed at position 1": lambda e, at: e.masked_fill((at == 1).unsqueeze(-1), 0.0),
    "filled with 1": lambda e, at: e.masked_fill((at == 0).unsqueeze(-1), 1.0),
    "all but position 0 zeroed": lambda e, at: e.masked_fill((at != 0).unsqueeze(-1), 0.0),
    "the first and what lies behind": lambda e, at: e.masked_fill((at >= 0).unsqueeze(-1), 0.0),
    "by column": lambda e, at: e.masked_fill(torch.arange(DIM) == 0, 0.0),
}.items():
    MUTANTS[_name] = Case(
        plain(summed(_zeroed)), inputs(), {NAME: 1}, absent=("zeroed",), like=USUAL
    )
