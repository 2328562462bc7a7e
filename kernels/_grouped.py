"""Device code of inv_rope_grouped_bmm: the rotation alone and grouped products over heads."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import INTERPRET, batch_and_position, narrow, rotate
from ._stores import stores


@triton.jit
def turned_back(x, cos, sin, inside, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                EVERY: tl.constexpr, PRECISE: tl.constexpr):  # fmt: skip
    """``[ROWS, WIDTH]`` by −angle where ``inside``, rounded to its own dtype."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, WIDTH // 2, 2)))
    back = sin * -1.0  # Triton's unary minus is 0 - x, which is no -0 at position 0
    even, odd = rotate(even, odd, cos, back, inside, EVERY, not PRECISE, x.dtype)
    return narrow(tl.reshape(tl.join(even, odd), (ROWS, WIDTH)), x.dtype)


@triton.jit
def turn(cos_ptr, cos_sd, sin_ptr, sin_sd, cos_row, sin_row, c, NOPE: tl.constexpr,
         BK: tl.constexpr):  # fmt: skip
    """(cos, sin, which are there) of the pairs of lanes c.. for each row, ``[rows, BK/2]``."""
    pair = c // 2 - NOPE // 2 + tl.arange(0, BK // 2)[None, :]
    inside = pair >= 0
    cos = tl.load((cos_ptr + cos_row)[:, None] + pair * cos_sd, mask=inside, other=1.0)
    sin = tl.load((sin_ptr + sin_row)[:, None] + pair * sin_sd, mask=inside, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32), inside


@stores(o_ptr="IN_PLACE", out_ptr="not IN_PLACE")
@triton.jit(do_not_specialize=("tokens", "length"))
def tail_kernel(
    o_ptr, out_ptr, cos_ptr, sin_ptr, tokens, length, o_sb, o_ss, o_sh, r_sb, r_ss, r_sh,
    cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd,
    NOPE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    FLAT: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """The rope lanes of ROWS heads, turned back: into their own places or ``[B,S,H,R]``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, (row % HEADS).to(tl.int64)
    live = (token < tokens)[:, None]
    b, s = batch_and_position(token, length, FLAT)
    lane, pair = tl.arange(0, 2 * HALF)[None, :], tl.arange(0, HALF)[None, :]
    at = (b * o_sb + s * o_ss + head * o_sh)[:, None] + NOPE + lane
    x = tl.load(o_ptr + at, mask=live, other=0.0)
    cos_at = (b * cos_sb + s * cos_ss)[:, None] + pair * cos_sd
    sin_at = (b * sin_sb + s * sin_ss)[:, None] + pair * sin_sd
    cos = tl.load(cos_ptr + cos_at, mask=live, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + sin_at, mask=live, other=0.0).to(tl.float32)
    y = turned_back(x, cos, sin, pair >= 0, ROWS, 2 * HALF, EVERY, PRECISE)
    if IN_PLACE:
        tl.store(o_ptr + at, y, mask=live)
    else:
        to = (b * r_sb + s * r_ss + head * r_sh)[:, None] + lane
        tl.store(out_ptr + to, y, mask=live)


@triton.jit
def place(tokens, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(group, its first token, its first output column) of a program.

    Neighbours share a row block of o; a group's weights stay in L2 from one row to the next.
    """
    pid = tl.program_id(0)
    columns: tl.constexpr = (N + BN - 1) // BN
    rows = (tokens + BM - 1) // BM
    return pid // columns // rows, (pid // columns) % rows * BM, pid % columns * BN


@triton.jit
def product(acc, a, w, scale, WEIGHT: tl.constexpr):
    """acc + a · wᵀ for bf16 or fp16 a ``[BM, BK]``; w ``[BN, BK]`` as a's dtype or e4m3.

    WEIGHT 0: as it is. 1: w · scale rounded to a's dtype. 2: the scale on the exact product.
    """
    if WEIGHT == 1:
        w = narrow(w.to(tl.float32) * scale, a.dtype)
    elif WEIGHT == 2:
        w = w.to(a.dtype)  # e4m3 has no value that a 16-bit float lacks
    if INTERPRET:  # whose dot takes bf16 for integers
        a, w = a.to(tl.float32), w.to(tl.float32)
    if WEIGHT == 2:
        return acc + tl.dot(a, tl.trans(w)) * tl.trans(scale)
    else:
        return tl.dot(a, tl.trans(w), acc)


@triton.jit
def weight_scale(s_at, k, s_sk, SK: tl.constexpr, WEIGHT: tl.constexpr):
    """The scales of BN rows of a weight's tile that begins at k, ``[BN, 1]``."""
    if WEIGHT == 0:
        return 0.0
    else:
        return tl.load(s_at + (k // SK) * s_sk)[:, None]


@stores("out_ptr")
@triton.jit(do_not_specialize=("tokens", "length"))
def grouped_kernel(
    o_ptr, tail_ptr, cos_ptr, sin_ptr, w_ptr, ws_ptr, out_ptr, tokens, length,
    o_sb, o_ss, o_sh, r_sb, r_ss, r_sh, w_sg, w_sn, w_sk, ws_sg, ws_sn, ws_sk, out_sg, out_st,
    cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd,
    D: tl.constexpr, NOPE: tl.constexpr, PER: tl.constexpr, N: tl.constexpr,
    SN: tl.constexpr, SK: tl.constexpr, WEIGHT: tl.constexpr, TAIL: tl.constexpr,
    FLAT: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr,
    SINGLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[t, g, n] = Σ over the group's heads and lanes of the turned o · w[g, n, ·].

    Tiles without a rope lane come first, in a plain loop over all heads; then those with one,
    turned on the way (or read from ``tail``, where an earlier kernel turned them). All the
    tiles of one place in their heads share their cos and sin. SINGLE: all tiles in one loop,
    for few tokens, where the weights' stream must not pause between two.
    """
    PLAIN: tl.constexpr = 0 if SINGLE else NOPE // BK
    g, m0, n0 = place(tokens, N, BM, BN)
    token = m0 + tl.arange(0, BM)
    b, s = batch_and_position(tl.minimum(token, tokens - 1), length, FLAT)
    n = n0 + tl.arange(0, BN)
    live = (token < tokens)[:, None] & (n < N)[None, :]
    if N % BN:
        n = tl.minimum(n, N - 1)
    k = tl.arange(0, BK)[None, :]
    g = g.to(tl.int64)
    o_at = (o_ptr + g * PER * o_sh + b * o_sb + s * o_ss)[:, None] + k
    w_at = (w_ptr + g * w_sg + n.to(tl.int64) * w_sn)[:, None] + k * w_sk
    s_at = ws_ptr + g * ws_sg + (n // SN) * ws_sn
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if SINGLE:
        LAST: tl.constexpr = D - BK
        cos, sin, inside = turn(cos_ptr, cos_sd, sin_ptr, sin_sd, b * cos_sb + s * cos_ss,
                                b * sin_sb + s * sin_ss, LAST, NOPE, BK)
        for i in range(PER * (D // BK)):
            c = (i % (D // BK)) * BK
            a = tl.load(o_at + (tl.cast(i // (D // BK), tl.int64) * o_sh + c))
            w = tl.load(w_at + i * BK * w_sk)
            a = turned_back(a, cos, sin, inside & (c == LAST), BM, BK, EVERY, PRECISE)
            scale = weight_scale(s_at, i * BK, ws_sk, SK, WEIGHT)
            acc = product(acc, a, w, scale, WEIGHT)
    if PLAIN > 0:
        ahead = weight_scale(s_at, 0, ws_sk, SK, WEIGHT)  # a step ahead of its use
        for i in range(PER * PLAIN):
            head, c = i // PLAIN, (i % PLAIN) * BK
            a = tl.load(o_at + (tl.cast(head, tl.int64) * o_sh + c))
            w = tl.load(w_at + (head * D + c) * w_sk)
            if BM > 16:
                scale = ahead
                j = (i + 1) % (PER * PLAIN)
                ahead = weight_scale(s_at, j // PLAIN * D + (j % PLAIN) * BK, ws_sk, SK, WEIGHT)
            else:  # a fifth faster there without
                scale = weight_scale(s_at, head * D + c, ws_sk, SK, WEIGHT)
            acc = product(acc, a, w, scale, WEIGHT)
    for j in tl.static_range(D // BK if SINGLE else PLAIN, D // BK):
        c = j * BK
        if TAIL:
            r_at = (tail_ptr + g * PER * r_sh + b * r_sb + s * r_ss)[:, None] + (c - NOPE + k)
        else:
            cos, sin, inside = turn(cos_ptr, cos_sd, sin_ptr, sin_sd, b * cos_sb + s * cos_ss,
                                    b * sin_sb + s * sin_ss, c, NOPE, BK)
        for head in range(PER):
            if TAIL:
                a = tl.load(r_at + tl.cast(head, tl.int64) * r_sh)
            else:
                a = tl.load(o_at + (tl.cast(head, tl.int64) * o_sh + c))
                a = turned_back(a, cos, sin, inside, BM, BK, EVERY, PRECISE)
            w = tl.load(w_at + (head * D + c) * w_sk)
            scale = weight_scale(s_at, head * D + c, ws_sk, SK, WEIGHT)
            acc = product(acc, a, w, scale, WEIGHT)
    at = out_ptr + g * out_sg + token.to(tl.int64)[:, None] * out_st + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=live)


@stores("out_ptr")
@triton.jit(do_not_specialize=("tokens", "as_sk"))
def grouped_fp8_kernel(
    a_ptr, as_ptr, w_ptr, ws_ptr, out_ptr, tokens, a_st, a_sg, as_sg, as_sk,
    w_sg, w_sn, ws_sg, ws_sn, ws_sk, out_sg, out_st,
    K: tl.constexpr, N: tl.constexpr, SN: tl.constexpr, SK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[t, g, n] = Σ_blocks a_scale[g, block, t] · w_scale[g, n, block] · (codes · codes).

    Each block's product leaves the tensor core before it is scaled: the fp8 units of Hopper
    keep about 14 bits while they add, 128 products at a time is what that is good for.
    """
    g, m0, n0 = place(tokens, N, BM, BN)
    token = m0 + tl.arange(0, BM)
    t = tl.minimum(token, tokens - 1)
    n = n0 + tl.arange(0, BN)
    live = (token < tokens)[:, None] & (n < N)[None, :]
    if N % BN:
        n = tl.minimum(n, N - 1)
    k = tl.arange(0, SK)[None, :]
    g = g.to(tl.int64)
    a_at = (a_ptr + g * a_sg + t.to(tl.int64) * a_st)[:, None] + k
    w_at = (w_ptr + g * w_sg + n.to(tl.int64) * w_sn)[:, None] + k
    a_scale_at = as_ptr + g * as_sg + t
    if SN % BN == 0:
        w_scale_at = ws_ptr + g * ws_sg + (n0 // SN) * ws_sn
    else:
        w_scale_at = ws_ptr + g * ws_sg + (n // SN) * ws_sn
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    # The scales are loaded a step ahead: too small for the pipeline, they would be waited for.
    next_a, next_w = tl.load(a_scale_at), tl.load(w_scale_at)
    for i in range(K // SK):
        a = tl.load(a_at + i * SK)
        w = tl.load(w_at + i * SK)
        a_scale, w_scale = next_a, next_w
        ahead = (i + 1) % (K // SK)
        next_a = tl.load(a_scale_at + tl.cast(ahead, tl.int64) * as_sk)
        next_w = tl.load(w_scale_at + ahead * ws_sk)
        if INTERPRET:
            a, w = a.to(tl.float32), w.to(tl.float32)
        part = tl.dot(a, tl.trans(w))
        if SN % BN == 0:
            acc += part * (a_scale * w_scale)[:, None]
        else:
            acc += part * a_scale[:, None] * w_scale[None, :]
    at = out_ptr + g * out_sg + token.to(tl.int64)[:, None] * out_st + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=live)
