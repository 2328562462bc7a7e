"""The kernel of compress_kv: one program pools (a part of) a window, or finishes an entry."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import batch_and_position, narrow, round_to
from ._fp4 import fake_fp4
from ._pool import pool, pool_by_steps
from ._rows import cache_row, fake_quant, load_table, norm_rotate
from ._stores import stores
from ._turn import turn_row

# Values that follow the token count: specialising on 1 or on multiples of 16 would recompile. The
# strides of a batch row follow it too, but are multiples of 16 like those of a row, and have to be
# known as such: else each value is loaded on its own.
TOKEN_ARGUMENTS = (
    "length", "entries", "ends_sb", "ends_ss", "page_sb", "page_ss", "pages", "slots",
    "slot_start", "seq_start", "slot_sb", "slot_ss", "seq_sb", "seq_ss",
)  # fmt: skip


@triton.jit
def quantised(y, N: tl.constexpr, NOPE: tl.constexpr, GROUP: tl.constexpr, FLOOR: tl.constexpr,
              POW2: tl.constexpr, VIA_MUL: tl.constexpr, FP4: tl.constexpr, OD: tl.constexpr):
    """N lanes of an entry, ``[1, N]`` fp32, as its quantiser leaves them: ``[N]`` of OD."""
    if FP4 > 0:
        y = fake_fp4(round_to(y, OD), N, 1, GROUP, FLOOR, VIA_MUL, FP4)
    elif GROUP > 0:
        y = fake_quant(round_to(y, OD), NOPE, N, 1, GROUP, FLOOR, POW2, VIA_MUL)
    return tl.reshape(narrow(y, OD), (N,))


@triton.jit
def one_entry(
    b, s, end, source, page, slot, live, entry, col, kv_ptr, kvb_ptr, gate_ptr, gateb_ptr,
    bias_ptr, biasb_ptr, w_ptr, cos_ptr, sin_ptr, m_ptr, pooled_ptr, out_ptr, cache_ptr,
    kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
    gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw,
    cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd, m_si, m_so, cache_sp, cache_sn,
    D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, POOL: tl.constexpr,
    FINISH: tl.constexpr, WIDTH: tl.constexpr, BEFORE: tl.constexpr, STEP: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr, SHIFTED: tl.constexpr, GATHER: tl.constexpr,
    RING: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_NARROW: tl.constexpr,
    POOL_EVERY: tl.constexpr, NARROW: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    HAS_W: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr, KEEP: tl.constexpr,
    HAS_CACHE: tl.constexpr, GROUP: tl.constexpr, FLOOR: tl.constexpr, POW2: tl.constexpr,
    VIA_MUL: tl.constexpr, FP4: tl.constexpr, COLUMNS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Pool and finish one entry, or one of both; what does not wait for the window goes first."""
    XD: tl.constexpr = pooled_ptr.dtype.element_ty if NARROW else tl.float32
    if FINISH:
        one = tl.zeros((1,), tl.int64)
        cos = load_table(cos_ptr, one + b * cos_sb + s * cos_ss, cos_sd, one == 0, 1.0, D, BLOCK,
                         HALF)
        sin = load_table(sin_ptr, one + b * sin_sb + s * sin_ss, sin_sd, one == 0, 0.0, D, BLOCK,
                         HALF)
        w = 0.0
        if NORM != 0 and HAS_W:
            w = tl.load(w_ptr + col, mask=col < D, other=0.0)
    if POOL and STEP > 0:
        y = pool_by_steps(
            kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr, b, s, end, source, col,
            kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
            gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw, D, BLOCK, WIDTH, BEFORE, STEP, TILES,
            STAGES, SHIFTED, GATHER, RING, MASKED, HAS_BIAS, BIAS_NARROW, XD,
        )  # fmt: skip
    elif POOL:
        y = pool(
            kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr, b, s, end, source, col,
            kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
            gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw, D, WIDTH, BEFORE, SHIFTED,
            GATHER, RING, MASKED, HAS_BIAS, BIAS_NARROW, POOL_EVERY, XD,
        )  # fmt: skip
    else:
        y = tl.load(pooled_ptr + entry * D + col, mask=col < D, other=0.0).to(tl.float32)
    if FINISH:
        OD: tl.constexpr = out_ptr.dtype.element_ty
        y = norm_rotate(y[None, :], w, cos, sin, D, BLOCK, HALF, 1, NORM, EPS, HAS_W, EVERY,
                        False, PRECISE, XD, OD)
        target = page * cache_sp + slot * cache_sn
        if COLUMNS > 0:
            y = tl.reshape(y, (BLOCK,))
            if not PRECISE:
                y = round_to(y, OD)
            for first in range(0, D, COLUMNS):
                part = turn_row(y, m_ptr, m_si, m_so, first, COLUMNS, D, FACTOR, PRECISE, OD)
                part = quantised(part[None, :], COLUMNS, D, GROUP, FLOOR, POW2, VIA_MUL, FP4, OD)
                at = first + tl.arange(0, COLUMNS)
                if KEEP:
                    tl.store(out_ptr + entry * D + at, part)
                if HAS_CACHE:
                    tl.store(cache_ptr + target + at, part, mask=live & (at < D))
        else:
            y = quantised(y, BLOCK, D - 2 * HALF, GROUP, FLOOR, POW2, VIA_MUL, FP4, OD)
            if KEEP:
                tl.store(out_ptr + entry * D + col, y, mask=col < D)
            if HAS_CACHE:
                tl.store(cache_ptr + target + col, y, mask=live & (col < D))
    else:
        PD: tl.constexpr = pooled_ptr.dtype.element_ty
        tl.store(pooled_ptr + entry * D + col, narrow(y, PD), mask=col < D)


@triton.jit
def chosen(this, x):
    """The one of x (or x itself, which all share) where ``this`` is set."""
    return tl.sum(tl.where(this, x, 0), axis=0)


@stores(pooled_ptr="not FINISH", out_ptr="FINISH and KEEP", cache_ptr="FINISH and HAS_CACHE")
@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def compress_kernel(
    kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr, ends_ptr, page_ptr,
    w_ptr, cos_ptr, sin_ptr, m_ptr, pooled_ptr, out_ptr, cache_ptr, slot_ptr, seq_ptr, length,
    entries,
    kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
    gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw, ends_sb, ends_ss, page_sb, page_ss,
    cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd, m_si, m_so,
    pages, slots, cache_sp, cache_sn, slot_sb, slot_ss, seq_sb, seq_ss, slot_start, seq_start,
    scales_at, scales_step, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    LANES: tl.constexpr, HALF: tl.constexpr, FLAT: tl.constexpr, POOL: tl.constexpr,
    FINISH: tl.constexpr, WIDTH: tl.constexpr, BEFORE: tl.constexpr, STEP: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr, SHIFTED: tl.constexpr, GATHER: tl.constexpr,
    HAS_PAGE: tl.constexpr, RING: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BIAS_NARROW: tl.constexpr, POOL_EVERY: tl.constexpr, NARROW: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, HAS_W: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr,
    KEEP: tl.constexpr, HAS_CACHE: tl.constexpr, PAGED: tl.constexpr, HAS_SLOT: tl.constexpr,
    HAS_SEQ: tl.constexpr, FLAT_SLOT: tl.constexpr, WRAP: tl.constexpr, SPARE: tl.constexpr,
    PACKED: tl.constexpr, GROUP: tl.constexpr, FLOOR: tl.constexpr, POW2: tl.constexpr,
    VIA_MUL: tl.constexpr, FP4: tl.constexpr, COLUMNS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """PARTS programs, of BLOCK columns each, for every entry, or (LANES > 0) every batch row.

    COLUMNS: so many lanes of a row are turned by the matrix at a time; 0: there is none.
    NARROW: pooled_ptr's dtype is the pool's. LANES: a batch row has up to so many entries, most
    of which are not wanted; its programs look at all in one load, and do those that are.
    """
    col = tl.program_id(0) % PARTS * BLOCK + tl.arange(0, BLOCK)
    entry = (tl.program_id(0) // PARTS).to(tl.int64)
    if LANES > 0:
        b, s = entry, tl.arange(0, LANES).to(tl.int64)
        there = s < length
    else:
        b, s = batch_and_position(entry, length, FLAT)
        there = entry < entries
    slot, page = slot_start + s, seq_start + b
    if HAS_SLOT:
        slot = tl.load(slot_ptr + b * slot_sb + s * slot_ss, mask=there, other=-1).to(tl.int64)
    if HAS_SEQ:
        page = tl.load(seq_ptr + b * seq_sb + s * seq_ss, mask=there, other=-1).to(tl.int64)
    end, source = s.to(tl.int32), b
    if POOL and GATHER:
        end = tl.load(ends_ptr + b * ends_sb + s * ends_ss, mask=there, other=0).to(tl.int32)
        if HAS_PAGE:
            source = tl.load(page_ptr + b * page_sb + s * page_ss, mask=there, other=0)
            source = source.to(tl.int64)
    page, slot, live = cache_row(slot, page, there, pages, slots, PAGED, FLAT_SLOT, WRAP)
    if SPARE:
        live &= slot < slots - 1
    if LANES > 0:
        k = tl.cast(-1, tl.int64)
        for _ in range(tl.sum(live.to(tl.int32), axis=0)):
            k = tl.min(tl.where(live & (s > k), s, LANES), axis=0)
            one_entry(
                b, k, chosen(s == k, end), chosen(s == k, source), chosen(s == k, page),
                chosen(s == k, slot), k >= 0, b * length + k,
                col, kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr, w_ptr, cos_ptr,
                sin_ptr, m_ptr, pooled_ptr, out_ptr, cache_ptr, kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss,
                kvb_sw, gate_sb, gate_ss, gate_sw, gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw,
                cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd, m_si, m_so, cache_sp, cache_sn, D,
                BLOCK, HALF, POOL, FINISH, WIDTH, BEFORE, STEP, TILES, STAGES, SHIFTED, GATHER,
                RING, MASKED, HAS_BIAS, BIAS_NARROW, POOL_EVERY, NARROW, NORM, EPS, HAS_W, EVERY,
                PRECISE, KEEP, HAS_CACHE, GROUP, FLOOR, POW2, VIA_MUL, FP4, COLUMNS, FACTOR,
            )  # fmt: skip
    else:
        wanted = live
        if KEEP or not HAS_CACHE:
            wanted = there
        if wanted:
            one_entry(
                b, s, end, source, page, slot, live, entry, col, kv_ptr, kvb_ptr, gate_ptr,
                gateb_ptr, bias_ptr, biasb_ptr, w_ptr, cos_ptr, sin_ptr, m_ptr, pooled_ptr, out_ptr,
                cache_ptr, kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
                gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw, cos_sb, cos_ss, cos_sd, sin_sb,
                sin_ss, sin_sd, m_si, m_so, cache_sp, cache_sn, D, BLOCK, HALF, POOL, FINISH, WIDTH,
                BEFORE, STEP, TILES, STAGES, SHIFTED, GATHER, RING, MASKED, HAS_BIAS, BIAS_NARROW,
                POOL_EVERY, NARROW, NORM, EPS, HAS_W, EVERY, PRECISE, KEEP, HAS_CACHE, GROUP, FLOOR,
                POW2, VIA_MUL, FP4, COLUMNS, FACTOR,
            )  # fmt: skip
