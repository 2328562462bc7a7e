"""The kernel of moe_router and moe_router_hash: scores, a choice in registers, weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ._common import INTERPRET, max_nan, narrow, round_few, round_to
from ._stores import stores

FUNCS = {
    "sigmoid": 0, "softmax": 1, "sqrt_softplus": 2, "sqrt_log1p_exp": 3, "sqrt_stable": 4,
    "sqrt_log_exp": 5,
}  # fmt: skip
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOWEST = tl.constexpr(-0x80000000)  # below the key of -inf


@triton.jit
def _round(x, KIND: tl.constexpr):
    """fp32 to one of DTYPES and back, for a tile."""
    if KIND == 1:
        return round_to(x, tl.bfloat16)
    elif KIND == 2:
        return round_to(x, tl.float16)
    else:
        return x


@triton.jit
def _round_few(x, KIND: tl.constexpr):
    if KIND == 1:
        return round_few(x, tl.bfloat16)
    elif KIND == 2:
        return round_few(x, tl.float16)
    else:
        return x


@triton.jit
def _exp(x):
    if INTERPRET:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def _log1p(e):
    """ATen's log1pf for e in [0, inf]: libdevice's, but its Triton build flushes subnormals.

    ``1 + e = 2^k · (1 + m)`` with m in [-0.25, 0.5), then a polynomial; no branch for other e.
    """
    if INTERPRET:
        u = 1.0 + e
        y = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        k = (libdevice.add_rz(e, 1.0).to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000
        m = (e.to(tl.int32, bitcast=True) - k).to(tl.float32, bitcast=True)
        quarter = tl.full((), 0.25, tl.float32)
        m += tl.fma((0x40800000 - k).to(tl.float32, bitcast=True), quarter, -1.0)
        p = tl.fma(m, -0.0453486145, 0.105468884)
        p = tl.fma(p, m, -0.132297039)
        p = tl.fma(p, m, 0.144914463)
        p = tl.fma(p, m, -0.166415647)
        p = tl.fma(p, m, 0.199888676)
        p = tl.fma(p, m, -0.250001967)
        p = tl.fma(p, m, 0.333335102)
        p = tl.fma(p, m, -0.5)
        y = tl.fma(m * p, m, m)
        y = tl.fma(k.to(tl.float32) * 1.1920929e-07, 0.693147182, y)
    return tl.where(e < float("inf"), y, e)  # inf and NaN as they are


@triton.jit
def _log_exp(x):
    """log(1 + exp(x)), the sum rounded before the logarithm."""
    if INTERPRET:
        return tl.log(1.0 + tl.exp(x))
    else:
        return libdevice.log(libdevice.add_rn(libdevice.exp(x), 1.0))


@triton.jit
def score(x, peak, total, FUNC: tl.constexpr, SD: tl.constexpr):
    """The scores of fp32 logits; peak and total are softmax's, which broadcast against x."""
    if FUNC == 0:
        y = tl.div_rn(1.0, 1.0 + _exp(-x))
    elif FUNC == 1:
        e = _exp(x - peak)
        e, total = tl.broadcast(e, total)
        y = tl.div_rn(e, total)
    else:
        if FUNC == 2:
            y = tl.where(x > 20.0, x, _log1p(_exp(x)))
        elif FUNC == 3:
            y = _log1p(_exp(x))
        elif FUNC == 4:
            y = max_nan(x, 0.0) + _log1p(_exp(0.0 - tl.abs(x)))
        else:
            y = _log_exp(x)
        y = tl.sqrt_rn(_round(y, SD))
    return _round(y, SD)


@triton.jit
def rank_keys(x, bias, col, peak, total, E: tl.constexpr, FUNC: tl.constexpr,
              HAS_BIAS: tl.constexpr, SD: tl.constexpr, BD: tl.constexpr):
    """int32 that order as score + bias does, NaN above all; the lowest of all beyond E."""
    s = score(x, peak, total, FUNC, SD)
    if HAS_BIAS:
        s = _round(s + bias[None, :], BD)
    bits = s.to(tl.int32, bitcast=True)
    key = tl.where(s == s, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return tl.where((col < E)[None, :], key, LOWEST)


@triton.jit
def largest(key, tail, TAIL: tl.constexpr):
    best = tl.max(key, axis=1)
    if TAIL > 0:
        best = tl.maximum(best, tl.max(tail, axis=1))
    return best


@triton.jit
def lowest_at(key, tail, best, col, col_tail, TAIL: tl.constexpr):
    """The lowest column of each row that holds ``best``."""
    at = tl.min(tl.where(key == best[:, None], col[None, :], 0x10000), axis=1)
    if TAIL > 0:
        other = tl.where(tail == best[:, None], col_tail[None, :], 0x10000)
        at = tl.minimum(at, tl.min(other, axis=1))
    return at


@triton.jit
def per_slot(x, ROWS: tl.constexpr):
    """``[ROWS]`` against ``[ROWS, KP]``. A lone row as a scalar: then each slot gets a lane of its
    own, where the layout of a row would put 4 or 8 of them in every lane."""
    if ROWS == 1:
        return tl.sum(x, axis=0)
    else:
        return x[:, None]


@triton.jit
def choose(key, tail, col, col_tail, slot, live, K: tl.constexpr, KP: tl.constexpr,
           ROWS: tl.constexpr, TAIL: tl.constexpr, ORDERED: tl.constexpr):
    """The columns of the K largest keys, int32 ``[ROWS, KP]``.

    First as if no two keys were equal: where each is does not hold up the search for the next.
    """
    chosen = tl.full((ROWS, KP), 0, tl.int32)
    picked = tl.full((ROWS, KP), 0, tl.int32)
    best = largest(key, tail, TAIL)
    for j in tl.static_range(K):
        if j > 0:
            under = tl.where(key < best[:, None], key, LOWEST)
            if TAIL > 0:
                best = largest(under, tl.where(tail < best[:, None], tail, LOWEST), TAIL)
            else:
                best = largest(under, under, TAIL)
        at = lowest_at(key, tail, best, col, col_tail, TAIL)
        chosen = tl.where((slot == j)[None, :], per_slot(at, ROWS), chosen)
        if not ORDERED:
            picked = tl.where((slot == j)[None, :], per_slot(best, ROWS), picked)
    count = tl.sum((key >= best[:, None]).to(tl.int32), axis=1)
    if TAIL > 0:
        count += tl.sum((tail >= best[:, None]).to(tl.int32), axis=1)
    equal = live & ((count > K) | (best == LOWEST))
    if tl.max(equal.to(tl.int32), axis=0) > 0:  # then the keys one at a time
        for j in tl.static_range(K):
            best = largest(key, tail, TAIL)
            at = lowest_at(key, tail, best, col, col_tail, TAIL)
            key = tl.where(col[None, :] == at[:, None], LOWEST, key)
            if TAIL > 0:
                tail = tl.where(col_tail[None, :] == at[:, None], LOWEST, tail)
            chosen = tl.where((slot == j)[None, :], per_slot(at, ROWS), chosen)
            if not ORDERED:
                picked = tl.where((slot == j)[None, :], per_slot(best, ROWS), picked)
    if not ORDERED:
        order = chosen + tl.where(picked == per_slot(best, ROWS), 0x10000, 0)
        order = tl.where((slot < K)[None, :], order, 0x20000)
        chosen = tl.sort(order, dim=1) & 0xFFFF
    return chosen


@triton.jit
def weigh(w, in_k, NORMALISE: tl.constexpr, EPS: tl.constexpr, BOUNDED: tl.constexpr,
          SCALE: tl.constexpr, WD: tl.constexpr):
    """``atoms.router_weights`` of fp32 scores ``[ROWS, KP]``."""
    if NORMALISE:
        total = _round_few(tl.sum(tl.where(in_k, w, 0.0), axis=1), WD)
        eps = tl.full((), EPS, tl.float32)
        if BOUNDED:
            total = max_nan(total, _round_few(eps, WD))
        else:
            total = _round_few(total + eps, WD)
        w, total = tl.broadcast(w, total[:, None])
        w = _round_few(tl.div_rn(w, total), WD)
    return _round_few(w * tl.full((), SCALE, tl.float32), WD)


@triton.jit
def load_row(base, live, col, step, E: tl.constexpr):
    inside = live[:, None] & (col < E)[None, :]
    return tl.load(base + col[None, :] * step, mask=inside, other=float("-inf")).to(tl.float32)


@stores("weight_ptr", "expert_ptr")
@triton.jit(do_not_specialize=("tokens",))
def moe_router_kernel(
    logits_ptr, bias_ptr, table_ptr, ids_ptr, weight_ptr, expert_ptr, tokens, vocab,
    l_st, l_se, t_sv, t_sk, i_st,
    E: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    ROWS: tl.constexpr, FUNC: tl.constexpr, HASH: tl.constexpr, HAS_BIAS: tl.constexpr,
    ORDERED: tl.constexpr, SD: tl.constexpr, BD: tl.constexpr, WD: tl.constexpr,
    NORMALISE: tl.constexpr, EPS: tl.constexpr, BOUNDED: tl.constexpr, SCALE: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens. A row is BLOCK columns and a TAIL: 384 is 256 + 128, not 512."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens
    t = row.to(tl.int64)
    base = logits_ptr + t[:, None] * l_st
    slot = tl.arange(0, KP)
    col = tl.arange(0, BLOCK)
    peak = tl.zeros((ROWS,), tl.float32)
    total = peak
    x = tl.zeros((ROWS, BLOCK), tl.float32)
    col_tail, x_tail = col, x
    bias = tl.zeros((BLOCK,), tl.float32)
    bias_tail = bias
    if FUNC == 1 or not HASH:
        x = load_row(base, live, col, l_se, E)
        if TAIL > 0:
            col_tail = BLOCK + tl.arange(0, TAIL)
            x_tail = load_row(base, live, col_tail, l_se, E)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col, mask=col < E, other=0.0).to(tl.float32)
        if TAIL > 0:
            bias_tail = tl.load(bias_ptr + col_tail, mask=col_tail < E, other=0.0).to(tl.float32)
    if FUNC == 1:
        peak = tl.max(x, axis=1)
        if TAIL > 0:
            peak = tl.maximum(peak, tl.max(x_tail, axis=1))
        total = tl.sum(_exp(x - peak[:, None]), axis=1)
        if TAIL > 0:
            total += tl.sum(_exp(x_tail - peak[:, None]), axis=1)
    if HASH:
        token = tl.load(ids_ptr + t * i_st, mask=live, other=0).to(tl.int64)
        token = tl.where(token < 0, token + vocab, token)
        known = live & (token >= 0) & (token < vocab)
        at = table_ptr + token[:, None] * t_sv + slot[None, :] * t_sk
        chosen = tl.load(at, mask=known[:, None] & (slot < K)[None, :], other=-1)
    else:
        key = rank_keys(x, bias, col, peak[:, None], total[:, None], E, FUNC, HAS_BIAS, SD, BD)
        tail = key
        if TAIL > 0:
            tail = rank_keys(x_tail, bias_tail, col_tail, peak[:, None], total[:, None], E, FUNC,
                             HAS_BIAS, SD, BD)
        chosen = choose(key, tail, col, col_tail, slot, live, K, KP, ROWS, TAIL, ORDERED)
    in_k = live[:, None] & (slot < K)[None, :]
    found = in_k
    if HASH:
        found = in_k & (chosen >= 0) & (chosen < E)
    x = tl.load(base + chosen * l_se, mask=found, other=float("nan")).to(tl.float32)
    if PRECISE:
        w = score(x, per_slot(peak, ROWS), per_slot(total, ROWS), FUNC if FUNC < 2 else 4, 0)
    else:
        w = score(x, per_slot(peak, ROWS), per_slot(total, ROWS), FUNC, SD)
    w = weigh(w, in_k, NORMALISE, EPS, BOUNDED, SCALE, 0 if PRECISE else WD)
    out = t[:, None] * K + slot[None, :]
    tl.store(weight_ptr + out, narrow(w, weight_ptr.dtype.element_ty), mask=in_k)
    tl.store(expert_ptr + out, chosen.to(tl.int64), mask=in_k)
