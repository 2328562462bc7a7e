"""Attention with a sink: all heads on one tensor of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.deepseek_v4.attention import sink_attention as ours

from . import _attentions
from ._attentions import SCALE
from ._case import BF16, FP16, FP32, Case, Draw, plain

NAME = "sink_attention"
BATCH, SEQ, HEADS, KEYS, DIM = 2, 5, 4, 11, 32
Fn = Callable[..., Any]


def inputs(
    *, first: bool = False, mask: str = "bool", dtype: torch.dtype = BF16, sinks: Any = FP32,
    sizes: tuple[int, int, int, int] = (BATCH, SEQ, HEADS, KEYS), own: bool = False,
) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
    """q ``[B,S,H,D]`` (first: ``[B,H,S,D]``), kv ``[B,T,D]`` (own: ``[B,S,T,D]``), a mask
    ``[B,S,T]``, True = seen, or 0, finite values and -inf; sinks ``[H]``."""

    def make(draw: Draw | None = None) -> tuple[Tensor, ...]:
        draw = draw or Draw()
        b, s, h, t = sizes
        q = draw(b, h, s, DIM, dtype=dtype) if first else draw(b, s, h, DIM, dtype=dtype)
        kv = draw(b, s, t, DIM, dtype=dtype) if own else draw(b, t, DIM, dtype=dtype)
        seen = torch.rand(b, s, t, generator=draw.generator) < 0.6
        seen[:, 0] = False  # a row that sees nothing
        if mask == "bool":
            m = seen
        else:
            low = {"inf": -math.inf, "min": torch.finfo(dtype).min}[mask]
            m = draw(b, s, t, dtype=dtype, scale=0.5).masked_fill(~seen, low)
        return q, kv, m, draw(h, dtype=sinks)

    return make


def tokens_first(weigh: Fn, wide: bool = False) -> Fn:
    """q ``[B,S,H,D]`` by einsum, a boolean mask filled in, fp32 from the scores on."""

    def fn(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        if wide:
            scores = torch.einsum("bshd,btd->bsht", q.float(), kv.float()) * SCALE
        else:
            scores = torch.einsum("bshd,btd->bsht", q, kv).float() * SCALE
        scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
        w = weigh(scores, sinks.view(1, 1, -1, 1))
        if wide:
            return torch.einsum("bsht,btd->bshd", w, kv.float()).to(q.dtype)
        return torch.einsum("bsht,btd->bshd", w.to(kv.dtype), kv)

    return fn


def heads_first(weigh: Fn, transposed: bool = True, scale: Fn = lambda s: s * SCALE) -> Fn:
    """transformers' layout: q ``[B,H,S,D]``, keys repeated for the heads, a mask added."""

    def fn(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        b, t, d = kv.shape
        keys = kv[:, None, None].expand(b, 1, q.shape[1], t, d).reshape(b, q.shape[1], t, d)
        s = scale(torch.matmul(q, keys.transpose(2, 3))) + mask.unsqueeze(1)
        w = weigh(s, sinks.reshape(1, -1, 1, 1)).to(keys.dtype)
        out = torch.matmul(w, keys)
        return out.transpose(1, 2).contiguous() if transposed else out

    return fn


def mask_in_pieces(cut: int) -> Fn:
    """The window's mask and the compressed entries' one are joined in front of the sum."""

    def fn(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        both = torch.cat([mask[..., :cut] * 2, (mask[..., cut:] * 3).to(mask.dtype)], dim=-1)
        return heads_first(_attentions.hf)(q, kv, both, sinks)

    return fn


def grown(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """Keys joined to those of a cache, entries behind them, a mask padded for these."""
    keys = torch.cat([kv, kv[:, -1:] * 0.5], dim=1)
    keys = torch.cat([keys, kv[:, :2] * 2], dim=1)
    padded = torch.nn.functional.pad(mask, (0, keys.shape[1] - mask.shape[-1]))
    return heads_first(_attentions.hf)(q, keys, padded, sinks)


def flat(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """No batch: q ``[S,H,D]``, kv ``[T,D]``."""
    q, kv, mask = q[0], kv[0], mask[0]
    s = (q.flatten(0, 1) @ kv.T).view(*q.shape[:2], -1).float() * SCALE
    s = torch.where(mask[:, None], s, float("-inf"))
    return (_attentions.cat_softmax(s, sinks[:, None]).to(q.dtype).flatten(0, 1) @ kv).view_as(q)


def ours_packed(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    return ours(q, kv.unsqueeze(1) if kv.dim() == 3 else kv, mask, sinks)


def _apart(q: Tensor, kv: Tensor, m: Tensor, sinks: Tensor) -> Tensor:
    s = torch.einsum("bshd,btd->bsht", q, kv[:, :-1]).float() * SCALE
    s = s.masked_fill(~m.unsqueeze(2), float("-inf"))
    w = _attentions.cat_softmax(s, sinks.view(1, 1, -1, 1)).to(kv.dtype)
    return torch.einsum("bsht,btd->bshd", w, kv[:, :-1])


def _unmasked(q: Tensor, kv: Tensor, sinks: Tensor) -> Tensor:
    s = torch.einsum("bshd,btd->bsht", q, kv).float() * SCALE
    w = _attentions.cat_softmax(s, sinks.view(1, 1, -1, 1)).to(kv.dtype)
    return torch.einsum("bsht,btd->bshd", w, kv)


def _case(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    return Case(
        plain(fn), make or inputs(), {NAME: 1}, parts or ("softmax with a sink",),
        **{"exact": False, **more},
    )  # fmt: skip


HF = inputs(first=True, mask="inf", sinks=BF16)
SPELLINGS: dict[str, Case] = {
    "hf": _case(heads_first(_attentions.hf), HF),
    "hf: finite mask": _case(
        heads_first(_attentions.hf), inputs(first=True, mask="min", sinks=BF16)
    ),
    "hf: fp32 sinks": _case(heads_first(_attentions.hf), inputs(first=True, mask="inf")),
    "hf: as it lies": _case(heads_first(_attentions.hf, transposed=False), HF),
    "hf: softmax in fp32": _case(heads_first(_attentions.upcast), HF),
    "hf: divided": _case(heads_first(_attentions.hf, scale=lambda s: s / 4.0), HF),
    "hf: not scaled": _case(heads_first(_attentions.hf, scale=lambda s: s), HF),
    "hf: fp16": _case(
        heads_first(_attentions.hf), inputs(first=True, mask="inf", dtype=FP16, sinks=FP16)
    ),
    "hf: mask in pieces": _case(mask_in_pieces(6), HF),
    "hf: mask in pieces, the last of one": _case(mask_in_pieces(KEYS - 1), HF),
    "ours": _case(ours_packed),
    "ours: own keys": _case(ours_packed, inputs(own=True)),
    "ours: one token": _case(ours_packed, inputs(sizes=(3, 1, 4, 7))),
    "ours: one request": _case(ours_packed, inputs(sizes=(1, 4, 4, 7))),
    "ours: one of all": _case(ours_packed, inputs(sizes=(1, 1, 4, 7))),
    "reference: fp32 products": _case(tokens_first(_attentions.cat_softmax, wide=True)),
    "flat tokens": _case(flat, inputs(sizes=(1, SEQ, HEADS, KEYS))),
    "keys and values sliced apart": _case(
        lambda q, kv, m, sinks: _apart(q, torch.cat((kv, kv[:, :1]), 1) * 2, m, sinks)
    ),
    "dynamic keys": _case(ours_packed, dynamic={1: (1,), 2: (2,)}),
    "dynamic batch, queries and keys": _case(
        tokens_first(_attentions.by_hand), dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1, 2)}
    ),
    "hf: dynamic keys": _case(
        grown, inputs(first=True, mask="inf", sinks=BF16), dynamic={1: (1,), 2: (2,)}
    ),
    "no mask": _case(
        lambda q, kv, m, sinks: _unmasked(q, kv, sinks), None, "Scores → softmax"
    ),
    "other readers": _case(
        lambda *a: (lambda y: (y, y.float().sum(-1), a[0] * 2))(ours_packed(*a))
    ),
}
for _name, _weigh in _attentions.WEIGHTS.items():
    SPELLINGS[f"weights: {_name}"] = _case(tokens_first(_weigh), inputs())

MUTANTS: dict[str, Case] = {}
_LIKE = SPELLINGS["weights: cat_softmax"]
for _name, _weigh in _attentions.WEIGHT_MUTANTS.items():
    MUTANTS[f"weights: {_name}"] = Case(
        plain(tokens_first(_weigh)), inputs(), {}, exact=False, like=_LIKE
    )


def _edited(values: Fn = lambda kv: kv, keys: Fn = lambda kv: kv, mask: Fn = lambda s, m: s) -> Fn:
    def fn(q: Tensor, kv: Tensor, m: Tensor, sinks: Tensor) -> Tensor:
        s = torch.einsum("bshd,btd->bsht", q, keys(kv)).float() * SCALE
        s = mask(s.masked_fill(~m.unsqueeze(2), float("-inf")), m)
        w = _attentions.cat_softmax(s, sinks.view(1, 1, -1, 1)).to(kv.dtype)
        return torch.einsum("bsht,btd->bshd", w, values(kv))

    return fn


_EDITS = {
    "values are not the keys": _edited(values=lambda kv: kv * 2),
    "values in another order": _edited(values=lambda kv: kv.flip(1)),
    "values shifted along D": _edited(values=lambda kv: kv.roll(1, -1)),
    "keys of the other request": _edited(keys=lambda kv: kv.flip(0)),
    "tanh cap": _edited(mask=lambda s, m: torch.tanh(s / 30.0) * 30.0),
    "scaled after the mask": _edited(mask=lambda s, m: s * 0.5),
    "masked twice": _edited(mask=lambda s, m: s.masked_fill(m.unsqueeze(2), -3.0)),
}
for _name, _fn in _EDITS.items():
    MUTANTS[_name] = Case(plain(_fn), inputs(), {}, exact=False, like=_LIKE)

KNOWN_MISSES: dict[str, Case] = {
    "divided after the product": _case(
        lambda q, kv, m, sinks: _late(q, kv, m, sinks),
        inputs(),
        why="The weights are unnormalised; no atom of them is a weight.",
    ),
    "fp32 model": _case(ours_packed, inputs(dtype=FP32), why="The kernel takes 16-bit keys."),
}


def _late(q: Tensor, kv: Tensor, m: Tensor, sinks: Tensor) -> Tensor:
    s = torch.einsum("bshd,btd->bsht", q, kv).float() * SCALE
    s = s.masked_fill(~m.unsqueeze(2), float("-inf"))
    sink = sinks.view(1, 1, -1, 1)
    top = torch.maximum(s.amax(-1, keepdim=True), sink)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True) + torch.exp(sink - top)
    return (torch.einsum("bsht,btd->bshd", e.to(kv.dtype), kv) / total).to(q.dtype)
