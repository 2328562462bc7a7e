"""The scores of ``_indexer`` for Hopper, in Gluon: 64 heads of 128 lanes, of 16 bits or e4m3.

Math and arguments are those of ``indexer_logits_kernel``, whose warps wait for a product before
they sum its heads. Here two warpgroups take two tokens each through the same tiles of keys, and
while one sums, the other multiplies; four more warps load. They also widen keys in e4m3, by way of
registers. There are as many programs as multiprocessors, so that the first keys of a part of the
work are loaded while the part before it is finished.
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

from ._common import long
from ._gluon import barrier
from ._indexer import SIZES, weighted
from ._indexer_producer import (
    KEYS,
    LINE,
    LOADED,
    SLOTS,
    D,
    Keys,
    Rows,
    Shared,
    Work,
    part_of,
    produce,
)

HEADS, PAIR = gl.constexpr(64), gl.constexpr(2)  # tokens of a warpgroup
COLUMNS = gl.constexpr(128)  # of a product: the heads of a pair
DOTS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
HALVES = gl.constexpr(gl.NVMMASharedLayout(128, 16))
BYTES = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


class Math(NamedTuple):
    """How dots become terms of a sum, as in ``weighted``."""

    SCALE: Any
    SCALE_DOTS: Any
    ROUNDING: Any
    PRECISE: Any


@gluon.jit
def _queries(q, w, b, first, tokens, q_ptr, w_ptr, q_sb, q_st, q_sh, w_sb, w_st, w_sh):
    """Of two tokens, zeros behind the last."""
    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, LOADED))
    token = first + column // HEADS
    lane = gl.arange(0, D, gl.SliceLayout(0, LOADED))
    at = q_ptr + b * q_sb + (long(token) * q_st + long(column % HEADS) * q_sh)[:, None]
    x = gl.load(at + lane[None, :], mask=(token < tokens)[:, None], other=0.0)
    q.store(x.to(q.dtype))
    column = gl.arange(0, COLUMNS, LINE)
    token = first + column // HEADS
    at = w_ptr + b * w_sb + (long(token) * w_st + long(column % HEADS) * w_sh)
    w.store(gl.load(at, mask=token < tokens, other=0.0).to(gl.float32))


@gluon.jit
def _sums(y):
    """Of the heads of each token."""
    return gl.sum(gl.reshape(y, [KEYS, PAIR, HEADS]), 2)


@gluon.jit
def _range(b, token, there, rows):
    """From which key on, and up to which, each token sees them."""
    start, stop = token * 0, token * 0
    if rows.HAS_START:
        at = rows.start_ptr + b * rows.start_sb + token * rows.start_st
        start = long(gl.load(at, mask=there, other=0))
    if rows.HAS_END:
        at = rows.end_ptr + b * rows.end_sb + token * rows.end_st
        stop = long(gl.load(at, mask=there, other=0))
    return start, stop


@gluon.jit
def _consume(s, k, rows, work, math, q_ptr, w_ptr, q_sb, q_st, q_sh, w_sb, w_st, w_sh, pair):
    """Four warps: products and sums of two of each part's tokens."""
    dtype: gl.constexpr = gl.bfloat16 if k.WIDEN else s.k.dtype
    q, w = s.q.index(pair), s.w.index(pair)
    zeros = gl.zeros([KEYS, COLUMNS], gl.float32, DOTS)
    layout: gl.constexpr = _sums(zeros).type.layout
    line = gl.arange(0, KEYS, gl.SliceLayout(1, layout))
    c = gl.program_id(0) * 0
    for done in range(gl.program_id(0), work.parts, gl.num_programs(0)):
        b, first, begin, end, lo, hi = part_of(done, work, k, rows)
        first += pair * PAIR
        barrier()
        if lo < hi:
            _queries(q, w, b, first, rows.tokens, q_ptr, w_ptr, q_sb, q_st, q_sh, w_sb, w_st, w_sh)
        fence_async_shared()
        barrier()
        token = first + gl.arange(0, PAIR, gl.SliceLayout(0, layout))
        there = token < rows.tokens
        token = long(token)
        start, stop = _range(b, token, there, rows)
        out = rows.out_ptr + b * rows.out_sb + token * rows.out_st
        for tile in range(lo, hi):
            slot = c % SLOTS
            key = tile * KEYS + line
            live = key < k.keys
            mbarrier.wait(s.full.index(slot), (c // SLOTS) & 1)
            z = warpgroup_mma(s.k.index(slot), q.permute([1, 0]), zeros, use_acc=False,
                              is_async=True)  # fmt: skip
            scale = gl.full([KEYS], 1.0, gl.float32, gl.SliceLayout(1, layout))
            if k.HAS_KS:  # loaded while the product runs
                scale = gl.load(k.ks_ptr + b * k.ks_sb + key * k.ks_st, mask=live, other=0.0)
            z = warpgroup_mma_wait(0, deps=[z])
            barrier()
            mbarrier.arrive(s.empty.index(slot), count=1)
            y = weighted(z, w.load(gl.SliceLayout(0, DOTS)),
                         gl.convert_layout(scale, gl.SliceLayout(1, DOTS)), dtype, math.SCALE,
                         math.SCALE_DOTS, math.ROUNDING, math.PRECISE)  # fmt: skip
            total = _sums(y)
            if k.HAS_KS and not math.SCALE_DOTS:
                total = total * scale[:, None]
            written = live[:, None] & there[None, :]
            inside = written
            if rows.HAS_START:
                inside = inside & (key[:, None] >= start[None, :])
            if rows.HAS_END:
                inside = inside & (key[:, None] < stop[None, :])
            if rows.CLEAN:
                total = gl.where(inside, total, float("-inf"))
                inside = written
            gl.store(out[None, :] + key[:, None], total.to(out.dtype.element_ty), mask=inside)
            c += 1


@gluon.jit(do_not_specialize=(*SIZES, "parts", "blocks", "spans", "span"))
def hopper_indexer_kernel(
    q_ptr, k_ptr, w_ptr, ks_ptr, start_ptr, end_ptr, out_ptr, tokens, keys, parts, blocks, spans,
    span, q_sb, q_st, q_sh, k_sb, k_st, w_sb, w_st, w_sh, ks_sb, ks_st, start_sb, start_st, end_sb,
    end_st, out_sb, out_st,
    HAS_KS: gl.constexpr, SCALE_DOTS: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr,
    CLEAN: gl.constexpr, SCALE: gl.constexpr, ROUNDING: gl.constexpr, PRECISE: gl.constexpr,
    WIDEN: gl.constexpr, MULTIPLY: gl.constexpr, LOAD: gl.constexpr,
):  # fmt: skip
    """MULTIPLY, LOAD: registers of a thread that does so."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    wide: gl.constexpr = gl.float16 if WIDEN else dtype
    tiles = gl.allocate_shared_memory(wide, [SLOTS, KEYS, D], HALVES)
    s = Shared(
        gl.allocate_shared_memory(wide, [2, COLUMNS, D], HALVES),
        gl.allocate_shared_memory(gl.float32, [2, COLUMNS], FLAT), tiles,
        gl.allocate_shared_memory(dtype, [2, KEYS, D], BYTES) if WIDEN else tiles,
        gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout()),
    )  # fmt: skip
    for i in gl.static_range(SLOTS):
        mbarrier.init(s.full.index(i), count=1)
        mbarrier.init(s.empty.index(i), count=2)
    # Assigned to a name, the constants among these would be values.
    gl.warp_specialize([
        (_consume, (
            s, Keys(k_ptr, k_sb, k_st, ks_ptr, ks_sb, ks_st, keys, HAS_KS, WIDEN),
            Rows(out_ptr, out_sb, out_st, tokens, start_ptr, start_sb, start_st, end_ptr, end_sb,
                 end_st, HAS_START, HAS_END, CLEAN),
            Work(parts, blocks, spans, span), Math(SCALE, SCALE_DOTS, ROUNDING, PRECISE),
            q_ptr, w_ptr, q_sb, q_st, q_sh, w_sb, w_st, w_sh, 0,
        )),
        (_consume, (
            s, Keys(k_ptr, k_sb, k_st, ks_ptr, ks_sb, ks_st, keys, HAS_KS, WIDEN),
            Rows(out_ptr, out_sb, out_st, tokens, start_ptr, start_sb, start_st, end_ptr, end_sb,
                 end_st, HAS_START, HAS_END, CLEAN),
            Work(parts, blocks, spans, span), Math(SCALE, SCALE_DOTS, ROUNDING, PRECISE),
            q_ptr, w_ptr, q_sb, q_st, q_sh, w_sb, w_st, w_sh, 1,
        )),
        (produce, (
            s, Keys(k_ptr, k_sb, k_st, ks_ptr, ks_sb, ks_st, keys, HAS_KS, WIDEN),
            Rows(out_ptr, out_sb, out_st, tokens, start_ptr, start_sb, start_st, end_ptr, end_sb,
                 end_st, HAS_START, HAS_END, CLEAN),
            Work(parts, blocks, spans, span),
        )),
    ], [4, 4], [MULTIPLY, LOAD])  # fmt: skip
