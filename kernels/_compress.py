"""The kernel of compress_kv: one program pools (a part of) a window, or finishes an entry."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import batch_and_position, mul_rn, narrow, round_to
from ._rows import cache_row, fake_quant, load_table, norm_rotate

# Values that follow the token count: specialising on 1 or on multiples of 16 would recompile.
TOKEN_ARGUMENTS = (
    "length", "entries", "kv_sb", "kvb_sb", "gate_sb", "gateb_sb", "ends_sb", "ends_ss",
    "page_sb", "page_ss", "pages", "slots", "slot_start", "seq_start", "slot_sb", "slot_ss",
    "seq_sb", "seq_ss",
)  # fmt: skip


@triton.jit
def window_rows(first, W: tl.constexpr, RING: tl.constexpr):
    """Where a cache keeps the positions ``first + [0, W)`` (int32): modulo RING, or 0 below 0."""
    row = first + tl.arange(0, W)
    if RING > 0:
        row = row % RING  # truncated: the sign is that of the dividend
        return tl.where(row < 0, row + RING, row)
    else:
        return tl.maximum(row, 0)


@triton.jit
def load_tile(ptr, offset, row, stride, col, there, other: tl.constexpr):
    """fp32 rows ``[W, BLOCK]``."""
    at = offset + row.to(tl.int64) * stride
    return tl.load(ptr + at[:, None] + col[None, :], mask=there, other=other)


@triton.jit
def biased(gate, ptr, stride, col, there, W: tl.constexpr, HAS: tl.constexpr, ND: tl.constexpr):
    """gate + bias in fp32, rounded to ND."""
    if HAS:
        row = tl.arange(0, W)
        b = tl.load(ptr + row[:, None] * stride + col[None, :], mask=there, other=0.0)
        return round_to(gate + b.to(tl.float32), ND)
    else:
        return gate


@triton.jit
def weighed(kv, e, scale, EVERY: tl.constexpr, KD: tl.constexpr):
    """The sum over rows of kv · e, for EVERY of kv · (e · scale) with each step in KD."""
    if EVERY:
        return tl.sum(round_to(mul_rn(kv, round_to(e * scale[None, :], KD)), KD), axis=0)
    else:
        return tl.sum(kv * e, axis=0)


@triton.jit
def pool(
    kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr, b, s, end, page, col,
    kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
    gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw,
    D: tl.constexpr, WIDTH: tl.constexpr, BEFORE: tl.constexpr, SHIFTED: tl.constexpr,
    GATHER: tl.constexpr, RING: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BIAS_NARROW: tl.constexpr, EVERY: tl.constexpr, XD: tl.constexpr,
):  # fmt: skip
    """``atoms.softmax_pool`` of one window in the columns ``col``: fp32 values of XD."""
    KD: tl.constexpr = kv_ptr.dtype.element_ty
    GD: tl.constexpr = gate_ptr.dtype.element_ty if BIAS_NARROW else tl.float32
    row = tl.arange(0, WIDTH)
    now = tl.broadcast_to((col < D)[None, :], (WIDTH, col.shape[0]))
    kv_at, gate_at = b * kv_sb + s * kv_ss, b * gate_sb + s * gate_ss
    if GATHER:
        row = window_rows(end - (WIDTH - 1), WIDTH, RING)
        kv_at, gate_at = page * kv_sb, page * gate_sb
    g = load_tile(gate_ptr, gate_at, row, gate_sw, col, now, 0.0).to(tl.float32)
    x = load_tile(kv_ptr, kv_at, row, kv_sw, col, now, 0.0).to(tl.float32)
    g = biased(g, bias_ptr, bias_sw, col, now, WIDTH, HAS_BIAS, GD)
    top = tl.max(g, axis=0)
    if BEFORE > 0:
        row = tl.arange(0, BEFORE)
        old = tl.broadcast_to((col < D)[None, :], (BEFORE, col.shape[0]))
        kv_at, gate_at = b * kvb_sb + s * kvb_ss, b * gateb_sb + s * gateb_ss
        there = old
        if SHIFTED:
            there = old & (s > 0)
            kv_at, gate_at = kv_at - kvb_ss, gate_at - gateb_ss
        if GATHER:
            first = end - (WIDTH + BEFORE - 1)
            row = window_rows(first, BEFORE, RING)
            kv_at, gate_at = page * kvb_sb, page * gateb_sb
            if MASKED:
                there = old & (first + tl.arange(0, BEFORE) >= 0)[:, None]
        gb = load_tile(gateb_ptr, gate_at, row, gateb_sw, col, there, 0.0).to(tl.float32)
        xb = load_tile(kvb_ptr, kv_at, row, kvb_sw, col, there if SHIFTED else old, 0.0)
        xb = xb.to(tl.float32)
        gb = biased(gb, biasb_ptr, biasb_sw, col, old, BEFORE, HAS_BIAS, GD)
        gb = tl.where(there | (col >= D)[None, :], gb, float("-inf"))
        top = tl.maximum(top, tl.max(gb, axis=0))
    e = tl.exp(g - top[None, :])
    total = tl.sum(e, axis=0)
    if BEFORE > 0:
        eb = tl.exp(gb - top[None, :])
        total += tl.sum(eb, axis=0)
    scale = tl.div_rn(1.0, total)
    y = weighed(x, e, scale, EVERY, KD)
    if BEFORE > 0:
        y += weighed(xb, eb, scale, EVERY, KD)
    if not EVERY:
        y = y * scale
    return round_to(y, XD)


@triton.jit
def one_entry(
    entry, col, kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr, ends_ptr, page_ptr,
    w_ptr, cos_ptr, sin_ptr, pooled_ptr, out_ptr, cache_ptr, slot_ptr, seq_ptr, length, entries,
    kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
    gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw, ends_sb, ends_ss, page_sb, page_ss,
    cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd,
    pages, slots, cache_sp, cache_sn, slot_sb, slot_ss, seq_sb, seq_ss, slot_start, seq_start,
    D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, FLAT: tl.constexpr,
    POOL: tl.constexpr, FINISH: tl.constexpr, WIDTH: tl.constexpr, BEFORE: tl.constexpr,
    SHIFTED: tl.constexpr, GATHER: tl.constexpr, HAS_PAGE: tl.constexpr, RING: tl.constexpr,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_NARROW: tl.constexpr,
    POOL_EVERY: tl.constexpr, NARROW: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    HAS_W: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr, KEEP: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGED: tl.constexpr, HAS_SLOT: tl.constexpr, HAS_SEQ: tl.constexpr,
    FLAT_SLOT: tl.constexpr, WRAP: tl.constexpr, SPARE: tl.constexpr, GROUP: tl.constexpr,
    FLOOR: tl.constexpr, POW2: tl.constexpr, VIA_MUL: tl.constexpr,
):  # fmt: skip
    """Pool and finish one entry, or do one of both; what does not wait for the slot goes first."""
    b, s = batch_and_position(entry, length, FLAT)
    XD: tl.constexpr = pooled_ptr.dtype.element_ty if NARROW else tl.float32
    end = 0
    source = b
    if POOL and GATHER:
        end = tl.load(ends_ptr + b * ends_sb + s * ends_ss).to(tl.int32)
        if HAS_PAGE:
            source = tl.load(page_ptr + b * page_sb + s * page_ss).to(tl.int64)
    slot, page = slot_start + s, seq_start + b
    if HAS_SLOT:
        slot = tl.load(slot_ptr + b * slot_sb + s * slot_ss, mask=entry < entries, other=-1)
    if HAS_SEQ:
        page = tl.load(seq_ptr + b * seq_sb + s * seq_ss, mask=entry < entries, other=-1)
    page, slot, live = cache_row(slot.to(tl.int64), page.to(tl.int64), entry < entries, pages,
                                 slots, PAGED, FLAT_SLOT, WRAP)
    if SPARE:
        live &= slot < slots - 1
    wanted = live
    if KEEP or not HAS_CACHE:
        wanted = entry < entries
    if wanted:
        if FINISH:
            one = tl.zeros((1,), tl.int64)
            cos = load_table(cos_ptr, one + b * cos_sb + s * cos_ss, cos_sd, one == 0, 1.0, D,
                             BLOCK, HALF)
            sin = load_table(sin_ptr, one + b * sin_sb + s * sin_ss, sin_sd, one == 0, 0.0, D,
                             BLOCK, HALF)
            w = 0.0
            if NORM != 0 and HAS_W:
                w = tl.load(w_ptr + col, mask=col < D, other=0.0)
        if POOL:
            y = pool(
                kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr, b, s, end, source, col,
                kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
                gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw, D, WIDTH, BEFORE, SHIFTED,
                GATHER, RING, MASKED, HAS_BIAS, BIAS_NARROW, POOL_EVERY, XD,
            )  # fmt: skip
        else:
            y = tl.load(pooled_ptr + entry.to(tl.int64) * D + col, mask=col < D, other=0.0)
            y = y.to(tl.float32)
        if FINISH:
            OD: tl.constexpr = out_ptr.dtype.element_ty
            y = norm_rotate(y[None, :], w, cos, sin, D, BLOCK, HALF, 1, NORM, EPS, HAS_W, EVERY,
                            False, PRECISE, XD, OD)
            if GROUP > 0:
                y = fake_quant(round_to(y, OD), D - 2 * HALF, BLOCK, 1, GROUP, FLOOR, POW2,
                               VIA_MUL)
            y = tl.reshape(narrow(y, OD), (BLOCK,))
            if KEEP:
                tl.store(out_ptr + entry.to(tl.int64) * D + col, y, mask=col < D)
            if HAS_CACHE:
                target = page * cache_sp + slot * cache_sn
                tl.store(cache_ptr + target + col, y, mask=live & (col < D))
        else:
            PD: tl.constexpr = pooled_ptr.dtype.element_ty
            tl.store(pooled_ptr + entry.to(tl.int64) * D + col, narrow(y, PD), mask=col < D)


@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def compress_kernel(
    kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr, ends_ptr, page_ptr,
    w_ptr, cos_ptr, sin_ptr, pooled_ptr, out_ptr, cache_ptr, slot_ptr, seq_ptr, length, entries,
    kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
    gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw, ends_sb, ends_ss, page_sb, page_ss,
    cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd,
    pages, slots, cache_sp, cache_sn, slot_sb, slot_ss, seq_sb, seq_ss, slot_start, seq_start,
    scales_at, scales_step, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, HALF: tl.constexpr, FLAT: tl.constexpr,
    POOL: tl.constexpr, FINISH: tl.constexpr, WIDTH: tl.constexpr, BEFORE: tl.constexpr,
    SHIFTED: tl.constexpr, GATHER: tl.constexpr, HAS_PAGE: tl.constexpr, RING: tl.constexpr,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_NARROW: tl.constexpr,
    POOL_EVERY: tl.constexpr, NARROW: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    HAS_W: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr, KEEP: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGED: tl.constexpr, HAS_SLOT: tl.constexpr, HAS_SEQ: tl.constexpr,
    FLAT_SLOT: tl.constexpr, WRAP: tl.constexpr, SPARE: tl.constexpr, PACKED: tl.constexpr,
    GROUP: tl.constexpr, FLOOR: tl.constexpr, POW2: tl.constexpr, VIA_MUL: tl.constexpr,
):  # fmt: skip
    """PARTS programs, of BLOCK columns each, for every RUN entries that follow one another.

    NARROW: pooled_ptr's dtype is the pool's. RUN > 1: most of the entries are not wanted, so one
    look at LANES slots ends the program.
    """
    pid = tl.program_id(0)
    col = pid % PARTS * BLOCK + tl.arange(0, BLOCK)
    first = pid // PARTS * RUN
    some = first >= 0
    if RUN > 1:
        entry = first + tl.arange(0, LANES)
        there = (entry < first + RUN) & (entry < entries)
        b, s = batch_and_position(entry, length, FLAT)
        slot, page = slot_start + s, seq_start + b
        if HAS_SLOT:
            slot = tl.load(slot_ptr + b * slot_sb + s * slot_ss, mask=there, other=-1)
        if HAS_SEQ:
            page = tl.load(seq_ptr + b * seq_sb + s * seq_ss, mask=there, other=-1)
        _, slot, live = cache_row(slot.to(tl.int64), page.to(tl.int64), there, pages, slots,
                                  PAGED, FLAT_SLOT, WRAP)
        some = tl.max((live & (slot < slots - SPARE)).to(tl.int32), axis=0) > 0
    if some:
        for k in range(RUN):
            one_entry(
                first + k, col, kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr,
                ends_ptr, page_ptr, w_ptr, cos_ptr, sin_ptr, pooled_ptr, out_ptr, cache_ptr,
                slot_ptr, seq_ptr, length, entries, kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw,
                gate_sb, gate_ss, gate_sw, gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw,
                ends_sb, ends_ss, page_sb, page_ss, cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd,
                pages, slots, cache_sp, cache_sn, slot_sb, slot_ss, seq_sb, seq_ss,
                slot_start, seq_start, D, BLOCK, HALF, FLAT, POOL, FINISH, WIDTH, BEFORE, SHIFTED,
                GATHER, HAS_PAGE, RING, MASKED, HAS_BIAS, BIAS_NARROW, POOL_EVERY, NARROW, NORM,
                EPS, HAS_W, EVERY, PRECISE, KEEP, HAS_CACHE, PAGED, HAS_SLOT, HAS_SEQ, FLAT_SLOT,
                WRAP, SPARE, GROUP, FLOOR, POW2, VIA_MUL,
            )  # fmt: skip
