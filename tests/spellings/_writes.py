"""Writes of rows to a cache as people write them, and edits that break them.

``write(cache, rows, *where)`` returns what the function around it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ._case import Draw

TOKENS, SLOTS = 5, 11  # rows and places of a flat cache
BATCH, SEQ, RING = 2, 5, 8  # of one ring per sequence


@dataclass(frozen=True)
class Write:
    fn: Callable[..., Any]
    rows: tuple[int, ...]  # shape of the rows in front of the lanes
    cache: tuple[int, ...]
    where: Callable[[Draw], tuple[Any, ...]]


def some_slots(draw: Draw) -> tuple[Any, ...]:
    return (draw.permutation(SLOTS)[:TOKENS],)


def _positions(draw: Draw) -> tuple[Any, ...]:
    return (torch.arange(17, 17 + TOKENS),)


def nowhere(draw: Draw) -> tuple[Any, ...]:
    return ()


FLAT: dict[str, Write] = {}
DECODE: dict[str, Write] = {}
PREFILL: dict[str, Write] = {}


def _flat(name: str, where: Any = some_slots, rows: int = TOKENS, slots: int = SLOTS) -> Any:
    def register(fn: Any) -> Any:
        FLAT[name] = Write(fn, (rows,), (slots,), where)
        return fn

    return register


@_flat("slots")
def _by_slots(cache, rows, slots):
    cache[slots] = rows


@_flat("slots, int32", lambda d: (d.permutation(SLOTS)[:TOKENS].int(),))
def _by_slots_int32(cache, rows, slots):
    cache[slots] = rows


@_flat("slots that wrap around", lambda d: (torch.tensor([3, -1, 0, -4, 5]),))
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
    cache[positions % SLOTS] = rows


@_flat("ring by remainder", _positions)
def _remainder(cache, rows, positions):
    cache[torch.remainder(positions, SLOTS)] = rows


@_flat("padding to a spare row", lambda d: (torch.tensor([3, 1, 0, 4, -1]),))
def _spare(cache, rows, slots):
    cache[torch.where(slots < 0, SLOTS - 1, slots)] = rows


@_flat("slice", nowhere)
def _slice(cache, rows):
    cache[2 : 2 + TOKENS] = rows


@_flat("slice from the start", nowhere)
def _first(cache, rows):
    cache[:TOKENS].copy_(rows)


@_flat("narrow", nowhere)
def _narrow(cache, rows):
    cache.narrow(0, 3, TOKENS).copy_(rows)


@_flat("slice of a start", lambda d: (4,))
def _from_start(cache, rows, start):
    cache[start : start + rows.shape[0]] = rows


@_flat("the whole cache", nowhere, slots=TOKENS)
def _whole(cache, rows):
    cache.copy_(rows)


@_flat("one row", nowhere, rows=1)
def _one(cache, rows):
    cache[3] = rows[0]


@_flat("one row by select", nowhere, rows=1)
def _one_select(cache, rows):
    cache.select(0, 3).copy_(rows.squeeze(0))


@_flat("one row from the end", nowhere, rows=1)
def _last(cache, rows):
    cache[-1] = rows.squeeze(0)


@_flat("scatter")
def _scatter(cache, rows, slots):
    cache.scatter_(0, slots[:, None].expand(-1, rows.shape[-1]), rows)


@_flat("scatter, expanded like the rows")
def _scatter_as(cache, rows, slots):
    cache.scatter_(0, slots.unsqueeze(-1).expand_as(rows), rows)


# ---- a ring per sequence -----------------------------------------------------------------------


def _rows(table: dict[str, Write], name: str, length: int, where: Any, batch: int = BATCH) -> Any:
    def register(fn: Any) -> Any:
        table[name] = Write(fn, (batch, length), (3, RING), where)
        return fn

    return register


def _steps(draw: Draw) -> tuple[Any, ...]:
    return (torch.tensor([13, 6]),)


@_rows(DECODE, "row and ring", 1, _steps)
def _row_ring(cache, rows, at):
    cache[torch.arange(BATCH), at % RING] = rows.squeeze(1)


@_rows(DECODE, "row and ring, unsqueezed", 1, _steps)
def _row_ring_2d(cache, rows, at):
    cache[torch.arange(BATCH).unsqueeze(1), (at % RING).unsqueeze(1)] = rows


@_rows(DECODE, "batch rows and ring", 1, lambda d: (torch.tensor([13, 6]), torch.tensor([2, 0])))
def _batch_rows(cache, rows, at, batch):
    cache[batch, at % RING] = rows[:, 0]


@_rows(DECODE, "reference, int position", 1, lambda d: (13,))
def _reference_int(cache, rows, at):
    cache[:BATCH, at % RING] = rows.squeeze(1)


@_rows(DECODE, "reference, tensor position", 1, lambda d: (torch.tensor([13]),))
def _reference_tensor(cache, rows, at):
    cache[:BATCH, at % RING] = rows


@_rows(DECODE, "select and copy", 1, nowhere, batch=3)
def _select(cache, rows):
    cache.select(1, 5).copy_(rows.squeeze(1))


def _table(draw: Draw) -> tuple[Any, ...]:
    return (torch.arange(SEQ) + torch.tensor([[3], [9]]),)


@_rows(PREFILL, "rows and ring", SEQ, _table)
def _rows_ring(cache, rows, at):
    cache[torch.arange(BATCH)[:, None], at % RING] = rows


@_rows(PREFILL, "rows and ring, put", SEQ, _table)
def _rows_put(cache, rows, at):
    batch = torch.arange(BATCH).unsqueeze(1).expand(-1, SEQ)
    cache.index_put_((batch, at % RING), rows)


@_rows(PREFILL, "prefix", SEQ, nowhere)
def _prefix(cache, rows):
    cache[: rows.shape[0], : rows.shape[1]] = rows


@_rows(PREFILL, "span", SEQ, nowhere)
def _span(cache, rows):
    cache[:BATCH, 2 : 2 + SEQ] = rows


@_rows(PREFILL, "span of all", SEQ, nowhere, batch=3)
def _span_of_all(cache, rows):
    cache[:, 1 : 1 + SEQ].copy_(rows)


@_rows(PREFILL, "narrow of all", SEQ, nowhere, batch=3)
def _narrow_all(cache, rows):
    cache.narrow(1, 1, SEQ).copy_(rows)


@_rows(PREFILL, "slots shared by all", SEQ, lambda d: (d.permutation(RING)[:SEQ],), batch=3)
def _shared(cache, rows, slots):
    cache[:, slots] = rows


@_rows(PREFILL, "index_copy along the ring", SEQ, lambda d: (d.permutation(RING)[:SEQ],), batch=3)
def _copy_ring(cache, rows, slots):
    cache.index_copy_(1, slots, rows)


@_rows(PREFILL, "ring in two pieces", SEQ, nowhere)
def _split_ring(cache, rows):
    cache[:BATCH, 2:5], cache[:BATCH, :2] = rows.split([3, 2], dim=1)


@_rows(PREFILL, "ring in two pieces, the last rows", SEQ + 6, nowhere)
def _last_rows(cache, rows):
    length = rows.shape[1]
    cut = length % RING
    last = rows[:, -RING:]
    cache[:BATCH, cut:RING], cache[:BATCH, :cut] = last.split([RING - cut, cut], dim=1)


@_rows(PREFILL, "ring in two pieces, by slices", SEQ, nowhere, batch=3)
def _two_slices(cache, rows):
    cache[:, :2] = rows[:, 3:]
    cache[:, 5:].copy_(rows[:, :3])


@_rows(PREFILL, "scatter along the ring", SEQ, _table, batch=3)
def _scatter_ring(cache, rows, at):
    index = (at[:1] + torch.arange(3)[:, None]) % RING
    cache.scatter_(1, index[..., None].expand_as(rows), rows)


def _pages(cache, rows, slots):
    cache[slots // 4, slots % 4] = rows


PREFILL["pages"] = Write(_pages, (TOKENS,), (3, 4), some_slots)


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


@_paged("from the end", lambda d: (torch.tensor([3, -1, 0, -4, 5]),))
def _from_the_end(cache, rows, slots):
    cache.view(12, -1)[slots] = rows


@_paged("span over pages", nowhere)
def _span_of_pages(cache, rows):
    cache.view(-1, cache.shape[-1])[2 : 2 + TOKENS] = rows


@_paged("scatter")
def _scatter_pages(cache, rows, slots):
    cache.view(-1, rows.shape[-1]).scatter_(0, slots[:, None].expand_as(rows), rows)


@_paged("rows used, cache read after")
def _used_pages(cache, rows, slots):
    cache.view(-1, cache.shape[-1])[slots] = rows
    return rows * 2, cache[0].float().sum()
