"""The kernel of norm_rope, norm_rope_cache and inv_rope: programs that hold whole rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import (
    abs_max,
    batch_and_position,
    block_scale,
    divide,
    long,
    narrow,
    rotate,
    round_to,
    scale_byte,
)
from ._norms import reciprocal_rms, scaled, squares
from ._stores import stores

# Values that follow the token count: specialising on 1 or on multiples of 16 would recompile.
TOKEN_ARGUMENTS = (
    "tokens", "length", "q_programs", "pages", "slots", "slot_start", "seq_start",
    "slot_sb", "slot_ss", "seq_sb", "seq_ss",
)  # fmt: skip


@triton.jit
def load_summed(x_ptr, at, step, mask, SPLIT: tl.constexpr, PRECISE: tl.constexpr,
                XD: tl.constexpr):
    """fp32 rows; of SPLIT partial results, ``step`` apart, the sum, rounded to XD."""
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(1, SPLIT):
        y += tl.load(x_ptr + at + k * step, mask=mask, other=0.0).to(tl.float32)
    if SPLIT > 1 and not PRECISE:
        y = round_to(y, XD)
    return y


@triton.jit
def load_table(ptr, off, step, live, other: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
               HALF: tl.constexpr):
    """cos or sin of the trailing HALF pairs of rows, fp32 ``[ROWS, BLOCK/2]``; else ``other``."""
    pair = tl.arange(0, BLOCK // 2)
    inside = (pair >= D // 2 - HALF) & (pair < D // 2)
    at = off[:, None] + (pair - (D // 2 - HALF))[None, :] * step
    return tl.load(ptr + at, mask=live[:, None] & inside[None, :], other=other).to(tl.float32)


@triton.jit
def norm_rotate(y, w, cos, sin, D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
         ROWS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, HAS_W: tl.constexpr,
         EVERY: tl.constexpr, INVERSE: tl.constexpr, PRECISE: tl.constexpr, XD: tl.constexpr,
         OD: tl.constexpr):
    """Norm and rotate fp32 rows ``[ROWS, BLOCK]`` of values of XD; the result will be OD."""
    pair = tl.arange(0, BLOCK // 2)
    inside = (pair >= D // 2 - HALF) & (pair < D // 2)
    if INVERSE:
        sin = sin * -1.0  # Triton's unary minus is 0 - x, which is no -0 at position 0
    if NORM != 0:
        total = tl.sum(squares(y, NORM, PRECISE, XD), axis=1)
        rstd = reciprocal_rms(total, D, NORM, EPS, PRECISE, XD)
        y = scaled(y, rstd, w, HAS_W, NORM, PRECISE, XD, OD)
    even, odd = tl.split(tl.reshape(y, (ROWS, BLOCK // 2, 2)))
    even, odd = rotate(even, odd, cos, sin, inside[None, :], EVERY, not PRECISE, OD)
    return tl.reshape(tl.join(even, odd), (ROWS, BLOCK))


@triton.jit
def load_rotated(x_ptr, x_off, x_sk, w_ptr, cos_ptr, cos_off, cos_sd, sin_ptr, sin_off, sin_sd,
         live, D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
         NORM: tl.constexpr, EPS: tl.constexpr, HAS_W: tl.constexpr, EVERY: tl.constexpr,
         INVERSE: tl.constexpr, PRECISE: tl.constexpr, SPLIT: tl.constexpr, TYPE: tl.constexpr,
         OD: tl.constexpr):
    """Load ROWS rows (of TYPE once summed), norm, rotate; fp32 ``[ROWS, BLOCK]``."""
    XD: tl.constexpr = tl.float32 if TYPE == 2 else (tl.float16 if TYPE == 1 else tl.bfloat16)
    col = tl.arange(0, BLOCK)
    y = load_summed(x_ptr, x_off[:, None] + col[None, :], x_sk,
                    live[:, None] & (col < D)[None, :], SPLIT, PRECISE, XD)
    cos = load_table(cos_ptr, cos_off, cos_sd, live, 1.0, D, BLOCK, HALF)
    sin = load_table(sin_ptr, sin_off, sin_sd, live, 0.0, D, BLOCK, HALF)
    w = 0.0
    if NORM != 0 and HAS_W:
        w = tl.load(w_ptr + col, mask=col < D, other=0.0)
    return norm_rotate(
        y, w, cos, sin, D, BLOCK, HALF, ROWS, NORM, EPS, HAS_W, EVERY, INVERSE, PRECISE, XD, OD
    )


@triton.jit
def encoded(y, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
            FLOOR: tl.constexpr, POW2: tl.constexpr, VIA_MUL: tl.constexpr):
    """e4m3 codes ``[ROWS, BLOCK/GROUP, GROUP]`` of fp32 rows and their scales ``[.., 1]``."""
    blocks = tl.reshape(y, (ROWS, BLOCK // GROUP, GROUP))
    scale = block_scale(abs_max(blocks, 2), FLOOR, POW2, VIA_MUL)[:, :, None]
    return divide(blocks, scale, POW2, FLOOR < 1e-30).to(tl.float8e4nv), scale


@triton.jit
def fake_quant(y, NOPE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
                GROUP: tl.constexpr, FLOOR: tl.constexpr, POW2: tl.constexpr,
                VIA_MUL: tl.constexpr):
    """``atoms.fake_quant`` of the first NOPE columns of fp32 rows; the rest unchanged."""
    codes, scale = encoded(y, BLOCK, ROWS, GROUP, FLOOR, POW2, VIA_MUL)
    wide = tl.reshape(codes.to(tl.float32) * scale, (ROWS, BLOCK))
    return tl.where((tl.arange(0, BLOCK) < NOPE)[None, :], wide, y)


@triton.jit
def store_packed(y, ptr, data_at, scale_at, hit, D: tl.constexpr, NOPE: tl.constexpr,
                BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
                FLOOR: tl.constexpr, VIA_MUL: tl.constexpr):
    """Rows as bytes: NOPE codes, then the rest in bf16; elsewhere D/GROUP scale bytes.

    The scale bytes behind those of the codes are padding, and written as zeros.
    """
    codes, scale = encoded(y, BLOCK, ROWS, GROUP, FLOOR, True, VIA_MUL)
    col = tl.arange(0, BLOCK)
    raw = tl.reshape(codes, (ROWS, BLOCK)).to(tl.uint8, bitcast=True)
    tl.store(ptr + data_at[:, None] + col[None, :], raw, mask=hit[:, None] & (col < NOPE)[None, :])
    tail = (ptr + data_at[:, None] + NOPE).to(tl.pointer_type(tl.bfloat16))
    tl.store(tail + (col - NOPE)[None, :], narrow(y, tl.bfloat16),
             mask=hit[:, None] & ((col >= NOPE) & (col < D))[None, :])
    g = tl.arange(0, BLOCK // GROUP)
    byte = tl.where((g < NOPE // GROUP)[None, :],
                    scale_byte(tl.reshape(scale, (ROWS, BLOCK // GROUP))), 0)
    tl.store(ptr + scale_at[:, None] + g[None, :], byte.to(tl.uint8),
             mask=hit[:, None] & (g < D // GROUP)[None, :])


@triton.jit
def cache_row(slot, page, live, pages, slots, PAGED: tl.constexpr, FLAT_SLOT: tl.constexpr,
              WRAP: tl.constexpr):
    """(page, row in it, is there such a row) of each token; FLAT_SLOT counts through pages.

    It gets values, not pointers: torch takes what a function makes of a pointer and a store then
    uses as an address for a write through that pointer.
    """
    count = slots
    if FLAT_SLOT:
        count = long(pages) * slots
    if WRAP:
        slot = tl.where(slot < 0, slot + count, slot)
    hit = live & (slot >= 0) & (slot < count)
    if FLAT_SLOT:
        page, slot = slot // slots, slot % slots
    elif PAGED:
        if WRAP:
            page = tl.where(page < 0, page + pages, page)
        hit &= (page >= 0) & (page < pages)
    else:
        page = page * 0
    return page, slot, hit


@stores(q_out_ptr="HAS_Q", kv_out_ptr="HAS_KV and KEEP_KV", cache_ptr="HAS_KV and HAS_CACHE")
@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def norm_rope_kernel(
    q_ptr, q_out_ptr, q_w_ptr, kv_ptr, kv_out_ptr, kv_w_ptr, cos_ptr, sin_ptr,
    cache_ptr, slot_ptr, seq_ptr, tokens, length, q_programs,
    q_sk, q_sb, q_ss, q_sh, qo_sb, qo_ss, qo_sh, kv_sk, kv_sb, kv_ss,
    cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd,
    pages, slots, cache_sp, cache_sn, slot_sb, slot_ss, seq_sb, seq_ss, slot_start, seq_start,
    scales_at, scales_step,
    D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, KV_ROWS: tl.constexpr, FLAT: tl.constexpr, HAS_Q: tl.constexpr,
    HAS_KV: tl.constexpr,
    Q_NORM: tl.constexpr, Q_EPS: tl.constexpr, Q_W: tl.constexpr, Q_EVERY: tl.constexpr,
    KV_NORM: tl.constexpr, KV_EPS: tl.constexpr, KV_W: tl.constexpr, KV_EVERY: tl.constexpr,
    INVERSE: tl.constexpr, PRECISE: tl.constexpr, KEEP_KV: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGED: tl.constexpr, HAS_SLOT: tl.constexpr, HAS_SEQ: tl.constexpr,
    FLAT_SLOT: tl.constexpr, WRAP: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    FLOOR: tl.constexpr, POW2: tl.constexpr, VIA_MUL: tl.constexpr, Q_SPLIT: tl.constexpr,
    Q_TYPE: tl.constexpr, KV_SPLIT: tl.constexpr, KV_TYPE: tl.constexpr,
):  # fmt: skip
    """Programs below q_programs take ROWS heads of q each, the rest KV_ROWS tokens of kv."""
    pid = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    in_row = col < D
    if HAS_Q:
        if pid < q_programs:
            row = pid * ROWS + tl.arange(0, ROWS)
            token, head = row // HEADS, row % HEADS
            live = token < tokens
            b, s = batch_and_position(token, length, FLAT)
            OD: tl.constexpr = q_out_ptr.dtype.element_ty
            y = load_rotated(
                q_ptr, b * q_sb + s * q_ss + head.to(tl.int64) * q_sh, q_sk, q_w_ptr,
                cos_ptr, b * cos_sb + s * cos_ss, cos_sd,
                sin_ptr, b * sin_sb + s * sin_ss, sin_sd, live,
                D, BLOCK, HALF, ROWS, Q_NORM, Q_EPS, Q_W, Q_EVERY, INVERSE, PRECISE,
                Q_SPLIT, Q_TYPE, OD,
            )  # fmt: skip
            out = b * qo_sb + s * qo_ss + head.to(tl.int64) * qo_sh
            tl.store(q_out_ptr + out[:, None] + col[None, :], narrow(y, OD),
                     mask=live[:, None] & in_row[None, :])
    if HAS_KV:
        if pid >= q_programs:
            row = (pid - q_programs) * KV_ROWS + tl.arange(0, KV_ROWS)
            live = row < tokens
            b, s = batch_and_position(row, length, FLAT)
            KD: tl.constexpr = kv_out_ptr.dtype.element_ty
            y = load_rotated(
                kv_ptr, b * kv_sb + s * kv_ss, kv_sk, kv_w_ptr,
                cos_ptr, b * cos_sb + s * cos_ss, cos_sd,
                sin_ptr, b * sin_sb + s * sin_ss, sin_sd, live,
                D, BLOCK, HALF, KV_ROWS, KV_NORM, KV_EPS, KV_W, KV_EVERY, INVERSE, PRECISE,
                KV_SPLIT, KV_TYPE, KD,
            )  # fmt: skip
            if GROUP > 0 and not PACKED:
                y = fake_quant(round_to(y, KD), D - 2 * HALF, BLOCK, KV_ROWS, GROUP, FLOOR, POW2,
                                VIA_MUL)
            out = narrow(y, KD)
            if KEEP_KV:
                tl.store(kv_out_ptr + row.to(tl.int64)[:, None] * D + col[None, :], out,
                         mask=live[:, None] & in_row[None, :])
            if HAS_CACHE:
                slot, page = slot_start + s, seq_start + b
                if HAS_SLOT:
                    slot = tl.load(slot_ptr + b * slot_sb + s * slot_ss, mask=live, other=-1)
                if HAS_SEQ:
                    page = tl.load(seq_ptr + b * seq_sb + s * seq_ss, mask=live, other=-1)
                page, slot, hit = cache_row(page=page.to(tl.int64), slot=slot.to(tl.int64),
                                            live=live, pages=pages, slots=slots, PAGED=PAGED,
                                            FLAT_SLOT=FLAT_SLOT, WRAP=WRAP)
                target = page * cache_sp + slot * cache_sn
                if PACKED:
                    store_packed(round_to(y, KD), cache_ptr, target,
                                 page * cache_sp + scales_at + slot * scales_step, hit, D,
                                 D - 2 * HALF, BLOCK, KV_ROWS, GROUP, FLOOR, VIA_MUL)
                else:
                    tl.store(cache_ptr + target[:, None] + col[None, :], out,
                             mask=hit[:, None] & in_row[None, :])
