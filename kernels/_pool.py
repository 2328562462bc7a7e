"""One window of compress_kv pooled per channel: all of its rows at once, or a few at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import INTERPRET, mul_rn, round_to


@triton.jit
def cache_rows(first, n, W: tl.constexpr, RING: tl.constexpr):
    """Where a cache keeps the positions ``first + n``, int32, n < W: modulo RING, or 0 below 0."""
    if RING >= W:
        row = (first % RING + RING) % RING + n  # first's sign is that of the remainder
        return tl.where(row >= RING, row - RING, row)
    elif RING > 0:
        return ((first + n) % RING + RING) % RING
    else:
        return tl.maximum(first + n, 0)


@triton.jit
def load_tile(ptr, offset, row, stride, col, there, other: tl.constexpr):
    """fp32 rows ``[.., BLOCK]``, one for each of ``row`` ``[..]``."""
    at = offset + row.to(tl.int64) * stride
    return tl.load(ptr + tl.expand_dims(at, -1) + col, mask=there, other=other).to(tl.float32)


@triton.jit
def biased(gate, ptr, row, stride, col, there, HAS: tl.constexpr, ND: tl.constexpr):
    """gate + bias in fp32, rounded to ND."""
    if HAS:
        return round_to(gate + load_tile(ptr, 0, row, stride, col, there, 0.0), ND)
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
        row = cache_rows(end - (WIDTH - 1), row, WIDTH, RING)
        kv_at, gate_at = page * kv_sb, page * gate_sb
    g = load_tile(gate_ptr, gate_at, row, gate_sw, col, now, 0.0)
    x = load_tile(kv_ptr, kv_at, row, kv_sw, col, now, 0.0)
    g = biased(g, bias_ptr, tl.arange(0, WIDTH), bias_sw, col, now, HAS_BIAS, GD)
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
            row = cache_rows(first, row, BEFORE, RING)
            kv_at, gate_at = page * kvb_sb, page * gateb_sb
            if MASKED:
                there = old & (first + tl.arange(0, BEFORE) >= 0)[:, None]
        gb = load_tile(gateb_ptr, gate_at, row, gateb_sw, col, there, 0.0)
        xb = load_tile(kvb_ptr, kv_at, row, kvb_sw, col, there if SHIFTED else old, 0.0)
        gb = biased(gb, biasb_ptr, tl.arange(0, BEFORE), biasb_sw, col, old, HAS_BIAS, GD)
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
def load_rows(
    kv_ptr, gate_ptr, bias_ptr, kv_at, gate_at, kv_sw, gate_sw, bias_sw, col, first, start,
    reachable, W: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr, GATHER: tl.constexpr,
    RING: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, GD: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """TILES tiles ``[STEP, BLOCK]`` of gates and of kv, from row ``start`` of W on.

    ``first``: the position of row 0. ``reachable`` False: no row has weight.
    """
    gates, rows = (), ()
    inside = (col < D)[None, :] & reachable
    for k in tl.static_range(TILES):
        n = start + k * STEP + tl.arange(0, STEP)
        row, there = n, inside
        if GATHER:
            row = cache_rows(first, n, W, RING)
            if MASKED:
                there = inside & (first + n >= 0)[:, None]
        g = load_tile(gate_ptr, gate_at, row, gate_sw, col, there, float("-inf"))
        rows += (load_tile(kv_ptr, kv_at, row, kv_sw, col, inside, 0.0),)
        gates += (biased(g, bias_ptr, n, bias_sw, col, there, HAS_BIAS, GD),)
    return gates, rows


@triton.jit
def add_rows(top, total, y, gates, rows, COUNT: tl.constexpr, LOADED: tl.constexpr):
    """The running maximum, sum and weighted sum of each place of ``[STEP, BLOCK]``, with COUNT
    tiles more. LOADED: all of these are loaded before the first is looked at.

    No place waits for another one: rows that other warps hold are merged once, at the end.
    """
    if LOADED and not INTERPRET:
        tl.debug_barrier()  # ptxas, to spare registers, moves a load to where it is used
    new = top
    for k in tl.static_range(COUNT):
        new = tl.maximum(new, gates[k])
    safe = tl.where(new == float("-inf"), 0.0, new)
    old = tl.exp(top - safe)
    total *= old
    y *= old
    for k in tl.static_range(COUNT):
        e = tl.exp(gates[k] - safe)
        total += e
        y += rows[k] * e
    return new, total, y


@triton.jit
def pool_by_steps(
    kv_ptr, kvb_ptr, gate_ptr, gateb_ptr, bias_ptr, biasb_ptr, b, s, end, page, col,
    kv_sb, kv_ss, kv_sw, kvb_sb, kvb_ss, kvb_sw, gate_sb, gate_ss, gate_sw,
    gateb_sb, gateb_ss, gateb_sw, bias_sw, biasb_sw,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BEFORE: tl.constexpr,
    STEP: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, SHIFTED: tl.constexpr,
    GATHER: tl.constexpr, RING: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BIAS_NARROW: tl.constexpr, XD: tl.constexpr,
):  # fmt: skip
    """The same with the sums of a few rows at a time, and no rounding at each step."""
    GD: tl.constexpr = gate_ptr.dtype.element_ty if BIAS_NARROW else tl.float32
    top = tl.full((STEP, BLOCK), float("-inf"), tl.float32)
    total = tl.zeros((STEP, BLOCK), tl.float32)
    y = tl.zeros((STEP, BLOCK), tl.float32)
    kv_at, gate_at = b * kv_sb + s * kv_ss, b * gate_sb + s * gate_ss
    kvb_at, gateb_at = b * kvb_sb + s * kvb_ss, b * gateb_sb + s * gateb_ss
    reachable = s >= 0
    if SHIFTED:
        kvb_at, gateb_at, reachable = kvb_at - kvb_ss, gateb_at - gateb_ss, s > 0
    if GATHER:
        kv_at, gate_at, kvb_at, gateb_at = (
            page * kv_sb, page * gate_sb, page * kvb_sb, page * gateb_sb
        )  # fmt: skip
    first = end - (WIDTH - 1)
    for start in tl.range(0, WIDTH, TILES * STEP, num_stages=STAGES):
        gates, rows = load_rows(
            kv_ptr, gate_ptr, bias_ptr, kv_at, gate_at, kv_sw, gate_sw, bias_sw, col, first, start,
            s >= 0, WIDTH, STEP, TILES, GATHER, RING, False, HAS_BIAS, GD, D,
        )  # fmt: skip
        if BEFORE > 0:
            old = load_rows(
                kvb_ptr, gateb_ptr, biasb_ptr, kvb_at, gateb_at, kvb_sw, gateb_sw, biasb_sw, col,
                first - BEFORE, start, reachable, BEFORE, STEP, TILES, GATHER, RING, MASKED,
                HAS_BIAS, GD, D,
            )  # fmt: skip
            gates, rows = gates + old[0], rows + old[1]
        top, total, y = add_rows(
            top, total, y, gates, rows, TILES * (2 if BEFORE > 0 else 1), STAGES == 1
        )
    most = tl.max(top, axis=0)
    share = tl.exp(top - tl.where(most == float("-inf"), 0.0, most)[None, :])
    total = tl.sum(total * share, axis=0)
    y = tl.sum(y * share, axis=0) * tl.div_rn(1.0, total)
    return round_to(tl.where(col < D, y, 0.0), XD)
