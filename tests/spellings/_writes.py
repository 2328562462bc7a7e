"""Writes of rows to a cache as people write them, and edits that break them.

``write(cache, rows, *where)`` returns what the function around it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ._case import Draw

TOKENS, SLOTS = 5, 11  # rows and places of a flat cache
BATCH, SEQ, RING = 2, 5, 8  # of one ring per sequence


@dataclass(frozen=True)
class Write:
    """``rows`` and ``cache``: their shapes in front of the lanes; ``where(draw, rows, cache)``: the
    arguments that say where. ``free``: it is right for other sizes than these too."""

    fn: Callable[..., Any]
    rows: tuple[int, ...]
    cache: tuple[int, ...]
    where: Callable[..., tuple[Any, ...]]
    free: bool = False


def some_slots(draw: Draw, rows: tuple[int, ...], cache: tuple[int, ...]) -> tuple[Any, ...]:
    return (draw.permutation(math.prod(cache))[: rows[-1]],)


def _some_slots_int32(draw: Draw, *sizes: tuple[int, ...]) -> tuple[Any, ...]:
    return (some_slots(draw, *sizes)[0].int(),)


def _positions(draw: Draw, rows: tuple[int, ...], cache: tuple[int, ...]) -> tuple[Any, ...]:
    return (torch.arange(17, 17 + rows[-1]),)


def nowhere(draw: Draw, rows: tuple[int, ...], cache: tuple[int, ...]) -> tuple[Any, ...]:
    return ()


FLAT: dict[str, Write] = {}
DECODE: dict[str, Write] = {}
PREFILL: dict[str, Write] = {}


def _flat(
    name: str, where: Any = some_slots, rows: int = TOKENS, slots: int = SLOTS, free: bool = True
) -> Any:
    def register(fn: Any) -> Any:
        FLAT[name] = Write(fn, (rows,), (slots,), where, free)
        return fn

    return register


@_flat("slots")
def _by_slots(cache, rows, slots):
    cache[slots] = rows


@_flat("slots, int32", _some_slots_int32)
def _by_slots_int32(cache, rows, slots):
    cache[slots] = rows


@_flat("slots that wrap around", lambda d, *_: (torch.tensor([3, -1, 0, -4, 5]),), free=False)
def _by_negative(cache, rows, slots):
    cache[slots] = rows


@_flat("the rows are used as well")
def _kept(cache, rows, slots):
    cache[slots] = rows
    return rows * 2


@_flat("the new cache is read")
def _read_after(cache, rows, slots):
    cache[slots] = rows
    return cache.float().sum(-1), cache[:3]


@_flat("the old cache is read before")
def _read_before(cache, rows, slots):
    before = cache.float().sum(-1)
    cache[slots] = rows
    return before


@_flat("index_put")
def _index_put(cache, rows, slots):
    cache.index_put_((slots,), rows)


@_flat("index_copy")
def _index_copy(cache, rows, slots):
    cache.index_copy_(0, slots, rows)


@_flat("colon")
def _colon(cache, rows, slots):
    cache[slots, :] = rows


@_flat("ring of positions", _positions)
def _ring(cache, rows, positions):
    cache[positions % cache.shape[0]] = rows


@_flat("ring by remainder", _positions)
def _remainder(cache, rows, positions):
    cache[torch.remainder(positions, cache.shape[0])] = rows


@_flat("padding to a spare row", lambda d, *_: (torch.tensor([3, 1, 0, 4, -1]),), free=False)
def _spare(cache, rows, slots):
    cache[torch.where(slots < 0, cache.shape[0] - 1, slots)] = rows


@_flat("slice", nowhere)
def _slice(cache, rows):
    cache[2 : 2 + rows.shape[0]] = rows


@_flat("slice from the start", nowhere)
def _first(cache, rows):
    cache[: rows.shape[0]].copy_(rows)


@_flat("narrow", nowhere)
def _narrow(cache, rows):
    cache.narrow(0, 3, rows.shape[0]).copy_(rows)


@_flat("slice of a start", lambda d, *_: (4,), free=False)
def _from_start(cache, rows, start):
    cache[start : start + rows.shape[0]] = rows


@_flat("the whole cache", nowhere, slots=TOKENS, free=False)
def _whole(cache, rows):
    cache.copy_(rows)


@_flat("one row", nowhere, rows=1, free=False)
def _one(cache, rows):
    cache[3] = rows[0]


@_flat("one row by select", nowhere, rows=1, free=False)
def _one_select(cache, rows):
    cache.select(0, 3).copy_(rows.squeeze(0))


@_flat("one row from the end", nowhere, rows=1, free=False)
def _last(cache, rows):
    cache[-1] = rows.squeeze(0)


@_flat("scatter")
def _scatter(cache, rows, slots):
    cache.scatter_(0, slots[:, None].expand(-1, rows.shape[-1]), rows)


@_flat("scatter, expanded like the rows")
def _scatter_as(cache, rows, slots):
    cache.scatter_(0, slots.unsqueeze(-1).expand_as(rows), rows)


# ---- a ring per sequence -----------------------------------------------------------------------


def _rows(
    table: dict[str, Write], name: str, length: int, where: Any, batch: int = BATCH,
    free: bool = True,
) -> Any:  # fmt: skip
    def register(fn: Any) -> Any:
        table[name] = Write(fn, (batch, length), (3, RING), where, free)
        return fn

    return register


def _steps(draw: Draw, rows: tuple[int, ...], cache: tuple[int, ...]) -> tuple[Any, ...]:
    return (torch.arange(rows[0]) * 9 + 6,)


def _some_rows(draw: Draw, rows: tuple[int, ...], cache: tuple[int, ...]) -> tuple[Any, ...]:
    return *_steps(draw, rows, cache), draw.permutation(cache[0])[: rows[0]]


def _some_places(draw: Draw, rows: tuple[int, ...], cache: tuple[int, ...]) -> tuple[Any, ...]:
    return (draw.permutation(cache[1])[: rows[1]],)


@_rows(DECODE, "row and ring", 1, _steps)
def _row_ring(cache, rows, at):
    cache[torch.arange(rows.shape[0]), at % cache.shape[1]] = rows.squeeze(1)


@_rows(DECODE, "row and ring, unsqueezed", 1, _steps)
def _row_ring_2d(cache, rows, at):
    cache[torch.arange(rows.shape[0]).unsqueeze(1), (at % cache.shape[1]).unsqueeze(1)] = rows


@_rows(DECODE, "batch rows and ring", 1, _some_rows)
def _batch_rows(cache, rows, at, batch):
    cache[batch, at % cache.shape[1]] = rows[:, 0]


@_rows(DECODE, "reference, int position", 1, lambda d, *_: (13,))
def _reference_int(cache, rows, at):
    cache[: rows.shape[0], at % cache.shape[1]] = rows.squeeze(1)


@_rows(DECODE, "reference, tensor position", 1, lambda d, *_: (torch.tensor([13]),))
def _reference_tensor(cache, rows, at):
    cache[: rows.shape[0], at % cache.shape[1]] = rows


@_rows(DECODE, "select and copy", 1, nowhere, batch=3)
def _select(cache, rows):
    cache.select(1, cache.shape[1] - 3).copy_(rows.squeeze(1))


def _table(draw: Draw, rows: tuple[int, ...], cache: tuple[int, ...]) -> tuple[Any, ...]:
    return (torch.arange(rows[1]) + torch.arange(rows[0])[:, None] * 6 + 3,)


@_rows(PREFILL, "rows and ring", SEQ, _table)
def _rows_ring(cache, rows, at):
    cache[torch.arange(rows.shape[0])[:, None], at % cache.shape[1]] = rows


@_rows(PREFILL, "rows and ring, put", SEQ, _table)
def _rows_put(cache, rows, at):
    batch = torch.arange(rows.shape[0]).unsqueeze(1).expand(-1, rows.shape[1])
    cache.index_put_((batch, at % cache.shape[1]), rows)


@_rows(PREFILL, "prefix", SEQ, nowhere)
def _prefix(cache, rows):
    cache[: rows.shape[0], : rows.shape[1]] = rows


@_rows(PREFILL, "span", SEQ, nowhere)
def _span(cache, rows):
    cache[: rows.shape[0], 2 : 2 + rows.shape[1]] = rows


@_rows(PREFILL, "span of all", SEQ, nowhere, batch=3)
def _span_of_all(cache, rows):
    cache[:, 1 : 1 + rows.shape[1]].copy_(rows)


@_rows(PREFILL, "narrow of all", SEQ, nowhere, batch=3)
def _narrow_all(cache, rows):
    cache.narrow(1, 1, rows.shape[1]).copy_(rows)


@_rows(PREFILL, "slots shared by all", SEQ, _some_places, batch=3)
def _shared(cache, rows, slots):
    cache[:, slots] = rows


@_rows(PREFILL, "index_copy along the ring", SEQ, _some_places, batch=3)
def _copy_ring(cache, rows, slots):
    cache.index_copy_(1, slots, rows)


@_rows(PREFILL, "ring in two pieces", SEQ, nowhere, free=False)
def _split_ring(cache, rows):
    cache[: rows.shape[0], 2:5], cache[: rows.shape[0], :2] = rows.split([3, 2], dim=1)


@_rows(PREFILL, "ring in two pieces, the last rows", SEQ + 6, nowhere, free=False)
def _last_rows(cache, rows):
    (batch, length), ring = rows.shape[:2], cache.shape[1]
    cut = length % ring
    last = rows[:, -ring:]
    cache[:batch, cut:ring], cache[:batch, :cut] = last.split([ring - cut, cut], dim=1)


@_rows(PREFILL, "ring in two pieces, by slices", SEQ, nowhere, batch=3, free=False)
def _two_slices(cache, rows):
    cache[:, :2] = rows[:, 3:]
    cache[:, 5:].copy_(rows[:, :3])


@_rows(PREFILL, "scatter along the ring", SEQ, _table, batch=3)
def _scatter_ring(cache, rows, at):
    index = (at[:1] + torch.arange(rows.shape[0])[:, None]) % cache.shape[1]
    cache.scatter_(1, index[..., None].expand_as(rows), rows)


def _pages(cache, rows, slots):
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


@_rows(PREFILL, "ring in two pieces, one of one row", SEQ, nowhere, free=False)
def _a_row_alone(cache, rows):
    cache[: rows.shape[0], 4:8] = rows[:, :4]
    cache[: rows.shape[0], :1] = rows[:, 4:]


def one_sequence(write: Write) -> Write:
    """The same with a batch of one, which leaves no axis in a graph."""
    batch, length = write.rows
    places, ring = write.cache
    return replace(write, rows=(1, length), cache=(1 if batch == places else places, ring))


PREFILL["pages"] = Write(_pages, (TOKENS,), (3, 4), some_slots)


# ---- an axis for the one head of keys that are values, as transformers' caches have it ----------

ONE_HEAD: dict[str, Write] = {}


def _one_head(name: str, where: Any, length: int, batch: int = 3) -> Any:
    def register(fn: Any) -> Any:
        ONE_HEAD[name] = Write(fn, (batch, length), (3, 1, RING), where)
        return fn

    return register


def _a_place(draw: Draw, rows: tuple[int, ...], cache: tuple[int, ...]) -> tuple[Any, ...]:
    return (draw.permutation(cache[-1])[: rows[1]],)


@_one_head("index_copy", _a_place, 1)
@_one_head("index_copy of several", _a_place, SEQ)
def _copy_heads(cache, rows, slots):
    keys = rows.view(*rows.shape[:2], 1, -1).transpose(1, 2)
    cache.index_copy_(2, slots, keys)


@_one_head("slots shared by all", _a_place, SEQ)
def _shared_head(cache, rows, slots):
    cache[:, :, slots] = rows.unsqueeze(1)


@_one_head("the head selected", _a_place, SEQ)
def _select_head(cache, rows, slots):
    cache[:, 0].index_copy_(1, slots, rows)


@_one_head("row and ring", _steps, 1, BATCH)
def _row_ring_head(cache, rows, at):
    cache[torch.arange(rows.shape[0]), 0, at % cache.shape[2]] = rows.squeeze(1)


@_one_head("prefix", nowhere, SEQ, BATCH)
def _prefix_head(cache, rows):
    cache[: rows.shape[0], :, : rows.shape[1]] = rows[:, None]


@_one_head("span of all", nowhere, SEQ)
def _span_head(cache, rows):
    cache.narrow(2, 1, rows.shape[1]).copy_(rows.unsqueeze(1))


# ---- pages: slots count through them -----------------------------------------------------------

PAGES: dict[str, Write] = {}


def _paged(name: str, where: Any = some_slots) -> Any:
    def register(fn: Any) -> Any:
        PAGES[name] = Write(fn, (TOKENS,), (3, 4), where)
        return fn

    return register


@_paged("view")
def _through_view(cache, rows, slots):
    cache.view(-1, cache.shape[-1])[slots] = rows


@_paged("flatten")
def _through_flatten(cache, rows, slots):
    cache.flatten(0, 1).index_copy_(0, slots, rows)


@_paged("from the end", lambda d, *_: (torch.tensor([3, -1, 0, -4, 5]),))
def _from_the_end(cache, rows, slots):
    cache.view(12, -1)[slots] = rows


@_paged("span over pages", nowhere)
def _span_of_pages(cache, rows):
    cache.view(-1, cache.shape[-1])[2 : 2 + rows.shape[0]] = rows


@_paged("scatter")
def _scatter_pages(cache, rows, slots):
    cache.view(-1, rows.shape[-1]).scatter_(0, slots[:, None].expand_as(rows), rows)


@_paged("rows used, cache read after")
def _used_pages(cache, rows, slots):
    cache.view(-1, cache.shape[-1])[slots] = rows
    return rows * 2, cache[0].float().sum()
