"""The indexer's scores: device code."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import INTERPRET, long, max_nan, round_to
from ._stores import stores

# Values that follow a token or key count: specialising on them would recompile.
SIZES = ("tokens", "keys", "w_sb", "ks_sb", "start_sb", "end_sb", "out_sb", "out_st")


@triton.jit
def _needed(start_ptr, end_ptr, first, last, key, keys, start_st, end_st, HAS_START: tl.constexpr,
            HAS_END: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr):
    """The tokens lo ≤ t < hi of first..last between which some row needs keys key..key+KEYS."""
    t = first + tl.arange(0, TOKENS)
    need = t < last
    if HAS_START:
        need &= tl.load(start_ptr + t.to(tl.int64) * start_st, mask=need, other=0) < key + KEYS
    if HAS_END:
        need &= tl.load(end_ptr + t.to(tl.int64) * end_st, mask=need, other=0) > key
    lo = tl.min(tl.where(need, t, last), axis=0)
    hi = tl.max(tl.where(need, t + 1, first), axis=0)
    return lo, tl.maximum(lo, hi)


@triton.jit
def weighted(dots, w, k_scale, dtype: tl.constexpr, SCALE: tl.constexpr, SCALE_DOTS: tl.constexpr,
             ROUNDING: tl.constexpr, PRECISE: tl.constexpr):
    """Each head's term of the sum, rounded to dtype where the module rounds."""
    if ROUNDING >= 1 and not PRECISE:
        dots = round_to(dots, dtype)
    if SCALE_DOTS:
        dots = dots * k_scale[:, None]
    y = max_nan(dots, 0.0)
    if PRECISE:
        w = w * SCALE
    elif SCALE != 1.0:
        y = y * SCALE
        if ROUNDING == 2:
            y = round_to(y, dtype)
    y = y * w[None, :]
    if ROUNDING == 2 and not PRECISE:
        y = round_to(y, dtype)
    return y


@stores("out_ptr")
@triton.jit(do_not_specialize=SIZES)
def indexer_logits_kernel(
    q_ptr, k_ptr, w_ptr, ks_ptr, start_ptr, end_ptr, out_ptr, tokens, keys,
    q_sb, q_st, q_sh, k_sb, k_st, w_sb, w_st, w_sh, ks_sb, ks_st,
    start_sb, start_st, end_sb, end_st, out_sb, out_st,
    HEADS: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
    TOKENS: tl.constexpr, DOT: tl.constexpr, HAS_KS: tl.constexpr, SCALE_DOTS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, CLEAN: tl.constexpr, SCALE: tl.constexpr,
    ROUNDING: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: KEYS keys, held, against TOKENS tokens, DOT of them at a time.

    Keys are the rows of the dot and heads its columns: the sum over heads then runs inside a
    thread and its three neighbours, without shared memory.
    """
    first_key = tl.program_id(0) * KEYS
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * TOKENS  # causal: long rows first
    b = tl.program_id(2).to(tl.int64)
    last = tl.minimum(first + TOKENS, tokens)
    start_ptr += b * start_sb
    end_ptr += b * end_sb
    lo, hi = first, last
    if HAS_START or HAS_END:
        lo, hi = _needed(start_ptr, end_ptr, first, last, first_key, keys, start_st, end_st,
                         HAS_START, HAS_END, TOKENS, KEYS)  # fmt: skip
    OD: tl.constexpr = out_ptr.dtype.element_ty
    QD: tl.constexpr = q_ptr.dtype.element_ty
    ROUNDED: tl.constexpr = tl.bfloat16 if QD.primitive_bitwidth == 8 else QD
    key = first_key + tl.arange(0, KEYS)
    live = key < keys
    out_ptr += b * out_sb
    row_step = long(out_st)
    if CLEAN:
        empty = tl.full((KEYS,), float("-inf"), tl.float32).to(OD)
        for t in range(first, lo):
            tl.store(out_ptr + t * row_step + key, empty, mask=live)
        for t in range(hi, last):
            tl.store(out_ptr + t * row_step + key, empty, mask=live)
    if lo < hi:
        lane = tl.arange(0, D)
        k = tl.load(k_ptr + b * k_sb + key.to(tl.int64)[:, None] * k_st + lane[None, :],
                    mask=live[:, None], other=0.0)  # fmt: skip
        if WIDEN or INTERPRET:
            k = k.to(tl.float32 if INTERPRET else tl.float16)
        k_scale = 1.0
        if HAS_KS:
            k_scale = tl.load(ks_ptr + b * ks_sb + key * ks_st, mask=live, other=0.0)
        column = tl.arange(0, DOT * PAD)
        head = column % PAD
        q_at = q_ptr + b * q_sb + head[:, None] * q_sh + lane[None, :]
        for t in range(lo, hi, DOT):
            token = t + column // PAD
            there = (token < hi) & (head < HEADS)
            token = token.to(tl.int64)
            q = tl.load(q_at + (token * q_st)[:, None], mask=there[:, None], other=0.0)
            w = tl.load(w_ptr + b * w_sb + token * w_st + head * w_sh, mask=there, other=0.0)
            if WIDEN or INTERPRET:
                q = q.to(tl.float32 if INTERPRET else tl.float16)
            dots = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            y = weighted(dots, w.to(tl.float32), k_scale, ROUNDED, SCALE, SCALE_DOTS, ROUNDING,
                         PRECISE)  # fmt: skip
            if PAD != HEADS:
                y = tl.where(there[None, :], y, 0.0)  # an infinite key makes 0 · inf there
            row = t + tl.arange(0, DOT)
            if DOT == 1:
                s = tl.sum(y, axis=1)[:, None]
            else:
                s = tl.sum(tl.reshape(y, (KEYS, DOT, PAD)), axis=2)
            if HAS_KS and not SCALE_DOTS:
                s = s * k_scale[:, None]
            mine = row < hi
            inside = live[:, None] & mine[None, :]
            if HAS_START:
                start = tl.load(start_ptr + row.to(tl.int64) * start_st, mask=mine, other=0)
                inside &= key[:, None] >= start[None, :]
            if HAS_END:
                end = tl.load(end_ptr + row.to(tl.int64) * end_st, mask=mine, other=0)
                inside &= key[:, None] < end[None, :]
            if CLEAN and (HAS_START or HAS_END):
                s = tl.where(inside, s, float("-inf"))
                inside = live[:, None] & mine[None, :]
            tl.store(out_ptr + (row * row_step)[None, :] + key[:, None], s.to(OD), mask=inside)
