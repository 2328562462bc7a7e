"""The attention of ``_flash`` for Hopper, in Gluon: 16-bit heads of 512 lanes.

Arguments and math are those of ``attention_kernel``. Triton's pipeline waits for a tile of keys
before it multiplies anything, and 227 KiB do not hold the third tile with which it would not. Here
four warps load one tile while eight multiply the other: two warpgroups, each of half the keys in
the first product and of half the lanes in the second. There are as many programs as SMs, so that
the loads of a part of the work are on their way while the part before it is finished.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._common import long, narrow
from ._flash import _logits, _share, _weights
from ._flash_producer import (
    EMPTY,
    KEYS,
    Q_READ,
    ROWS,
    D,
    Shared,
    Work,
    near_tiles,
    piece,
    pieces,
    place,
    produce,
    rows_of,
    tiles_of,
)
from ._gluon import barrier

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
ROW = gl.constexpr(gl.SliceLayout(1, SCORES))
COLUMN = gl.constexpr(gl.SliceLayout(0, SCORES))
# A value of each half of a tile's keys, for each row, in the threads of the row.
BOTH = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [0, 0]], [],
    [64, 2],
))  # fmt: skip
STORED = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PAIRS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


class Math(NamedTuple):
    """How logits and weights are made, as in ``attention_kernel``."""

    SCALE: Any
    FILL: Any
    MASK: Any
    P: Any
    C: Any
    M: Any
    WIDE: Any
    NAN_EMPTY: Any


@gluon.jit
def _halves(x):
    """A warpgroup has half of a tile's keys: a reduction of that half crosses no warps."""
    return gl.reshape(x, [ROWS, 2, KEYS // 2])


@gluon.jit
def _as(x, LAYOUT: gl.constexpr):
    """The same rows in the same threads."""
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def _scores(s, k):
    """Queries times keys."""
    z = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    z = warpgroup_mma(s.q, k.permute([1, 0]), z, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[z])


@gluon.jit
def _masked(s, slot, part, work, MASK: gl.constexpr, mask_ptr, m_sb, m_ss, m_st):
    """The mask's values for a tile, and which keys there are."""
    row = s.row.index(slot).load(COLUMN)
    inside = (row >= 0)[None, :]
    x = 0.0
    if work.EARLY:
        x = s.mask.index(slot).load(COLUMN)[None, :]
    elif MASK:  # several tokens: there are near keys only, whose rows are the mask's columns
        _, b, first = place(part, work)
        token = first + gl.arange(0, ROWS, ROW) // work.WIDTH
        inside = inside & (token < work.length)[:, None]
        at = mask_ptr + b * m_sb + (token * m_ss)[:, None] + (long(row) * m_st)[None, :]
        x = gl.load(at, mask=inside, other=0)
    return x, inside


@gluon.jit
def _tile(s, slot, x, inside, last, m, den, acc, math):
    """One tile of keys into (maximum, denominator, accumulator)."""
    dtype: gl.constexpr = s.q.dtype
    z = _scores(s, s.k.index(slot))
    z = _logits(z, x, inside, math.SCALE, math.FILL, math.MASK, math.P, math.C, math.M, dtype)
    s.halves.store(gl.max(_halves(z), 2))
    barrier()
    top = gl.maximum(m, _as(gl.max(s.halves.load(BOTH), 1), ROW))
    p, decay = _weights(z, top, m)
    den = den * _as(decay, gl.SliceLayout(1, den.type.layout))[:, None] + gl.sum(_halves(p), 2)
    high = narrow(p, dtype)
    s.weights.store(high)
    if math.WIDE:
        s.rest.store(narrow(p - high.to(gl.float32), dtype))
    acc = acc * _as(decay, gl.SliceLayout(1, SUMS))[:, None]
    if last:
        mbarrier.arrive(s.bars.index(Q_READ), count=1)
    fence_async_shared()
    barrier()
    acc = warpgroup_mma(s.weights, s.k.index(slot), acc, is_async=True)
    if math.WIDE:
        acc = warpgroup_mma(s.rest, s.k.index(slot), acc, is_async=True)
    return top, den, warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _store_split(s, slot, acc, m, den, part, split, work, part_ptr, stat_ptr):
    """The accumulator in fp32, maximum and denominator: ``merge_kernel`` joins those of all."""
    barrier()
    mbarrier.arrive(s.bars.index(EMPTY + slot), count=1)
    at = (long(split) * work.parts + part) * ROWS
    _, live = rows_of(part, work, 0, 0, 0, SUMS)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    d = gl.arange(0, D, gl.SliceLayout(0, SUMS))
    gl.store((part_ptr + at * D) + (row * D)[:, None] + d[None, :], acc, mask=live[:, None])
    row = gl.arange(0, ROWS, ROW)
    gl.store(stat_ptr + at * 2 + row * 2, m)
    gl.store(stat_ptr + at * 2 + row * 2 + 1, den)


@gluon.jit
def _store(s, slot, acc, share, part, work, out_ptr, o_sb, o_ss, o_sh):
    """The output, through the tile of keys that was multiplied last."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    layout: gl.constexpr = STORED if dtype == s.q.dtype else SUMS
    y = narrow(acc * _as(share, gl.SliceLayout(1, SUMS))[:, None], dtype)
    if dtype == s.q.dtype:
        s.k.index(slot).store(y)
        y = s.k.index(slot).load(STORED)
    barrier()
    mbarrier.arrive(s.bars.index(EMPTY + slot), count=1)
    at, live = rows_of(part, work, o_sb, o_ss, o_sh, layout)
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    gl.store((out_ptr + at)[:, None] + d[None, :], y, mask=live[:, None])


@gluon.jit
def _consume(
    s, work, math, mask_ptr, sink_ptr, out_ptr, part_ptr, stat_ptr, m_sb, m_ss, m_st, sink_sh, o_sb,
    o_ss, o_sh,
):  # fmt: skip
    """Eight warps: products, softmax and output, part after part."""
    c = gl.program_id(0) * 0
    part, _ = piece(gl.program_id(0), work)
    tiles = near_tiles(part, work)
    for done in range(gl.program_id(0), pieces(work), gl.num_programs(0)):
        part, split = piece(done, work)
        lo, hi = tiles_of(split, tiles, work)
        after, _ = piece(gl.minimum(done + gl.num_programs(0), pieces(work) - 1), work)
        tiles = near_tiles(after, work)
        sink_at, live = rows_of(part, work, 0, 0, sink_sh, SCORES)
        sink = gl.load(sink_ptr + sink_at, mask=live, other=0.0).to(gl.float32)
        m = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        den = gl.sum(_halves(gl.zeros([ROWS, KEYS], gl.float32, SCORES)), 2)
        acc = gl.zeros([ROWS, D], gl.float32, SUMS)
        for j in range(lo, hi):
            slot = c & 1
            mbarrier.wait(s.bars.index(slot), c >> 1 & 1)
            fence_async_shared()
            x, inside = _masked(s, slot, part, work, math.MASK, mask_ptr, m_sb, m_ss, m_st)
            m, den, acc = _tile(s, slot, x, inside, j == hi - 1, m, den, acc, math)
            barrier()
            if j < hi - 1:
                mbarrier.arrive(s.bars.index(EMPTY + slot), count=1)
            c += 1
        s.halves.store(den)
        barrier()
        total = _as(gl.sum(s.halves.load(BOTH), 1), ROW)
        if work.SPLIT:
            _store_split(s, (c - 1) & 1, acc, m, total, part, split, work, part_ptr, stat_ptr)
        else:
            share = _share(m, total, sink, math.NAN_EMPTY)
            _store(s, (c - 1) & 1, acc, share, part, work, out_ptr, o_sb, o_ss, o_sh)


# Neither a count of tokens or keys nor a stride that follows one may recompile the kernel.
@gluon.jit(do_not_specialize=(
    "length", "blocks", "near", "far", "rows", "pages", "most", "parts", "splits", "m_sb", "m_ss",
    "i_sb", "i_ss", "p_sb", "p_ss",
))  # fmt: skip
def hopper_attention_kernel(
    q_ptr, kv_ptr, far_ptr, index_ptr, page_ptr, mask_ptr, sink_ptr, out_ptr, part_ptr, stat_ptr,
    tiles_ptr, count_ptr, length, blocks, near, far, rows, pages, most, parts, splits,
    q_sb, q_ss, q_sh, kv_sb, kv_ss, kv_st, far_sb, far_st, i_sb, i_ss, i_sk, p_sb, p_ss,
    m_sb, m_ss, m_st, sink_sh, o_sb, o_ss, o_sh,
    HEADS: gl.constexpr, TOKENS: gl.constexpr, WIDTH: gl.constexpr, NEAR: gl.constexpr,
    FAR: gl.constexpr, PAGED: gl.constexpr, WRAP: gl.constexpr, SPLIT: gl.constexpr,
    LIST: gl.constexpr, SCALE: gl.constexpr, FILL: gl.constexpr, MASK: gl.constexpr,
    P: gl.constexpr, C: gl.constexpr, M: gl.constexpr, WIDE: gl.constexpr, NAN_EMPTY: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """``parts`` × ``splits`` of the work; REGISTERS: of a thread that loads."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    weights = gl.allocate_shared_memory(dtype, [ROWS, KEYS], TILE)
    s = Shared(
        gl.allocate_shared_memory(dtype, [ROWS, D], TILE),
        gl.allocate_shared_memory(dtype, [2, KEYS, D], TILE),
        gl.allocate_shared_memory(gl.int32, [2, KEYS], FLAT),
        gl.allocate_shared_memory(gl.float32, [2, KEYS], FLAT),
        weights,
        gl.allocate_shared_memory(dtype, [ROWS, KEYS], TILE) if WIDE else weights,
        gl.allocate_shared_memory(gl.float32, [ROWS, 2], PAIRS),
        gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(5):
        mbarrier.init(s.bars.index(i), count=1)
    early: gl.constexpr = MASK if TOKENS == 1 else 0
    # Assigned to a name, the constants among these would be values.
    gl.warp_specialize([
        (_consume, (
            s,
            Work(length, blocks, near, far, parts, splits, count_ptr, HEADS, TOKENS, WIDTH, NEAR,
                 FAR, LIST, SPLIT, early),
            Math(SCALE, FILL, MASK, P, C, M, WIDE, NAN_EMPTY),
            mask_ptr, sink_ptr, out_ptr, part_ptr, stat_ptr, m_sb, m_ss, m_st, sink_sh, o_sb, o_ss,
            o_sh,
        )),
        (produce, (
            s,
            Work(length, blocks, near, far, parts, splits, count_ptr, HEADS, TOKENS, WIDTH, NEAR,
                 FAR, LIST, SPLIT, early),
            q_ptr, kv_ptr, far_ptr, index_ptr, page_ptr, mask_ptr, tiles_ptr, rows, pages, most,
            q_sb, q_ss, q_sh, kv_sb, kv_ss, kv_st, far_sb, far_st, i_sb, i_ss, i_sk, p_sb, p_ss,
            m_sb, m_ss, m_st, PAGED, WRAP,
        )),
    ], [4], [REGISTERS])  # fmt: skip
