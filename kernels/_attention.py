"""Launching the attention kernels (``_flash``): what is tiled, listed, split, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import _common as common
from ._common import cdiv
from ._flash import BARRED, attention_kernel, live_tiles_kernel, merge_kernel
from ._launch import wrap_triton

MASKS = {"add": 1, "allowed": 2, "hidden": 3}


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


@dataclass(frozen=True)
class Mask:
    """Who sees which key ``[B or 1, S or 1, T]``; fill: the logit of a hidden key (bool masks)."""

    tensor: Tensor
    kind: str
    fill: float = -math.inf


def shape_for(queries: int | torch.SymInt, keys: int | torch.SymInt) -> Shape:
    """The launch shape for so many queries (batch × sequence) of so many keys each."""
    count = common.size_hint(queries) * common.size_hint(cdiv(keys, 64))
    return next(shape for bound, shape in SHAPES if bound is None or count <= bound)


def tiling(rows: int, heads: int, own_keys: bool) -> tuple[int, int]:
    """(tokens, heads) per program: ``rows`` where a token's keys may be another's too."""
    width = min(rows, triton.next_power_of_2(heads))
    return (1 if own_keys else rows // width), max(width, 16) if own_keys else width


def splits_for(programs: int | torch.SymInt, tiles: int | torch.SymInt) -> int:
    """Into how many parts the keys of one program are split to occupy the GPU."""
    return max(1, min(PROGRAMS // max(1, common.size_hint(programs)), common.size_hint(tiles), 64))


@dataclass(frozen=True)
class Keys:
    """kv ``[B,G,T,D]`` in a row, then far ``[P,N,D]`` by index ``[B,S,K]`` and page ``[B,S]``; any
    may be None, any axis of B or S may be 1. wrap: a negative index counts from the end."""

    kv: Tensor | None
    far: Tensor | None = None
    index: Tensor | None = None
    page: Tensor | None = None
    wrap: bool = False

    @property
    def own(self) -> bool:
        """Has each query keys of its own?"""
        return self.index is not None or (self.kv is not None and not same(self.kv.shape[1], 1))

    @property
    def near(self) -> int:
        return 0 if self.kv is None else self.kv.shape[2]

    def arguments(self, q: Tensor) -> dict[str, Any]:
        """As the kernel takes them; q stands for a tensor that is absent."""
        kv, far, index, page = self.kv, self.far, self.index, self.page
        return dict(
            kv_ptr=_or(kv, q), far_ptr=_or(far, q), index_ptr=_or(index, q), page_ptr=_or(page, q),
            near=self.near, far=0 if index is None else index.shape[2],
            rows=0 if far is None else far.shape[1],
            pages=q.shape[0] if far is None or page is None else far.shape[0],
            **_strides(kv, "kv", "bst"), **_strides(far, "far", "bt"),
            **_strides(index, "i", "bsk"), **_strides(page, "p", "bs"),
            NEAR=kv is not None, FAR=index is not None, PAGED=page is not None, WRAP=self.wrap,
        )  # fmt: skip


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
    blocks, tiles = cdiv(length, tokens), cdiv(keys.near, shape.block)
    programs = batch * blocks * cdiv(heads, width)
    splits = splits_for(programs, tiles + cdiv(count, shape.block))
    lanes, step = max(16, triton.next_power_of_2(d)), 128
    shared = dict(
        sink_ptr=sinks, length=length, blocks=blocks, sink_sh=sinks.stride(0), HEADS=heads,
        TOKENS=tokens,
    )  # fmt: skip
    place = dict(out_ptr=out, **_strides(out, "o", "bsh"), WIDTH=width, D=d, LANES=lanes,
                 NAN_EMPTY=nan_empty)  # fmt: skip
    masked = dict(mask_ptr=mask.tensor if mask else q, MASK=MASKS[mask.kind] if mask else 0,
                  most=tiles, **_strides(mask.tensor if mask else None, "m", "bst"))  # fmt: skip
    listed = keys.kv is not None and worth_listing(mask, nan_empty, batch * blocks, tiles)
    numbers = _list(batch * blocks, keys.near, tiles, shape, shared | masked) if listed else (q, q)
    parts = (q, q)
    if splits > 1:
        rows = splits * programs * tokens * width
        parts = tuple(q.new_empty((rows, n), dtype=torch.float32) for n in (lanes, 2))
    _run(attention_kernel, (programs, splits))(
        q_ptr=q, **_strides(q, "q", "bsh"), **keys.arguments(q), **shared, **place, **masked,
        part_ptr=parts[0], stat_ptr=parts[1], tiles_ptr=numbers[0], count_ptr=numbers[1],
        BLOCK=shape.block, SPLIT=splits > 1, LIST=listed, SCALE=scale,
        FILL=0.0 if mask is None or mask.fill == -math.inf else mask.fill, P="p" in rounded,
        C="s" in rounded, M="m" in rounded, WIDE=wide, num_warps=shape.warps,
        num_stages=shape.stages,
    )  # fmt: skip
    if splits > 1:
        step = min(lanes, step)
        _run(merge_kernel, (programs * tokens * width, lanes // step))(
            part_ptr=parts[0], stat_ptr=parts[1], splits=splits, **shared, **place, STEP=step,
            MOST=triton.next_power_of_2(splits), num_warps=2,
        )  # fmt: skip


def _run(kernel: Any, grid: tuple[Any, ...]) -> Any:
    return wrap_triton(kernel)[grid]


def _list(
    blocks: int | torch.SymInt, near: int | torch.SymInt, tiles: int | torch.SymInt, shape: Shape,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The live tiles of each block of tokens, ``[B · blocks, tiles]``, and their counts."""
    sinks = arguments["sink_ptr"]
    numbers = sinks.new_empty((blocks, tiles), dtype=torch.int32)
    counts = sinks.new_empty((blocks,), dtype=torch.int32)
    _run(live_tiles_kernel, (blocks,))(
        **arguments, tiles_ptr=numbers, count_ptr=counts, keys=near, BLOCK=shape.block,
        HLANES=triton.next_power_of_2(arguments["HEADS"]), CHUNK=2048 // shape.block, num_warps=4,
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


def same(size: int | torch.SymInt, value: int) -> bool:
    """Known to be the value, without a guard."""
    return not isinstance(size, torch.SymInt) and size == value


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    return other if t is None else t


def _strides(t: Tensor | None, name: str, axes: str) -> dict[str, int]:
    """``name_s?`` of each leading axis: 0 along one of size one, and for no tensor."""
    steps = [0] * len(axes) if t is None else t.stride()
    sizes = [1] * len(axes) if t is None else t.shape
    return {f"{name}_s{a}": 0 if same(n, 1) else s
            for a, s, n in zip(axes, steps, sizes, strict=False)}  # fmt: skip
