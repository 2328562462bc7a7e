"""What is made of a token's mixes: collapsed streams (and their RMSNorm), post and comb."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ._common import INTERPRET, long, mul_rn, narrow, round_to, rsqrt
from ._norms import reciprocal_rms, scaled, squares
from ._stores import stores


@triton.jit
def _halve(x, ROWS: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    a, b = tl.split(tl.reshape(x, (ROWS, N, G // 2, 2)))
    return a + b


@triton.jit
def activated(part_ptr, scale_ptr, base_ptr, token, live, tokens, K: tl.constexpr,
              OUT: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr,
              EPS: tl.constexpr, ROWS: tl.constexpr, PRE: tl.constexpr):  # fmt: skip
    """``mixes · rstd · scale + base`` of ROWS tokens, fp32 ``[ROWS, N]``. PRE: of the first four,
    and nothing else is read but the squares.

    Pieces of a group are added in order, the groups in pairs: no order is left to a reduction.
    """
    n = tl.arange(0, N)
    group = tl.arange(0, GROUPS) * CHUNKS
    step = long(tokens) * N
    at = group[None, :, None] * step + token.to(tl.int64)[:, None, None] * N + n[None, None, :]
    mask = live[:, None, None]
    if PRE:
        mask = mask & ((n < 4) | (n == OUT))[None, None, :]
    total = tl.load(part_ptr + at, mask=mask, other=0.0)
    for c in tl.static_range(1, CHUNKS):
        total += tl.load(part_ptr + at + c * step, mask=mask, other=0.0)
    total = tl.permute(total, (0, 2, 1))
    if GROUPS >= 8:
        total = _halve(total, ROWS, N, 8)
    if GROUPS >= 4:
        total = _halve(total, ROWS, N, 4)
    if GROUPS >= 2:
        total = _halve(total, ROWS, N, 2)
    mixes = tl.reshape(total, (ROWS, N))
    squares = tl.sum(tl.where((n == OUT)[None, :], mixes, 0.0), axis=1)
    rstd = rsqrt(mul_rn(squares, 1.0 / K) + EPS)
    which = tl.minimum(n // 4, 2)  # a head has one scale, for its four outputs
    scale = tl.load(scale_ptr + which, mask=n < OUT, other=0.0).to(tl.float32)
    base = tl.load(base_ptr + n, mask=n < OUT, other=0.0).to(tl.float32)
    return mul_rn(mul_rn(mixes, tl.broadcast_to(rstd[:, None], (ROWS, N))),
                  tl.broadcast_to(scale[None, :], (ROWS, N))) + base[None, :]  # fmt: skip


@triton.jit
def exp(x):
    if INTERPRET:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(x * -1.0))


@triton.jit
def column(x, j: tl.constexpr, N: tl.constexpr):
    """Column j of ``[ROWS, N]``."""
    return tl.sum(tl.where((tl.arange(0, N) == j)[None, :], x, 0.0), axis=1)


@triton.jit
def _over_sum(a, b, c, d, EPS: tl.constexpr):
    """Four values over their sum: by its reciprocal to one ulp, for these are 39 steps in a row."""
    total = (a + b) + ((c + d) + EPS)
    if INTERPRET:
        r = 1.0 / total
    else:
        r = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1
        )
    # Rounded products: contracted with the next sum, their bits would hang on the launch.
    return mul_rn(a, r), mul_rn(b, r), mul_rn(c, r), mul_rn(d, r)


@triton.jit
def _exp_row(z, j: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr):
    """softmax of columns j..j+4 of z, plus EPS."""
    a, b, c, d = column(z, j, N), column(z, j + 1, N), column(z, j + 2, N), column(z, j + 3, N)
    top = tl.maximum(tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL),
                     tl.maximum(c, d, propagate_nan=tl.PropagateNan.ALL),
                     propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
    a, b, c, d = _over_sum(exp(a - top), exp(b - top), exp(c - top), exp(d - top), 0.0)
    return a + EPS, b + EPS, c + EPS, d + EPS


@triton.jit
def _write_weights(z, post_ptr, comb_ptr, token, live, N: tl.constexpr, EPS: tl.constexpr,
                   ITERS: tl.constexpr):  # fmt: skip
    """post and comb of ROWS tokens. A token's 4 × 4 are 16 registers, its sums need no shuffle."""
    n = tl.arange(0, N)
    at = token.to(tl.int64)[:, None] * 4 + (n - 4)[None, :]
    tl.store(post_ptr + at, 2.0 * sigmoid(z), mask=live[:, None] & ((n >= 4) & (n < 8))[None, :])
    a0, a1, a2, a3 = _exp_row(z, 8, N, EPS)
    b0, b1, b2, b3 = _exp_row(z, 12, N, EPS)
    c0, c1, c2, c3 = _exp_row(z, 16, N, EPS)
    d0, d1, d2, d3 = _exp_row(z, 20, N, EPS)
    a0, b0, c0, d0 = _over_sum(a0, b0, c0, d0, EPS)
    a1, b1, c1, d1 = _over_sum(a1, b1, c1, d1, EPS)
    a2, b2, c2, d2 = _over_sum(a2, b2, c2, d2, EPS)
    a3, b3, c3, d3 = _over_sum(a3, b3, c3, d3, EPS)
    for _ in range(ITERS - 1):
        a0, a1, a2, a3 = _over_sum(a0, a1, a2, a3, EPS)
        b0, b1, b2, b3 = _over_sum(b0, b1, b2, b3, EPS)
        c0, c1, c2, c3 = _over_sum(c0, c1, c2, c3, EPS)
        d0, d1, d2, d3 = _over_sum(d0, d1, d2, d3, EPS)
        a0, b0, c0, d0 = _over_sum(a0, b0, c0, d0, EPS)
        a1, b1, c1, d1 = _over_sum(a1, b1, c1, d1, EPS)
        a2, b2, c2, d2 = _over_sum(a2, b2, c2, d2, EPS)
        a3, b3, c3, d3 = _over_sum(a3, b3, c3, d3, EPS)
    to = comb_ptr + token.to(tl.int64) * 16
    _store4(to, a0, a1, a2, a3, live)
    _store4(to + 4, b0, b1, b2, b3, live)
    _store4(to + 8, c0, c1, c2, c3, live)
    _store4(to + 12, d0, d1, d2, d3, live)


@triton.jit
def _store4(to, a, b, c, d, live):
    tl.store(to, a, mask=live)
    tl.store(to + 1, b, mask=live)
    tl.store(to + 2, c, mask=live)
    tl.store(to + 3, d, mask=live)


@triton.jit
def _write_collapsed(
    x_ptr, part_ptr, scale_ptr, base_ptr, w_ptr, y_ptr, normed_ptr, tokens, token, block,
    x_st, x_sh, D: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, NORM_EPS: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, Y_EPS: tl.constexpr, HAS_W: tl.constexpr, KEEP_Y: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """A block of one token's y and, where the block is the row, its norm."""
    col = block * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    row = x_ptr + token.to(tl.int64) * x_st + col
    x0 = tl.load(row, mask=inside, other=0.0)
    x1 = tl.load(row + x_sh, mask=inside, other=0.0)
    x2 = tl.load(row + 2 * x_sh, mask=inside, other=0.0)
    x3 = tl.load(row + 3 * x_sh, mask=inside, other=0.0)
    one = token + tl.arange(0, 1)
    z = activated(part_ptr, scale_ptr, base_ptr, one, one < tokens, tokens, 4 * D, OUT, N,
                  GROUPS, CHUNKS, NORM_EPS, 1, True)  # fmt: skip
    pre = sigmoid(z) + EPS
    y = column(pre, 0, N) * x0.to(tl.float32)
    y += column(pre, 1, N) * x1.to(tl.float32)
    y += column(pre, 2, N) * x2.to(tl.float32)
    y += column(pre, 3, N) * x3.to(tl.float32)
    to = token.to(tl.int64) * D + col
    if KEEP_Y:
        tl.store(y_ptr + to, narrow(y, y_ptr.dtype.element_ty), mask=inside)
    if NORM != 0:
        if not PRECISE:
            y = round_to(y, x0.dtype)
        kind: tl.constexpr = normed_ptr.dtype.element_ty
        rows = tl.reshape(tl.where(inside, y, 0.0), (1, BLOCK))
        w = tl.load(w_ptr + col, mask=inside, other=0.0) if HAS_W else 0.0
        total = tl.sum(squares(rows, NORM, PRECISE, x0.dtype), axis=1)
        rstd = reciprocal_rms(total, D, NORM, Y_EPS, PRECISE, x0.dtype)
        rows = scaled(rows, rstd, w, HAS_W, NORM, PRECISE, x0.dtype, kind)
        tl.store(normed_ptr + to, narrow(tl.reshape(rows, (BLOCK,)), kind), mask=inside)


@stores(y_ptr="KEEP_Y", normed_ptr="NORM", post_ptr="WEIGHTS", comb_ptr="WEIGHTS")
@triton.jit(do_not_specialize=("tokens", "weight_programs"))
def finish_kernel(
    x_ptr, part_ptr, scale_ptr, base_ptr, w_ptr, y_ptr, normed_ptr, post_ptr, comb_ptr,
    tokens, weight_programs, x_st, x_sh,
    D: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, ITERS: tl.constexpr,
    NORM_EPS: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, Y_EPS: tl.constexpr,
    HAS_W: tl.constexpr, KEEP_Y: tl.constexpr, PRECISE: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The first programs write ROWS tokens' post and comb, each other BLOCK of one token's y.

    Without WEIGHTS there are no such programs, and no code that torch would believe writes them.
    """
    pid = tl.program_id(0)
    place = pid - weight_programs
    if WEIGHTS:
        if place < 0:
            tokens_of = pid * ROWS + tl.arange(0, ROWS)
            live = tokens_of < tokens
            z = activated(part_ptr, scale_ptr, base_ptr, tokens_of, live, tokens, 4 * D, OUT, N,
                          GROUPS, CHUNKS, NORM_EPS, ROWS, False)  # fmt: skip
            _write_weights(z, post_ptr, comb_ptr, tokens_of, live, N, EPS, ITERS)
    if place >= 0:
        SPLIT: tl.constexpr = (D + BLOCK - 1) // BLOCK
        place = tokens * SPLIT - 1 - place  # what was read last is still in L2
        _write_collapsed(
            x_ptr, part_ptr, scale_ptr, base_ptr, w_ptr, y_ptr, normed_ptr, tokens, place // SPLIT,
            place % SPLIT, x_st, x_sh, D, BLOCK, OUT, N, GROUPS, CHUNKS, NORM_EPS, EPS, NORM,
            Y_EPS, HAS_W, KEEP_Y, PRECISE,
        )  # fmt: skip
