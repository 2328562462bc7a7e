"""Attention with a sink over keys that an index chooses for each query."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.deepseek_v4.attention import sink_attention as ours

from . import _attentions
from ._attentions import SCALE
from ._case import FP32, Case, Draw, plain

NAME = "sparse_sink_attention"
BATCH, SEQ, HEADS, ROWS, CHOSEN, NEAR, DIM = 2, 5, 4, 13, 7, 6, 32
Fn = Callable[..., Any]


def inputs(
    sizes: tuple[int, int] = (BATCH, SEQ), index: torch.dtype = torch.int64, none: bool = True
) -> Callable[[], tuple[Tensor, ...]]:
    """q ``[B,S,H,D]``, kv ``[B,N,D]``, index ``[B,S,K]`` (negative: none), sinks ``[H]``."""

    def make(draw: Draw | None = None) -> tuple[Tensor, ...]:
        draw, (b, s) = draw or Draw(), sizes
        q, kv = draw(b, s, HEADS, DIM), draw(b, ROWS, DIM)
        at = torch.rand(b, s, ROWS, generator=draw.generator).topk(CHOSEN, -1).indices
        if none:
            at[..., ::3] = -1
            at[:, 0] = -1  # a query without keys
        return q, kv, at.to(index), draw(HEADS, dtype=FP32)

    return make


def _attend(
    q: Tensor, keys: Tensor, hidden: Tensor, sinks: Tensor, weigh: Fn, fill: float = -math.inf
) -> Tensor:  # fmt: skip
    """keys ``[B,S,K,D]``, hidden ``[B,S,K]``."""
    s = torch.einsum("bshd,bskd->bshk", q, keys).float() * SCALE
    s = s.masked_fill(hidden.unsqueeze(2), fill)
    w = weigh(s, sinks.view(1, 1, -1, 1)).to(keys.dtype)
    return torch.einsum("bshk,bskd->bshd", w, keys)


def by_gather(
    weigh: Fn = _attentions.cat_softmax, values: Fn = lambda k: k,
    held: Fn = lambda i: i.clamp(min=0), hidden: Fn = lambda i: i < 0, fill: float = -math.inf,
) -> Fn:  # fmt: skip
    """DeepSeek's reference: rows gathered where the index is one, hidden where it is negative."""

    def fn(q: Tensor, kv: Tensor, index: Tensor, sinks: Tensor) -> Tensor:
        b, s, k = index.shape
        at = held(index).unsqueeze(-1).expand(b, s, k, kv.shape[-1])
        keys = torch.gather(kv.unsqueeze(1).expand(-1, s, -1, -1), 2, at)
        return _attend(q, values(keys), hidden(index), sinks, weigh, fill)

    return fn


def by_index(q: Tensor, kv: Tensor, index: Tensor, sinks: Tensor) -> Tensor:
    rows = torch.arange(kv.shape[0])[:, None, None]
    return _attend(q, kv[rows, index], index < 0, sinks, _attentions.cat_softmax)


def from_pool(q: Tensor, kv: Tensor, index: Tensor, sinks: Tensor) -> Tensor:
    """One pool of rows for all requests."""
    return _attend(q, kv.flatten(0, 1)[index], index < 0, sinks, _attentions.cat_softmax)


def behind_window(order: Fn = lambda near, far: (near, far), own: bool = False) -> Fn:
    """This project's decode step: the window's keys, then the chosen entries."""

    def fn(q: Tensor, kv: Tensor, index: Tensor, sinks: Tensor) -> Tensor:
        near, entries = kv[:, None, :NEAR], kv[:, NEAR:]
        rows = torch.arange(kv.shape[0]).unsqueeze(-1)
        count = entries.shape[1]
        at = torch.where(index < count, index, 0)
        far = entries[rows.unsqueeze(-1), at]
        beside = near.expand(-1, q.shape[1], -1, -1)
        beside = beside + torch.arange(q.shape[1])[:, None, None] if own else beside
        keys = torch.cat(order(beside, far), dim=2)
        seen = torch.cat((torch.ones(*index.shape[:2], NEAR, dtype=torch.bool), index >= 0), -1)
        return ours(q, keys.to(q.dtype), seen, sinks)

    return fn


def masked_by_value(q: Tensor, kv: Tensor, index: Tensor, sinks: Tensor) -> Tensor:
    """An additive mask, and scores by matmul."""
    b, s, k = index.shape
    at = index.clamp_min(0).reshape(b, -1, 1).expand(-1, -1, kv.shape[-1])
    keys = kv.gather(1, at).view(b, s, k, -1)
    scores = torch.matmul(q, keys.transpose(-1, -2)).float() * SCALE
    scores = scores + torch.where(index < 0, float("-inf"), 0.0).unsqueeze(2)
    w = _attentions.cat_softmax(scores, sinks[:, None])
    return torch.matmul(w.to(keys.dtype), keys)


def by_value(bias: Fn) -> Fn:
    """An additive mask made of the indices."""

    def fn(q: Tensor, kv: Tensor, index: Tensor, sinks: Tensor) -> Tensor:
        keys = kv[torch.arange(kv.shape[0])[:, None, None], index]
        s = torch.einsum("bshd,bskd->bshk", q, keys).float() * SCALE + bias(index).unsqueeze(2)
        w = _attentions.cat_softmax(s, sinks.view(1, 1, -1, 1)).to(keys.dtype)
        return torch.einsum("bshk,bskd->bshd", w, keys)

    return fn


def wide(q: Tensor, kv: Tensor, index: Tensor, sinks: Tensor) -> Tensor:
    """fp32 from the products on."""
    rows = torch.arange(kv.shape[0])[:, None, None]
    keys = kv[rows, index].float()
    return _attend(q.float(), keys, index < 0, sinks, _attentions.cat_softmax).to(q.dtype)


def _case(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    return Case(
        plain(fn), make or inputs(), **{
            "counts": {NAME: 1}, "parts": parts or ("softmax with a sink",), "exact": False, **more
        },
    )  # fmt: skip


SIGNED = "softmax with a sink", "negative indices hidden"
SPELLINGS: dict[str, Case] = {
    "by gather": _case(by_gather(), None, *SIGNED),
    "by gather: where": _case(by_gather(held=lambda i: torch.where(i < 0, 0, i)), None, *SIGNED),
    "by gather: indices made long": _case(
        by_gather(held=lambda i: i.long().clamp_min(0)), inputs(index=torch.int32), *SIGNED
    ),
    "by gather: clamped indices made long": _case(
        by_gather(held=lambda i: i.clamp_min(0).long(), hidden=lambda i: ~(i.long() >= 0)),
        inputs(index=torch.int32),
        *SIGNED,
    ),
    "by gather: hidden from one on": _case(
        by_gather(hidden=lambda i: i < 1), None, "mask", absent=("negative",)
    ),
    "by gather: hidden where not negative": _case(
        by_gather(hidden=lambda i: i >= 0), None, "mask", absent=("negative",)
    ),
    "by gather: another index is hidden": _case(
        by_gather(hidden=lambda i: i.flip(-1) < 0), None, "mask", absent=("negative",)
    ),
    "by gather: hidden by a number": _case(
        by_gather(fill=-1e9), None, "mask", absent=("negative",)
    ),
    "by value": _case(by_value(lambda i: torch.where(i >= 0, 0.0, -math.inf)), None, *SIGNED),
    "by value: the other way round": _case(
        by_value(lambda i: torch.where(i < 0, -math.inf, 0.0)), None, *SIGNED
    ),
    "by value: a number": _case(
        by_value(lambda i: torch.where(i >= 0, 0.0, -1e9)), None, "mask", absent=("negative",)
    ),
    "by value: others are hidden": _case(
        by_value(lambda i: torch.where(i >= 0, -math.inf, 0.0)), None, "mask",
        absent=("negative",),
    ),
    "by gather: greatest": _case(by_gather(_attentions.by_greatest)),
    "by gather: logsumexp": _case(by_gather(_attentions.by_logsumexp), inputs(none=False)),
    "by gather: one token": _case(by_gather(), inputs((3, 1))),
    "by gather: one request": _case(by_gather(), inputs((1, 4))),
    "by index": _case(by_index, None, *SIGNED),
    "by index: int32": _case(by_index, inputs(index=torch.int32), *SIGNED),
    "from a pool": _case(from_pool, None, *SIGNED),
    "behind the window": _case(behind_window()),
    "behind the window: one token": _case(behind_window(), inputs((3, 1))),
    "fp32 products": _case(wide, None, *SIGNED),
}

_LIKE, _WINDOW = SPELLINGS["by gather"], SPELLINGS["behind the window"]
DENSE = {"sink_attention": 1}  # what is left of it: keys of each query's own
MUTANTS: dict[str, Case] = {
    f"weights: {name}": Case(plain(by_gather(weigh)), inputs(), {}, exact=False, like=_LIKE)
    for name, weigh in _attentions.WEIGHT_MUTANTS.items()
}
MUTANTS |= {
    "the gathered keys are scaled": _case(
        by_gather(values=lambda k: k * 1.5), counts=DENSE, like=_LIKE
    ),
    "chosen entries in front": _case(
        behind_window(lambda near, far: (far, near)), counts=DENSE, like=_WINDOW
    ),
    "a window of each query's own": _case(behind_window(own=True), counts=DENSE, like=_WINDOW),
}
KNOWN_MISSES: dict[str, Case] = {
    "additive, one gather of all": _case(
        masked_by_value, why="Queries are merged in the gathered axis; taken as own keys."
    ),
}
