"""The KV compressor: layout of windows → softmax pool → norm → rope [→ cache write]; rings; and
entries that a matrix rotates.
"""

from __future__ import annotations

from torch import Tensor

from ..spellings import _compress_rotations as t
from ..spellings import _fp4, _rotations
from ..spellings import _pools as p
from ..spellings import compress_kv as c
from ..spellings._case import BF16, FP32
from . import _atoms
from ._hand import Hand, Site

NAME = "compress_kv"
ONE = {NAME: 1}
LAYOUTS = p.LAYOUTS | {"apart": p.apart}
LAYOUT_EDITS = {
    "behind": p.behind, "zeros before": p.zeros_before, "own kv": p.own_kv,
    "exchanged": p.exchanged, "other bias": p.other_bias,
}  # fmt: skip
POOL_EDITS = {
    "over entries": p.over_entries, "averaged": p.averaged, "twice": p.twice,
    "shifted": p.shifted_weights,
}  # fmt: skip


def windows(hand: Hand) -> Site:
    """Whole windows of a prefill."""
    dtype, count = hand.dtype(), hand.number("windows", (3, 2, 1))
    left = hand.number("tokens left over", (3, 0, 1))
    layout = hand.pick("layout", LAYOUTS, mutants=LAYOUT_EDITS, of="hf")
    pool = hand.pick("pool", p.POOLS, mutants=POOL_EDITS, of="hf")
    series = 1 if hand.words["layout"] == "apart" else 2
    norm, w = _atoms.norm(hand, dtype, p.DIM)
    rope, tables = _atoms.rope(hand, dtype, c.ROPE_DIM // 2)
    between, last = hand.seam("between"), hand.seam("behind")
    write = hand.flag("write")
    rows = (p.BATCH, count * p.RATIO + left, series * p.DIM)
    kv, gate = (hand.tensor(n, *rows, dtype=dtype) for n in ("kv", "gate"))
    bias = hand.random(p.RATIO, series * p.DIM, dtype=hand.number("bias", (dtype, FP32)))
    cache = (hand.random(p.BATCH + 1, count + 2, p.DIM, dtype=dtype),) if write else ()

    def fn(kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor, *rest: Tensor):
        pooled = pool(*layout(kv, gate, bias)).to(dtype)
        y = last(rope(norm(between(pooled), w), *rest[len(cache) :]))
        if not write:
            return y
        rest[0][: p.BATCH, :count] = y

    given = (kv, gate, bias, w, *cache, *tables(p.BATCH, count))
    return hand.site(NAME, fn, given, ONE, parts=("cache write",) if write else ())


def rotated(hand: Hand) -> Site:
    """Entries of the indexer: a matrix behind the rope [→ fp4] [→ cache write]."""
    count = hand.number("windows", (3, 2, 1))
    turn = hand.pick("rotation", _rotations.ROTATIONS)
    between, last = hand.seam("between"), hand.seam("behind")
    write, quantised = hand.flag("write"), hand.flag("fp4")
    codes = dict(mutants=_fp4.MUTANTS, of="exponent")
    pieces = hand.pick("code", _fp4.VARIANTS, **codes) if quantised else {}

    def change(y: Tensor, m: Tensor) -> Tensor:
        y = turn(between(y), m)
        return last(_fp4.fake(y, 32, **pieces) if quantised else y)

    def fn(kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor, m: Tensor, *rest: Tensor):
        y = change(c.TURN(t.entries(kv, gate, bias, w), *rest[:2]), m)
        if not write:
            return y
        rest[2][: p.BATCH, :count] = y

    given = t.inputs(dtype=BF16, cache=write, count=count)()
    parts = ["matrix → fp4 fake quant"] * quantised + ["cache write"] * write
    return hand.site(NAME, fn, given, ONE, exact=False, parts=parts or ["matrix"])


def rings(hand: Hand) -> Site:
    """A decode step that reads its windows out of a ring and writes those that are closed."""
    overlap, mask = hand.flag("overlap"), hand.pick("mask", {"fill": p.masked, "where": p.by_where})
    edits = {"late": dict(late=1), "gates late": dict(gate_shift=1)}
    way = hand.pick("ring", {"usual": {}}, mutants=edits, of="usual")
    result = hand.pick(
        "result", {"all but the last": lambda t: t[:, :-1], "copy": lambda t: t[:, :-1] * 2}
    )
    series = 2 if overlap else 1
    fn = p.ring(overlap, mask=mask, result=result, **way)
    given = c.ring_inputs(series, series * p.RATIO + hand.number("more", (2, 0, 5)))(hand.random)
    return hand.site(NAME, fn, given, ONE, parts=("cache write",))


FAMILIES = {"windows": windows, "rings": rings, "rotated": rotated}
