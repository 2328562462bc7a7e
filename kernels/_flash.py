"""Flash attention with a sink on one tensor that is keys and values of all heads: device code.

One program takes ``TOKENS`` queries × ``HEADS`` heads (64 rows on large models: one token) through
tiles of ``BLOCK`` keys, with fp32 logits, running maximum, denominator and accumulator. A tile of
keys is loaded once and is both operands. Keys lie in two places, each of which may be empty: *near*
ones in a row, ``kv[b, s, t]``, and *far* ones by index, ``far[b, index[b, s, k]]``; so a gathered
tensor never lies in memory. One mask covers both, ``[b, s, near + far]``.

Near tiles in which the mask leaves no query a key are not loaded: ``live_tiles_kernel`` lists the
others. Few queries are spread over more programs by splitting the tiles; ``merge_kernel`` joins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import long, max_nan, narrow, round_to
from ._stores import stores

LOG2E = tl.constexpr(1.4426950408889634)
# A logit at or below it has no weight beside a sink above SMALL: exp underflows to 0.
BARRED = tl.constexpr(-1e30)
SMALL = tl.constexpr(-1e29)


@triton.jit
def _barred(x, MASK: tl.constexpr):
    """Is a key hidden, by its mask? x: the mask's value; NaN hides nothing."""
    if MASK == 1:
        return x.to(tl.float32) <= BARRED
    else:
        if MASK == 2:
            return x == 0
        else:
            return x != 0


@triton.jit
def _logits(s, x, inside, SCALE: tl.constexpr, FILL: tl.constexpr, MASK: tl.constexpr,
            P: tl.constexpr, C: tl.constexpr, M: tl.constexpr, dtype: tl.constexpr):
    """Scores → logits, rounded after product (P), scale (C) and mask (M) where the module does.

    x: the mask's values. FILL: what a hidden key's logit is; 0 stands for -inf, which is no literal
    in generated code.
    """
    if P:
        s = round_to(s, dtype)
    s = s * SCALE
    if C:
        s = round_to(s, dtype)
    if MASK == 1:
        s += x.to(tl.float32)
        if M:
            s = round_to(s, dtype)
    if MASK > 1:
        hidden = _barred(x, MASK)
        if FILL == 0.0:
            s = tl.where(hidden, float("-inf"), s)
        else:
            s = tl.where(hidden, FILL, s)
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _weights(s, top, m):
    """Weights by a new maximum, not divided yet, and by what earlier ones are to be multiplied."""
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet: exp(-inf - 0) = 0
    return tl.exp2((s - base[:, None]) * LOG2E), tl.exp2((m - base) * LOG2E)


@triton.jit
def _share(m, den, sink, NAN_EMPTY: tl.constexpr):
    """By what a row is to be multiplied, the sink among its weights."""
    top = max_nan(m, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp2((m - base) * LOG2E)
    den = den * decay + tl.exp2((sink - base) * LOG2E)
    if NAN_EMPTY:
        den = tl.where(m == float("-inf"), float("nan"), den)
    return decay / den


@triton.jit
def _step(q, k, at, inside, some, m, den, acc, SCALE: tl.constexpr, FILL: tl.constexpr,
          MASK: tl.constexpr, P: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
          WIDE: tl.constexpr):  # fmt: skip
    """One tile of keys into (maximum, denominator, accumulator).

    ``some`` is true. Triton gives a product whose result it sees run into another one all warps
    along the rows, here twice as many as there are rows; a branch hides the second product.
    """
    if some:
        s = tl.dot(q, tl.trans(k))
    else:  # never taken; of products in both branches no layout is computed twice
        s = tl.dot(q, tl.trans(k)) * 2.0
    x = tl.load(at, mask=inside, other=0) if MASK else 0.0
    s = _logits(s, x, inside, SCALE, FILL, MASK, P, C, M, q.dtype)
    top = tl.maximum(m, tl.max(s, 1))
    p, decay = _weights(s, top, m)
    den = den * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    high = p.to(k.dtype)
    acc = tl.dot(high, k, acc)
    if WIDE:  # weights that the module keeps in fp32: their remainder is a second product
        acc = tl.dot((p - high.to(tl.float32)).to(k.dtype), k, acc)
    return top, den, acc


# Neither a count of tokens or keys nor a stride that follows one may recompile the kernels.
@stores(part_ptr="SPLIT", stat_ptr="SPLIT", out_ptr="not SPLIT")
@triton.jit(do_not_specialize=(
    "length", "blocks", "near", "far", "rows", "pages", "most", "m_sb", "m_ss", "i_sb", "i_ss",
    "p_sb", "p_ss",
))  # fmt: skip
def attention_kernel(
    q_ptr, kv_ptr, far_ptr, index_ptr, page_ptr, mask_ptr, sink_ptr, out_ptr, part_ptr, stat_ptr,
    tiles_ptr, count_ptr, length, blocks, near, far, rows, pages, most,
    q_sb, q_ss, q_sh, kv_sb, kv_ss, kv_st, far_sb, far_st, i_sb, i_ss, i_sk, p_sb, p_ss,
    m_sb, m_ss, m_st, sink_sh, o_sb, o_ss, o_sh,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr,
    PAGED: tl.constexpr, WRAP: tl.constexpr, SPLIT: tl.constexpr, LIST: tl.constexpr,
    SCALE: tl.constexpr,
    FILL: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    WIDE: tl.constexpr, NAN_EMPTY: tl.constexpr,
):  # fmt: skip
    """Program (token block × part of the heads, split); WIDTH heads × TOKENS tokens are rows."""
    PARTS: tl.constexpr = (HEADS + WIDTH - 1) // WIDTH
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # late tokens see most keys: they start first
    block = pid // PARTS
    row = tl.arange(0, TOKENS * WIDTH)
    head = (pid % PARTS) * WIDTH + row % WIDTH
    b = (block // blocks).to(tl.int64)
    first = (block % blocks) * TOKENS
    s = first.to(tl.int64) + row // WIDTH
    live = (s < length) & (head < HEADS)
    d = tl.arange(0, LANES)
    q = tl.load(
        q_ptr + (b * q_sb + s * q_ss + head.to(tl.int64) * q_sh)[:, None] + d[None, :],
        mask=live[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    tiles = tl.cdiv(near, BLOCK) if NEAR else 0
    if LIST:
        tiles = tl.load(count_ptr + block)
    lo, hi = 0, tiles + (tl.cdiv(far, BLOCK) if FAR else 0)
    if SPLIT:
        each = tl.cdiv(hi, tl.num_programs(1))
        lo = tl.minimum(each * tl.program_id(1), hi)
        hi = tl.minimum(lo + each, hi)
    m = tl.full([TOKENS * WIDTH], float("-inf"), tl.float32)
    den = tl.zeros([TOKENS * WIDTH], tl.float32)
    acc = tl.zeros([TOKENS * WIDTH, LANES], tl.float32)
    lane = tl.arange(0, BLOCK)
    if TOKENS == 1:  # one row of the mask for all heads
        m_at = mask_ptr + b * m_sb + first.to(tl.int64) * m_ss + tl.zeros([1], tl.int64)
        known = tl.full([1], 1, tl.int1)
    else:
        m_at = mask_ptr + b * m_sb + s * m_ss
        known = s < length
    if NEAR:
        kv_at = kv_ptr + b * kv_sb + first.to(tl.int64) * kv_ss
        number_at = tiles_ptr + block.to(tl.int64) * most
        last = tl.maximum(tl.minimum(hi, tiles) - 1, 0)
        number = tl.minimum(lo, last)
        if LIST:
            number = tl.load(number_at + number)
        for i in range(tl.minimum(lo, tiles), tl.minimum(hi, tiles)):
            t = (number if LIST else i) * BLOCK + lane
            if LIST:  # one tile ahead of the load that needs it
                number = tl.load(number_at + tl.minimum(i + 1, last))
            k = tl.load(kv_at + t.to(tl.int64)[:, None] * kv_st + d[None, :],
                        mask=(t < near)[:, None] & (d < D)[None, :], other=0.0)
            m, den, acc = _step(
                q, k, m_at[:, None] + t.to(tl.int64)[None, :] * m_st,
                known[:, None] & (t < near)[None, :], length > 0, m, den, acc, SCALE, FILL, MASK,
                P, C, M, WIDE,
            )  # fmt: skip
    if FAR:
        i_at = index_ptr + b * i_sb + first.to(tl.int64) * i_ss
        page = b
        if PAGED:
            page = tl.load(page_ptr + b * p_sb + first.to(tl.int64) * p_ss).to(tl.int64)
            page = tl.where(page < 0, page + pages, page)
        far_at = far_ptr + page * far_sb
        m_far = m_at
        if NEAR:
            m_far += long(near) * m_st
        for i in range(tl.maximum(lo, tiles) - tiles, tl.maximum(hi, tiles) - tiles):
            t = i * BLOCK + lane
            index = tl.load(i_at + t * i_sk, mask=t < far, other=-1).to(tl.int64)
            if WRAP:
                index = tl.where((index < 0) & (t < far), index + rows, index)
            seen = (index >= 0) & (index < rows) & (page < pages)
            k = tl.load(far_at + (tl.where(seen, index, 0) * far_st)[:, None]
                        + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
            m, den, acc = _step(
                q, k, m_far[:, None] + t.to(tl.int64)[None, :] * m_st,
                known[:, None] & seen[None, :], length > 0, m, den, acc, SCALE, FILL, MASK, P, C, M,
                WIDE,
            )  # fmt: skip
    if SPLIT:
        at = (tl.program_id(1) * tl.num_programs(0) + pid).to(tl.int64) * (TOKENS * WIDTH) + row
        tl.store(part_ptr + at[:, None] * LANES + d[None, :], acc)
        tl.store(stat_ptr + at * 2, m)
        tl.store(stat_ptr + at * 2 + 1, den)
    else:
        # The sink comes last: a maximum that starts from memory costs the loop a better layout.
        sink = tl.load(sink_ptr + head * sink_sh, mask=live, other=0.0).to(tl.float32)
        at = out_ptr + b * o_sb + s * o_ss + head.to(tl.int64) * o_sh
        share = _share(m, den, sink, NAN_EMPTY)
        y = narrow(acc * share[:, None], out_ptr.dtype.element_ty)
        tl.store(at[:, None] + d[None, :], y, mask=live[:, None] & (d < D)[None, :])


@stores("out_ptr")
@triton.jit(do_not_specialize=("length", "blocks", "all_rows", "splits"))
def merge_kernel(
    part_ptr, stat_ptr, sink_ptr, out_ptr, length, blocks, all_rows, splits, sink_sh, o_sb,
    o_ss, o_sh,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr,
    NAN_EMPTY: tl.constexpr,
):  # fmt: skip
    """ROWS rows × STEP lanes: the splits' accumulators by their maxima, the sink among them.

    Split by split: the order of a reduction would be left to a layout, and hang on the strides.
    """
    PARTS: tl.constexpr = (HEADS + WIDTH - 1) // WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pid = row // (TOKENS * WIDTH)
    head = (pid % PARTS) * WIDTH + row % WIDTH
    block = pid // PARTS
    s = (block % blocks) * TOKENS + (row % (TOKENS * WIDTH)) // WIDTH
    live = (row < all_rows) & (head < HEADS) & (s < length)
    sink = tl.load(sink_ptr + head * sink_sh, mask=live, other=0.0).to(tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    for i in tl.static_range(MOST):
        at = i * long(all_rows) + row
        there = live & (i < splits)
        m = tl.maximum(m, tl.load(stat_ptr + at * 2, mask=there, other=float("-inf")))
    top = max_nan(m, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2((sink - base) * LOG2E)
    d = tl.program_id(1) * STEP + tl.arange(0, STEP)
    y = tl.zeros([ROWS, STEP], tl.float32)
    for i in tl.static_range(MOST):
        at = i * long(all_rows) + row
        there = live & (i < splits)
        stat = stat_ptr + at * 2
        decay = tl.load(stat, mask=there, other=float("-inf"))
        decay = tl.exp2((decay - base) * LOG2E)
        total = tl.fma(tl.load(stat + 1, mask=there, other=0.0), decay, total)
        part = tl.load(part_ptr + (at * LANES)[:, None] + d[None, :], mask=there[:, None],
                       other=0.0)
        y = tl.fma(part, tl.broadcast_to(decay[:, None], (ROWS, STEP)), y)
    if NAN_EMPTY:
        total = tl.where(m == float("-inf"), float("nan"), total)
    at = (block // blocks).to(tl.int64) * o_sb + s.to(tl.int64) * o_ss + head.to(tl.int64) * o_sh
    y = (y / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] + d[None, :], y, mask=live[:, None] & (d < D)[None, :])


@stores("tiles_ptr", "count_ptr")
@triton.jit(do_not_specialize=("length", "blocks", "keys", "most", "m_sb", "m_ss"))
def live_tiles_kernel(
    mask_ptr, sink_ptr, tiles_ptr, count_ptr, length, blocks, keys, most, m_sb, m_ss, m_st,
    sink_sh,
    HEADS: tl.constexpr, HLANES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Which tiles of keys one block of tokens needs: their numbers in order, and how many.

    Finite masks hide a key only beside a sink; a sink of -inf keeps them all."""
    block = tl.program_id(0)
    h = tl.arange(0, HLANES)
    sink = tl.load(sink_ptr + h * sink_sh, mask=h < HEADS, other=0.0).to(tl.float32)
    bare = (tl.min(sink, 0) < SMALL).to(tl.int32)
    at = mask_ptr + (block // blocks).to(tl.int64) * m_sb
    found = 0
    for start in range(0, keys, CHUNK * BLOCK):
        t = start + tl.arange(0, CHUNK * BLOCK)
        needed = tl.zeros([CHUNK * BLOCK], tl.int32)
        for i in tl.static_range(TOKENS):
            s = (block % blocks) * TOKENS + i
            inside = (t < keys) & (s < length)
            x = tl.load(at + s.to(tl.int64) * m_ss + t.to(tl.int64) * m_st, mask=inside, other=0)
            hidden = tl.where(_barred(x, MASK), 1 - bare, 0)
            needed = tl.where(inside & (hidden == 0), 1, needed)
        flag = tl.max(tl.reshape(needed, (CHUNK, BLOCK)), 1)
        place = block.to(tl.int64) * most + found + tl.cumsum(flag, 0) - 1
        tl.store(tiles_ptr + place, start // BLOCK + tl.arange(0, CHUNK), mask=flag > 0)
        found += tl.sum(flag, 0)
    tl.store(count_ptr + block, found)
