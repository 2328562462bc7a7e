"""The kernel of norm_rope, norm_rope_cache and inv_rope: programs that hold whole rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import (
    abs_max,
    batch_and_position,
    block_scale,
    divide,
    mul_rn,
    narrow,
    rotate,
    round_few,
    round_to,
    rsqrt,
)

# Values that follow the token count: specialising on 1 or on multiples of 16 would recompile.
TOKEN_ARGUMENTS = (
    "tokens", "length", "q_programs", "pages", "slots", "slot_start", "seq_start",
    "slot_sb", "slot_ss", "seq_sb", "seq_ss",
)  # fmt: skip


@triton.jit
def normed(x, w_ptr, col, in_row, D: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
            HAS_W: tl.constexpr, PRECISE: tl.constexpr, XD: tl.constexpr, OD: tl.constexpr):
    """``atoms.rms_norm`` of fp32 rows x, rounded where NORM says (XD: input, OD: output dtype)."""
    if NORM == 4 and not PRECISE:  # "every"
        mean = round_few(mul_rn(tl.sum(round_to(mul_rn(x, x), XD), axis=1), 1.0 / D), XD)
        rstd = round_few(rsqrt(round_few(mean + EPS, XD)), XD)
        y = round_to(x * rstd[:, None], XD)
    else:
        rstd = rsqrt(mul_rn(tl.sum(x * x, axis=1), 1.0 / D) + EPS)
        if NORM == 2 and not PRECISE:  # "rstd"
            y = round_to(x * round_few(rstd, XD)[:, None], XD)
        else:
            y = x * rstd[:, None]
            if not PRECISE and (NORM == 3 or not HAS_W):  # "weight", or the only rounding
                y = round_to(y, XD)
    if HAS_W:
        y = y * tl.load(w_ptr + col, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if not PRECISE:
            y = round_to(y, OD)
    return y


@triton.jit
def load_rotated(x_ptr, x_off, w_ptr, cos_ptr, cos_off, cos_sd, sin_ptr, sin_off, sin_sd, live,
         D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
         NORM: tl.constexpr, EPS: tl.constexpr, HAS_W: tl.constexpr, EVERY: tl.constexpr,
         INVERSE: tl.constexpr, PRECISE: tl.constexpr, OD: tl.constexpr):
    """Load ROWS rows, norm, rotate; fp32 ``[ROWS, BLOCK]``."""
    col = tl.arange(0, BLOCK)
    in_row = col < D
    x = tl.load(x_ptr + x_off[:, None] + col[None, :], mask=live[:, None] & in_row[None, :],
                other=0.0)
    pair = tl.arange(0, BLOCK // 2)
    inside = (pair >= D // 2 - HALF) & (pair < D // 2)
    table = live[:, None] & inside[None, :]
    k = (pair - (D // 2 - HALF))[None, :]
    cos = tl.load(cos_ptr + cos_off[:, None] + k * cos_sd, mask=table, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + sin_off[:, None] + k * sin_sd, mask=table, other=0.0).to(tl.float32)
    if INVERSE:
        sin = sin * -1.0  # Triton's unary minus is 0 - x, which is no -0 at position 0
    y = x.to(tl.float32)
    if NORM != 0:
        y = normed(y, w_ptr, col, in_row, D, NORM, EPS, HAS_W, PRECISE, x.dtype, OD)
    even, odd = tl.split(tl.reshape(y, (ROWS, BLOCK // 2, 2)))
    even, odd = rotate(even, odd, cos, sin, inside[None, :], EVERY, not PRECISE, OD)
    return tl.reshape(tl.join(even, odd), (ROWS, BLOCK))


@triton.jit
def fake_quant(y, NOPE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
                GROUP: tl.constexpr, FLOOR: tl.constexpr, POW2: tl.constexpr,
                VIA_MUL: tl.constexpr):
    """``atoms.fake_quant`` of the first NOPE columns of fp32 rows; the rest unchanged."""
    blocks = tl.reshape(y, (ROWS, BLOCK // GROUP, GROUP))
    scale = block_scale(abs_max(blocks, 2), FLOOR, POW2, VIA_MUL)[:, :, None]
    codes = divide(blocks, scale, POW2, FLOOR < 1e-30).to(tl.float8e4nv)
    wide = tl.reshape(codes.to(tl.float32) * scale, (ROWS, BLOCK))
    return tl.where((tl.arange(0, BLOCK) < NOPE)[None, :], wide, y)


@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def norm_rope_kernel(
    q_ptr, q_out_ptr, q_w_ptr, kv_ptr, kv_out_ptr, kv_w_ptr, cos_ptr, sin_ptr,
    cache_ptr, slot_ptr, seq_ptr, tokens, length, q_programs,
    q_sb, q_ss, q_sh, qo_sb, qo_ss, qo_sh, kv_sb, kv_ss,
    cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd,
    pages, slots, cache_sp, cache_sn, slot_sb, slot_ss, seq_sb, seq_ss, slot_start, seq_start,
    D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, FLAT: tl.constexpr, HAS_Q: tl.constexpr, HAS_KV: tl.constexpr,
    Q_NORM: tl.constexpr, Q_EPS: tl.constexpr, Q_W: tl.constexpr, Q_EVERY: tl.constexpr,
    KV_NORM: tl.constexpr, KV_EPS: tl.constexpr, KV_W: tl.constexpr, KV_EVERY: tl.constexpr,
    INVERSE: tl.constexpr, PRECISE: tl.constexpr, KEEP_KV: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGED: tl.constexpr, HAS_SLOT: tl.constexpr, HAS_SEQ: tl.constexpr,
    WRAP: tl.constexpr, GROUP: tl.constexpr, FLOOR: tl.constexpr, POW2: tl.constexpr,
    VIA_MUL: tl.constexpr,
):  # fmt: skip
    """Programs below q_programs take ROWS heads of q each, the rest ROWS tokens of kv."""
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
                q_ptr, b * q_sb + s * q_ss + head.to(tl.int64) * q_sh, q_w_ptr,
                cos_ptr, b * cos_sb + s * cos_ss, cos_sd,
                sin_ptr, b * sin_sb + s * sin_ss, sin_sd, live,
                D, BLOCK, HALF, ROWS, Q_NORM, Q_EPS, Q_W, Q_EVERY, INVERSE, PRECISE, OD,
            )  # fmt: skip
            out = b * qo_sb + s * qo_ss + head.to(tl.int64) * qo_sh
            tl.store(q_out_ptr + out[:, None] + col[None, :], narrow(y, OD),
                     mask=live[:, None] & in_row[None, :])
    if HAS_KV:
        if pid >= q_programs:
            row = (pid - q_programs) * ROWS + tl.arange(0, ROWS)
            live = row < tokens
            b, s = batch_and_position(row, length, FLAT)
            KD: tl.constexpr = kv_out_ptr.dtype.element_ty
            y = load_rotated(
                kv_ptr, b * kv_sb + s * kv_ss, kv_w_ptr,
                cos_ptr, b * cos_sb + s * cos_ss, cos_sd,
                sin_ptr, b * sin_sb + s * sin_ss, sin_sd, live,
                D, BLOCK, HALF, ROWS, KV_NORM, KV_EPS, KV_W, KV_EVERY, INVERSE, PRECISE, KD,
            )  # fmt: skip
            if GROUP > 0:
                y = fake_quant(round_to(y, KD), D - 2 * HALF, BLOCK, ROWS, GROUP, FLOOR, POW2,
                                VIA_MUL)
            y = narrow(y, KD)
            if KEEP_KV:
                tl.store(kv_out_ptr + row.to(tl.int64)[:, None] * D + col[None, :], y,
                         mask=live[:, None] & in_row[None, :])
            if HAS_CACHE:
                slot = slot_start + s
                if HAS_SLOT:
                    at = slot_ptr + b * slot_sb + s * slot_ss
                    slot = tl.load(at, mask=live, other=-1).to(tl.int64)
                if WRAP:
                    slot = tl.where(slot < 0, slot + slots, slot)
                hit = live & (slot >= 0) & (slot < slots)
                target = slot * cache_sn
                if PAGED:
                    page = seq_start + b
                    if HAS_SEQ:
                        at = seq_ptr + b * seq_sb + s * seq_ss
                        page = tl.load(at, mask=live, other=-1).to(tl.int64)
                    if WRAP:
                        page = tl.where(page < 0, page + pages, page)
                    hit &= (page >= 0) & (page < pages)
                    target += page * cache_sp
                tl.store(cache_ptr + target[:, None] + col[None, :], y,
                         mask=hit[:, None] & in_row[None, :])
