"""Attention with a sink, over all keys and over chosen ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..spellings import _attentions
from ..spellings import sink_attention as dense
from ..spellings import sparse_sink_attention as sparse
from ._hand import Hand, Site

EDITS = _attentions.WEIGHT_MUTANTS
MASKS = {
    "fill": lambda s, m: s.masked_fill(~m, float("-inf")),
    "where": lambda s, m: torch.where(m, s, float("-inf")),
    "where not": lambda s, m: torch.where(torch.logical_not(m), float("-inf"), s),
}
SCORES = {
    "einsum": lambda q, kv: torch.einsum("bshd,btd->bsht", q, kv),
    "matmul": lambda q, kv: torch.matmul(q, kv.unsqueeze(1).mT),
    "flat": lambda q, kv: torch.bmm(q.flatten(1, 2), kv.mT).unflatten(1, (q.shape[1], -1)),
}
VALUES = {
    "einsum": lambda w, kv: torch.einsum("bsht,btd->bshd", w, kv),
    "matmul": lambda w, kv: torch.matmul(w, kv.unsqueeze(1)),
    "flat": lambda w, kv: torch.bmm(w.flatten(1, 2), kv).unflatten(1, (w.shape[1], -1)),
}
VALUE_EDITS = {
    "scaled": lambda w, kv: torch.einsum("bsht,btd->bshd", w, kv * 2),
    "other order": lambda w, kv: torch.einsum("bsht,btd->bshd", w, kv.flip(1)),
    "rolled": lambda w, kv: torch.einsum("bsht,btd->bshd", w, kv.roll(1, -1)),
}


def tokens_first(hand: Hand) -> Site:
    """q ``[B,S,H,D]``, a boolean mask."""
    sizes = tuple(
        hand.number(n, v) for n, v in zip("BSHT", ((2, 1, 3), (5, 1), (4, 8), (11, 7)), strict=True)
    )
    dtype = hand.dtype("dtype", "bf16", "fp16")
    wide = hand.flag("fp32 products")
    scores, values = (
        hand.pick("scores", SCORES),
        hand.pick("values", VALUES, mutants=VALUE_EDITS, of="einsum"),
    )
    weigh = hand.pick("weights", _attentions.WEIGHTS, mutants=EDITS, of="cat_softmax")
    mask, first, last = hand.pick("mask", MASKS), hand.seam("in front"), hand.seam("behind")

    def fn(q: Tensor, kv: Tensor, seen: Tensor, sinks: Tensor) -> Tensor:
        a, k = (first(q).float(), kv.float()) if wide else (first(q), kv)
        s = mask(scores(a, k).float() * dense.SCALE, seen.unsqueeze(2))
        return last(values(weigh(s, sinks.view(1, 1, -1, 1)).to(k.dtype), k).to(q.dtype))

    q, kv, seen, sinks = dense.inputs(dtype=dtype, sizes=sizes)(hand.random)
    q = hand.tensor("q", *q.shape, dtype=dtype)
    return hand.site("sink_attention", fn, (q, kv, seen, sinks), {"sink_attention": 1}, exact=False)


WAYS = {"hf": _attentions.hf, "in fp32": _attentions.upcast}
SCALED = {"times": lambda s: s * dense.SCALE, "divided": lambda s: s / 4.0, "not": lambda s: s}


def heads_first(hand: Hand) -> Site:
    """q ``[B,H,S,D]``, a mask that is added."""
    sizes = tuple(
        hand.number(n, v) for n, v in zip("BSHT", ((2, 1, 3), (5, 1), (4, 8), (11, 7)), strict=True)
    )
    dtype = hand.dtype("dtype", "bf16", "fp16")
    kind = hand.number("mask", ("inf", "min"))
    fn = dense.heads_first(
        hand.pick("weights", WAYS), hand.flag("transposed"), hand.pick("scale", SCALED)
    )
    first = hand.seam("in front")
    q, kv, mask, sinks = dense.inputs(
        first=True, mask=kind, dtype=dtype, sinks=dtype, sizes=sizes
    )(hand.random)
    if hand.words["scale"] == "not":  # logits of no more than a model's
        q = q * dense.SCALE

    def whole(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        return fn(q, first(kv), mask, sinks)

    return hand.site(
        "sink_attention", whole, (q, kv, mask, sinks), {"sink_attention": 1}, exact=False
    )


Way = Callable[[Any, Any, Any], Any]  # weights, the index held in range, who is hidden → fn
GATHERED: dict[str, Way] = {
    "gather": lambda w, held, hidden: sparse.by_gather(w, held=held, hidden=hidden),
    "index": lambda w, held, hidden: (
        lambda q, kv, at, sinks: sparse._attend(
            q, kv[torch.arange(kv.shape[0])[:, None, None], at], hidden(at), sinks, w
        )
    ),
    "pool": lambda w, held, hidden: (
        lambda q, kv, at, sinks: sparse._attend(q, kv.flatten(0, 1)[at], hidden(at), sinks, w)
    ),
}
HELD = {
    "clamp": lambda at: at.long().clamp(min=0), "relu": lambda at: at.relu().long(),
    "where": lambda at: torch.where(at < 0, 0, at).long(),
    "clamp, then long": lambda at: at.clamp_min(0).long(),
}  # fmt: skip
HIDDEN = {
    "negative": lambda at: at < 0, "not seen": lambda at: ~(at >= 0),
    "int": lambda at: at.int() < 0, "no number": lambda at: at == -1,
    "zero too": lambda at: at < 1, "another": lambda at: at.flip(-1) < 0,
}  # fmt: skip


def chosen(hand: Hand) -> Site:
    """Keys by an index of each query."""
    # No "B": as a symbol, a gather's batch is not known to be as many as the keys' batch.
    sizes = (hand.number("batch", (2, 1, 3)), hand.number("S", (5, 1, 3)))
    index = hand.number("index", (torch.int64, torch.int32))
    weigh = hand.pick("weights", _attentions.WEIGHTS, mutants=EDITS, of="cat_softmax")
    way, hidden = hand.pick("gathered", GATHERED), hand.pick("hidden", HIDDEN)
    held = hand.pick("held", HELD) if hand.words["gathered"] == "gather" else None
    fn, first, last = way(weigh, held, hidden), hand.seam("in front"), hand.seam("behind")
    # Where nothing is seen, a softmax without the sink is a NaN.
    none = hand.words["weights"] != "by_logsumexp" and hand.flag("none seen")

    def whole(q: Tensor, kv: Tensor, at: Tensor, sinks: Tensor) -> Tensor:
        return last(fn(first(q), kv, at, sinks))

    given = sparse.inputs(sizes, index, none)(hand.random)
    name = "sparse_sink_attention"
    return hand.site(name, whole, given, {name: 1}, exact=False)


FAMILIES = {"tokens first": tokens_first, "heads first": heads_first, "chosen keys": chosen}
