"""Norm → rope [→ fake quant] [→ cache write], of q, of kv, and of both in one launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..spellings import _packed, _partial_sums, _quants
from ..spellings._case import BF16
from ..spellings._layouts import BATCH, DIM, ROPE, SEQ, layouts
from ..spellings._write_mutants import MUTANTS as WRITE_MUTANTS
from ..spellings._writes import DECODE, FLAT, PAGES, PREFILL, Write
from . import _atoms
from ._hand import Fn, Hand, Site

NAME = "norm_rope_cache"
ONE = {NAME: 1}
WRITTEN = ("cache write",)  # what the report says of a site that writes its rows
SIZES = ((48, 16), (32, 8), (96, 64), (80, 8), (64, 32))  # lanes, and how many of them turn


def _normed(hand: Hand, dtype: torch.dtype, dim: int) -> tuple[Fn, Tensor]:
    if hand.pick("norm or none", {"norm": False, "norm.": False, "none": True}):
        return (lambda x, w: x), hand.random(dim, dtype=dtype)
    return _atoms.norm(hand, dtype, dim)


def turned(hand: Hand) -> Site:
    """q or kv in any layout, not written anywhere."""
    dtype, (dim, lanes) = hand.dtype(), hand.number("lanes", SIZES)
    b, s, h = (hand.number(n, v) for n, v in (("B", (2, 1, 3)), ("S", (5, 1, 3)), ("H", (3, 1, 4))))
    layout = hand.pick("layout", layouts(b, s, h, dim))
    norm, w = _normed(hand, dtype, dim)
    rope, tables = _atoms.rope(hand, dtype, lanes // 2)
    first, between, last = (hand.seam(n) for n in ("in front", "between", "behind"))

    def core(x: Tensor, w: Tensor, *table: Tensor) -> Tensor:
        return last(rope(between(norm(first(x), w)), *table))

    x = hand.tensor("x", *layout.shape, dtype=dtype)
    return hand.site(NAME, layout.around(core), (x, w, *tables(*layout.table)), ONE)


def _resized(hand: Hand, write: Write) -> Write:
    """Other numbers of rows and places, where the write is one for any."""
    if not write.free:
        return write
    more = hand.number("places left", (3, 9))
    rows, spare = (hand.number(n, (5, 1, 2)) for n in ("rows", "sequences"))
    if len(write.rows) == 1:
        return replace(write, rows=(rows,), cache=(rows + more,))
    all_of = write.rows[0] == write.cache[0]
    length = 1 if write.rows[1] == 1 else rows
    cache = (spare if all_of else spare + 1, rows + more)
    return replace(write, rows=(spare, length), cache=cache)


WRITES = {**FLAT, **DECODE, **PREFILL, **{f"pages, {n}": w for n, w in PAGES.items()}}
WRITE_EDITS = {n: w for n, (w, like) in WRITE_MUTANTS.items() if like == "slots"}


def _read_between(rows: Fn, write: Fn, x: Tensor, cache: Tensor, *where: Any) -> Any:
    """The rows are used before the old cache is read."""
    y = rows(x)
    used, old = y.float().sum(-1), cache.float().sum(-1)
    return used, old, write(cache, y, *where)


def _changed_between(rows: Fn, write: Fn, x: Tensor, cache: Tensor, *where: Any) -> Any:
    y = rows(x)
    cache.mul_(0.5)
    return write(cache, y, *where)


def _own_rows(rows: Fn, write: Fn, x: Tensor, cache: Tensor, *where: Any) -> Any:
    """Rows of the cache go to other rows of it: one launch would race."""
    own = cache[tuple(slice(0, n) for n in x.shape[:-1])]
    return write(cache, rows(own if own.shape == x.shape else x * 0.5), *where)


def _two_names(rows: Fn, write: Fn, x: Tensor, cache: Tensor, *where: Any) -> Any:
    y, other = rows(x), cache[:]
    return write(cache, y, *where), write(other, y * 2, *where), cache.float().sum()


def _second_reader(rows: Fn, write: Fn, x: Tensor, cache: Tensor, *where: Any) -> Any:
    """Of the rows, once before they are written and once behind."""
    y = rows(x)
    first = y.float().sum(-1)
    return first, write(cache, y, *where), y * 2, cache.float().amax()


AROUND = {"nothing": lambda rows, write, x, cache, *where: write(cache, rows(x), *where)}
AROUND_EDITS = {
    "cache read between": _read_between, "cache changed between": _changed_between,
    "rows of the cache itself": _own_rows, "two names of one cache": _two_names,
    "second readers": _second_reader,
}  # fmt: skip


def written(hand: Hand) -> Site:
    """kv rows into a cache."""
    dtype, (dim, lanes) = hand.dtype(), hand.number("lanes", SIZES)
    write = hand.pick("write", WRITES, mutants=WRITE_EDITS, of="slots")
    write = _resized(hand, write)
    norm, w = _normed(hand, dtype, dim)
    rope, tables = _atoms.rope(hand, dtype, lanes // 2)
    first, between, last = (hand.seam(n) for n in ("in front", "between", "behind"))
    fake = hand.flag("fake quant")
    change = _fake(hand, lanes) if fake else (lambda y: y)

    around = hand.pick("around", AROUND, mutants=AROUND_EDITS, of="nothing")

    def fn(x: Tensor, w: Tensor, cache: Tensor, *rest: Any) -> Any:
        table, where = rest[: len(given)], rest[len(given) :]

        def rows(x: Tensor) -> Tensor:
            return last(change(rope(between(norm(first(x), w)), *table)))

        return around(rows, write.fn, x, cache, *where)

    given = tables(*write.rows)
    x = hand.tensor("x", *write.rows, dim, dtype=dtype)
    cache = hand.random(*write.cache, dim, dtype=dtype)
    where = write.where(hand.random, write.rows, write.cache)
    parts = (*WRITTEN, *["fake quant"] * fake)
    return hand.site(NAME, fn, (x, w, cache, *given, *where), ONE, parts=parts)


def _fake(hand: Hand, lanes: int) -> Fn:
    """fp8 fake quant of the lanes that are not turned."""
    pieces = _atoms.quant(hand)
    joined = hand.pick("fake quant by", {"cat": True, "a copy in place": False})

    def change(y: Tensor) -> Tensor:
        if joined:
            nope, rope = y.split([y.shape[-1] - lanes, lanes], dim=-1)
            return torch.cat((_quants.fake(nope, 8, **pieces), rope), dim=-1)
        y = y.clone()
        y[..., :-lanes].copy_(_quants.fake(y[..., :-lanes], 8, **pieces))
        return y

    return change


def both(hand: Hand) -> Site:
    """q and kv of the same tokens, each in its own words, by the same tables: one launch."""
    dtype, (dim, lanes) = hand.dtype(), hand.number("lanes", SIZES)
    b, s, h = (hand.number(n, v) for n, v in (("B", (2, 1, 3)), ("S", (5, 1, 3)), ("H", (3, 4))))
    q_norm, q_w = _normed(hand, dtype, dim)
    kv_norm, kv_w = _atoms.norm(hand, dtype, dim, "kv norm")
    q_rope, tables = _atoms.rope(hand, dtype, lanes // 2)
    kind = hand.words["rope"].partition(" ")[0]  # both read the same tables
    kv_rope = hand.pick("kv rope", _atoms.ROPES.get(kind, {"as q's": q_rope}))
    between = hand.seam("between")
    write = hand.pick("write", {n: w for n, w in PREFILL.items() if n.startswith("rows and")})
    around = hand.flag("kv first")

    def fn(q: Tensor, kv: Tensor, qw: Tensor, w: Tensor, cache: Tensor, at: Tensor, *t: Tensor):
        def keys() -> None:
            write.fn(cache, kv_rope(between(kv_norm(kv, w)), *t), at)

        if around:
            keys()
        found = q_rope(q_norm(q, qw), *(x.unsqueeze(2) for x in t))
        if not around:
            keys()
        return found

    q, kv = hand.tensor("q", b, s, h, dim, dtype=dtype), hand.tensor("kv", b, s, dim, dtype=dtype)
    cache = hand.random(b, s + 3, dim, dtype=dtype)
    at = write.where(hand.random, (b, s), (b, s + 3))
    given = (q, kv, q_w, kv_w, cache, *at, *tables(b, s))
    return hand.site(NAME, fn, given, ONE, parts=("q:", "kv:", *WRITTEN))


PART_EDITS = {n: (f, _partial_sums.ROWS, BF16) for n, f in _partial_sums.MUTANTS.items()}


def of_parts(hand: Hand) -> Site:
    """q of the partial results of a split product."""
    sums, shape, dtype = hand.pick("sum", _partial_sums.SUMS, mutants=PART_EDITS, of="rows")
    norm, w = _atoms.norm(hand, BF16, DIM)
    rope, tables = _atoms.rope(hand, BF16, ROPE // 2)
    between = hand.seam("between")

    def fn(parts: Tensor, w: Tensor, *table: Tensor) -> Tensor:
        return rope(norm(between(sums(parts).to(BF16)), w), *table)

    parts = hand.random(*shape, dtype=dtype)
    return hand.site(NAME, fn, (parts, w, *tables(BATCH, SEQ, 1)), ONE)


PUTS = {
    "assigned": lambda cache, at, rows: cache.__setitem__(at, rows),
    "index_copy": lambda cache, at, rows: cache.index_copy_(0, at, rows),
    "index_put": lambda cache, at, rows: cache.index_put_((at,), rows),
}
PACKS = {n: {"pieces": _quants.VARIANTS[n]} for n in ("pow2", "pow2_reciprocal", "pow2_methods")}
PACK_EDITS = {
    "tail reversed": {"tail": _packed._tail_first},
    "another order": {"order": (0, 2, 1, 3)},
    "padding of ones": {"pad": 1},
    "half": {"source": lambda t: t * 0.5},
    "another row": {"source": lambda t: t.roll(1, 0)},
    "raw scales": {"pieces": {}},
}


def packed(hand: Hand) -> Site:
    """kv rows as bytes: codes, the turned lanes, scales."""
    norm, w = _atoms.norm(hand, BF16, DIM)
    rope, tables = _atoms.rope(hand, BF16, ROPE // 2)
    pieces = hand.pick("bytes", PACKS, mutants=PACK_EDITS, of="pow2")
    put, first, between = hand.pick("put", PUTS), hand.seam("in front"), hand.seam("between")

    def fn(x: Tensor, w: Tensor, cache: Tensor, at: Tensor, *table: Tensor) -> None:
        put(cache, at, _packed.pack(rope(between(norm(first(x), w)), *table), **pieces))

    _, _, *_, cache, at = _packed.inputs(hand.random)
    x = hand.tensor("x", len(at), DIM, dtype=BF16)
    given = (x, w, cache, at, *tables(len(at)))
    return hand.site(NAME, fn, given, ONE, parts=("fp8 rows", *WRITTEN))


FAMILIES = {
    "q or kv": turned,
    "kv written": written,
    "q and kv": both,
    "of parts": of_parts,
    "packed": packed,
}
