"""Writes that are not matched, and edits that break those that are."""

from __future__ import annotations

import torch

from ._writes import BATCH, RING, SEQ, SLOTS, TOKENS, Write, nowhere, some_slots

MISSES: dict[str, tuple[Write, str]] = {}
MUTANTS: dict[str, tuple[Write, str]] = {}  # with the spelling that each is one edit away from


def _scatter(cache, rows, slots):
    cache.scatter_(0, slots[:, None].expand(-1, rows.shape[-1]), rows)


def _through_view(cache, rows, slots):
    cache.view(-1, cache.shape[-1])[slots] = rows


def _split_ring(cache, rows):
    cut = 2
    cache[:BATCH, cut : cut + 3], cache[:BATCH, :cut] = rows.split([3, 2], dim=1)


def _one_hot(cache, rows, slots):
    hot = torch.nn.functional.one_hot(slots, SLOTS).to(rows.dtype)
    cache.copy_(torch.where(hot.sum(0)[:, None] > 0, hot.t() @ rows, cache))


MISSES["scatter"] = (
    Write(_scatter, (TOKENS,), (SLOTS,), some_slots),
    "scatter is not read as rows",
)
MISSES["pages through a view"] = (
    Write(_through_view, (TOKENS,), (3, 4), some_slots),
    "the write goes to a view of another shape; the kernel takes pages as [P, N, D] with two "
    "indices",
)
MISSES["ring split in two"] = (
    Write(_split_ring, (BATCH, SEQ), (3, RING), nowhere),
    "the reference's prefill makes two writes of one value; a launch makes one",
)
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


for _name, _fn in {
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
MUTANTS["every second row"] = (
    Write(_every_second, (TOKENS,), (SLOTS,), nowhere),
    "slice from the start",
)
