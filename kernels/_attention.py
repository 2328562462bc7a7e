"""Launching the attention kernels (``_flash``): what is tiled, listed, split, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import _common as common
from . import _flash_hopper_op as hopper
from ._common import cdiv
from ._flash import BARRED, attention_kernel, live_tiles_kernel, merge_kernel
from ._flash_arguments import MASKS, Keys, Mask, arguments, live_tiles  # noqa: F401
from ._launch import wrap_triton


@dataclass(frozen=True)
class Shape:
    """A launch shape: keys per tile, warps, stages of the loads' pipeline; rows of a program, which
    are heads of one query, or of several where that many heads are not there."""

    block: int
    warps: int
    stages: int
    rows: int = 64


# By the count of tiles of 64 keys that all queries read. Few are latency: a query's heads in four
# programs. Beyond that 64 rows share a tile; Hopper's 227 KiB hold them and two tiles of 64 keys.
SHAPES: tuple[tuple[int | None, Shape], ...] = (
    (40, Shape(block=32, warps=4, stages=2, rows=16)),
    (None, Shape(block=64, warps=8, stages=2)),
)
LISTED = (32, 8)  # from so many blocks of tokens and tiles on, the live tiles are listed first
PROGRAMS = 132  # SMs of the GPU that was measured: fewer programs than that split their keys
# What it costs to join splits, in tiles that a program goes through meanwhile: the launch, and the
# fp32 sums of 64 rows, which are written and read.
JOIN, SUMS = 1.4, 0.03


def shape_for(queries: int | torch.SymInt, keys: int | torch.SymInt) -> Shape:
    """The launch shape for so many queries (batch × sequence) of so many keys each."""
    count = common.size_hint(queries) * common.size_hint(cdiv(keys, 64))
    return next(shape for bound, shape in SHAPES if bound is None or count <= bound)


def tiling(rows: int, heads: int, own_keys: bool) -> tuple[int, int]:
    """(tokens, heads) per program: ``rows`` where a token's keys may be another's too."""
    width = min(rows, triton.next_power_of_2(heads))
    return (1 if own_keys else rows // width), max(width, 16) if own_keys else width


def splits_for(programs: int | torch.SymInt, tiles: int | torch.SymInt, rows: int = 64) -> int:
    """Into how many parts the keys of one program of so many rows are split to occupy the GPU."""
    count, programs = max(1, common.size_hint(tiles)), max(1, common.size_hint(programs))
    most = max(1, min(PROGRAMS // programs, count, 64))

    def cost(splits: int) -> float:
        joined = JOIN + SUMS * rows / 64 * programs * splits if splits > 1 else 0.0
        return cdiv(count, splits) + joined

    return min(range(1, most + 1), key=cost)


def launch(
    q: Tensor, keys: Keys, mask: Mask | None, sinks: Tensor, out: Tensor, *, scale: float,
    rounded: str, wide: bool, nan_empty: bool,
) -> None:  # fmt: skip
    """q and out ``[B,S,H,D]``, sinks ``[H]``; the rest as the ops' docstrings have it."""
    batch, length, heads, d = q.shape
    common.require_static(head_dim=d, heads=heads)
    count = 0 if keys.index is None else keys.index.shape[2]
    shape = shape_for(batch * length, keys.near + count)
    tokens, width = tiling(shape.rows, heads, keys.own)
    blocks, tiles = batch * cdiv(length, tokens), cdiv(keys.near, shape.block)
    programs = blocks * cdiv(heads, width)
    live = min(heads, width) * min(tokens, common.size_hint(length))
    splits = splits_for(programs, tiles + cdiv(count, shape.block), live)
    rows = shape.rows if keys.own else tokens * width  # few heads: the others' rows stay empty
    on_hopper = hopper.takes(q, keys, rows, shape.block, splits, live)
    width = rows // tokens if on_hopper else width  # wider: as many programs
    how = dict(scale=scale, rounded=rounded, wide=wide, nan_empty=nan_empty, tokens=tokens,
               width=width)  # fmt: skip
    shared = arguments(q, keys, mask, sinks, out, **how) | dict(most=tiles)
    listed = keys.kv is not None and worth_listing(mask, nan_empty, blocks, tiles)
    numbers = _list(blocks, tiles, shape, shared) if listed else None
    lanes = max(16, triton.next_power_of_2(d))
    parts = _parts(q, splits * programs * tokens * width, lanes) if splits > 1 else None
    part, stat = parts or (q, q)
    shared |= dict(part_ptr=part, stat_ptr=stat, D=d, LANES=lanes)
    if on_hopper:
        hopper.launch(q, keys, mask, sinks, numbers, out, parts, splits=splits, **how)
    else:
        _run(attention_kernel, (programs, splits))(
            **shared, **live_tiles(numbers, q), BLOCK=shape.block, SPLIT=splits > 1,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    if splits > 1:
        _merge(programs * tokens * width, splits, shared)


def _parts(q: Tensor, rows: int | torch.SymInt, lanes: int) -> tuple[Tensor, Tensor]:
    """What each split leaves of its rows: the accumulators, and the maxima with denominators."""
    part, stat = (q.new_empty((rows, n), dtype=torch.float32) for n in (lanes, 2))
    return part, stat


def _merge(rows: int | torch.SymInt, splits: int, shared: dict[str, Any]) -> None:
    """Joins the splits; a program for each row, or for some where there are thousands."""
    lanes, most = shared["LANES"], triton.next_power_of_2(splits)
    step = min(lanes, max(128, 4096 // most))
    count = common.size_hint(rows)
    each = 4 if count >= 4096 else 2 if count >= 2048 else 1
    _run(merge_kernel, (cdiv(rows, each), lanes // step))(
        **_of(merge_kernel, shared), all_rows=rows, splits=splits, ROWS=each, STEP=step,
        MOST=most, num_warps=4 if step > 256 or most > 32 else 2,  # 64 sums a thread
    )  # fmt: skip


def _run(kernel: Any, grid: tuple[Any, ...]) -> Any:
    return wrap_triton(kernel)[grid]


def _of(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that a kernel has."""
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


def _list(
    blocks: int | torch.SymInt, tiles: int | torch.SymInt, shape: Shape, shared: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The live tiles of each block of tokens, ``[B · blocks, tiles]``, and their counts."""
    sinks = shared["sink_ptr"]
    numbers = sinks.new_empty((blocks, tiles), dtype=torch.int32)
    counts = sinks.new_empty((blocks,), dtype=torch.int32)
    _run(live_tiles_kernel, (blocks,))(
        **_of(live_tiles_kernel, shared), tiles_ptr=numbers, count_ptr=counts, keys=shared["near"],
        BLOCK=shape.block, HLANES=triton.next_power_of_2(shared["HEADS"]),
        CHUNK=2048 // shape.block, num_warps=4,
    )  # fmt: skip
    return numbers, counts


def worth_listing(
    mask: Mask | None, nan_empty: bool, blocks: int | torch.SymInt, tiles: int | torch.SymInt
) -> bool:
    """Skipping is exact only where a hidden key has no weight beside a sink, or is no key."""
    enough = common.size_hint(blocks) >= LISTED[0] and common.size_hint(tiles) >= LISTED[1]
    if mask is None or not enough:
        return False
    if nan_empty:
        return mask.kind != "add" and mask.fill == -math.inf
    return mask.kind == "add" or mask.fill <= BARRED.value
