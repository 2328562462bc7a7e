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
    (64, Shape(block=32, warps=4, stages=2, rows=16)),
    (None, Shape(block=64, warps=8, stages=2)),
)
PROGRAMS = 132  # SMs of the GPU that was measured: fewer programs than that split their keys
LISTED = (32, 8)  # from so many blocks of tokens and tiles on, the live tiles are listed first


def shape_for(queries: int | torch.SymInt, keys: int | torch.SymInt) -> Shape:
    """The launch shape for so many queries (batch × sequence) of so many keys each."""
    count = common.size_hint(queries) * common.size_hint(cdiv(keys, 64))
    return next(shape for bound, shape in SHAPES if bound is None or count <= bound)


def tiling(rows: int, heads: int, own_keys: bool) -> tuple[int, int]:
    """(tokens, heads) per program: ``rows`` where a token's keys may be another's too."""
    width = min(rows, triton.next_power_of_2(heads))
    return (1 if own_keys else rows // width), max(width, 16) if own_keys else width


def splits_for(programs: int | torch.SymInt, tiles: int | torch.SymInt) -> int:
    """Into how many parts the keys of one program are split to occupy the GPU: no more than make
    the longest of them shorter, for each is written and merged."""
    count = max(1, common.size_hint(tiles))
    most = max(1, min(PROGRAMS // max(1, common.size_hint(programs)), count, 64))
    return cdiv(count, cdiv(count, most))


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
    splits = splits_for(programs, tiles + cdiv(count, shape.block))
    how = dict(scale=scale, rounded=rounded, wide=wide, nan_empty=nan_empty, tokens=tokens,
               width=width)  # fmt: skip
    shared = arguments(q, keys, mask, sinks, out, **how) | dict(most=tiles)
    listed = keys.kv is not None and worth_listing(mask, nan_empty, blocks, tiles)
    numbers = _list(blocks, tiles, shape, shared) if listed else None
    rows = shape.rows if keys.own else tokens * width  # few heads: the others' rows stay empty
    if hopper.takes(q, keys, rows, shape.block, splits):
        hopper.launch(q, keys, mask, sinks, numbers, out, **how | {"width": rows // tokens})
        return
    lanes, parts = max(16, triton.next_power_of_2(d)), (q, q)
    if splits > 1:
        rows = splits * programs * tokens * width
        parts = tuple(q.new_empty((rows, n), dtype=torch.float32) for n in (lanes, 2))
    shared |= dict(part_ptr=parts[0], stat_ptr=parts[1], D=d, LANES=lanes)
    _run(attention_kernel, (programs, splits))(
        **shared, **live_tiles(numbers, q), BLOCK=shape.block, SPLIT=splits > 1,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if splits > 1:
        step = min(lanes, 128)
        _run(merge_kernel, (programs * tokens * width, lanes // step))(
            **_of(merge_kernel, shared), splits=splits, STEP=step,
            MOST=triton.next_power_of_2(splits), num_warps=2,
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
