"""Writes that are not matched, and edits that break those that are."""

from __future__ import annotations

import torch

from ._writes import BATCH, RING, SEQ, SLOTS, TOKENS, Write, nowhere, some_slots

MISSES: dict[str, tuple[Write, str]] = {}
MUTANTS: dict[str, tuple[Write, str]] = {}  # with the spelling that each is one edit away from


def _one_hot(cache, rows, slots):
    hot = torch.nn.functional.one_hot(slots, SLOTS).to(rows.dtype)
    cache.copy_(torch.where(hot.sum(0)[:, None] > 0, hot.t() @ rows, cache))


MISSES["one hot"] = (Write(_one_hot, (TOKENS,), (SLOTS,), some_slots), "a product, not a write")


# ---- mutants: (write, the spelling it is one edit away from) -----------------------------------


def _shifted_value(cache, rows, slots):
    cache[slots] = rows.roll(1, -1)


def _scaled_value(cache, rows, slots):
    cache[slots] = rows * 0.5


def _accumulated(cache, rows, slots):
    cache.index_put_((slots,), rows, accumulate=True)


def _added(cache, rows, slots):
    cache[slots] += rows


def _read_between(cache, rows, slots):
    old = cache.clone()
    cache[slots] = rows
    return (old - cache).float().abs().sum(-1)


def _two_writes(cache, rows, slots):
    cache[slots] = rows
    cache[slots.flip(0)] = rows


def _overwritten(cache, rows, slots):
    cache[slots] = rows
    cache[2:4] = 1.0


def _written_before(cache, rows, slots):
    cache[2:4] = 1.0
    cache[slots] = rows


def _other_lanes(cache, rows, slots):
    cache[slots, :16] = rows[:, 16:32]


def _every_second(cache, rows):
    cache[::2][:TOKENS] = rows


def _doubled(cache, rows, slots):
    cache[slots] = rows
    cache.mul_(2)


def _scattered_lanes(cache, rows, slots):
    """A column of its own for each lane: no row is written as one."""
    cache.scatter_(0, slots[:, None].expand(-1, rows.shape[-1]).roll(1, -1), rows.roll(1, 0))


def _scattered_on_top(cache, rows, slots):
    cache.scatter_add_(0, slots[:, None].expand(-1, rows.shape[-1]), rows)


def _pieces_overlap(cache, rows):
    cache[:BATCH, 2:5] = rows[:, :3]
    cache[:BATCH, 4:6] = rows[:, 3:]


def _a_row_left_out(cache, rows):
    cache[:BATCH, 2:4] = rows[:, :2]
    cache[:BATCH, :2] = rows[:, 3:]


def _a_row_twice(cache, rows):
    cache[:BATCH, 2:6] = rows[:, :4]
    cache[:BATCH, :2] = rows[:, 3:]


def _one_changed(cache, rows):
    cache[:BATCH, 2:5] = rows[:, :3]
    cache[:BATCH, :2] = rows[:, 3:] * 0.5


def _other_sequences(cache, rows):
    cache[:BATCH, 2:5] = rows[:, :3]
    cache[1:, :2] = rows[:, 3:]


def _one_sequence(cache, rows):
    cache[0, 2:5] = rows[0, :3]
    cache[0, :2] = rows[0, 3:]


def _the_same_pieces_again(cache, rows):
    cache[:BATCH, :SEQ] = rows
    cache[:BATCH, :SEQ] = rows * 2


def _for_two_sequences(cache, rows):
    cache[:2, 2 : 2 + SEQ] = rows.expand(2, -1, -1)


for _name, _fn, _like in (
    ("one sequence written twice", _the_same_pieces_again, "prefix"),
    ("one sequence for two", _for_two_sequences, "span"),
):
    MUTANTS[_name] = (Write(_fn, (1, SEQ), (3, RING), nowhere), f"{_like}, one sequence")
for _name, _fn in {
    "pieces of the first sequence": _one_sequence,
    "pieces that overlap": _pieces_overlap,
    "a row left out": _a_row_left_out,
    "a row written twice": _a_row_twice,
    "one piece scaled": _one_changed,
    "pieces of other sequences": _other_sequences,
}.items():
    MUTANTS[_name] = (Write(_fn, (BATCH, SEQ), (3, RING), nowhere), "ring in two pieces")


for _name, _fn in {
    "scattered with the next row": _scattered_lanes,
    "scattered on top": _scattered_on_top,
    "value rotated": _shifted_value,
    "value scaled": _scaled_value,
    "accumulated": _accumulated,
    "added": _added,
    "written twice": _two_writes,
    "overwritten": _overwritten,
    "written before": _written_before,
    "other lanes": _other_lanes,
    "cache changed after": _doubled,
}.items():
    MUTANTS[_name] = (Write(_fn, (TOKENS,), (SLOTS,), some_slots), "slots")


def _two_heads(cache, rows, slots):
    cache[:, :, slots] = rows.unsqueeze(1)


def _second_head(cache, rows, slots):
    cache[:, 1].index_copy_(1, slots, rows)


def _some_places(draw, rows, cache):
    return (draw.permutation(RING)[: rows[1]],)


for _name, _fn in {"two heads": _two_heads, "the second head of two": _second_head}.items():
    MUTANTS[_name] = (
        Write(_fn, (3, SEQ), (3, 2, RING), _some_places), "one head, slots shared by all"
    )  # fmt: skip
MUTANTS["every second row"] = (
    Write(_every_second, (TOKENS,), (SLOTS,), nowhere),
    "slice from the start",
)
