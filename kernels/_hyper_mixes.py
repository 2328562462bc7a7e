"""The product of hyper-connections: streams times fn, and their sum of squares, in pieces of K."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import INTERPRET
from ._stores import stores


@stores("parts_ptr")
@triton.jit
def split_kernel(fn_ptr, parts_ptr, size, fn_so, K: tl.constexpr, BLOCK: tl.constexpr):
    """fn ``[size / K, K]`` as three bf16 ``[3, size]`` whose sum it is: 3 · 8 bits hold 24."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(fn_ptr + at // K * fn_so + at % K, mask=at < size, other=0.0)
    low, middle, high = thirds(f)
    tl.store(parts_ptr + at, low, mask=at < size)
    tl.store(parts_ptr + size + at, middle, mask=at < size)
    tl.store(parts_ptr + 2 * size + at, high, mask=at < size)


@triton.jit
def thirds(f):
    f = f.to(tl.float32)
    high = f.to(tl.bfloat16)
    rest = f - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return (rest - middle.to(tl.float32)).to(tl.bfloat16), middle, high


@triton.jit
def product(x, f_at, size, has, READY: tl.constexpr):
    """``x @ f`` to fp32's accuracy, x ``[T, K]``, f ``[K, N]``; products of bf16 are exact.

    READY: f is there as its thirds, ``size`` elements apart.
    """
    if x.dtype != tl.bfloat16:
        f = tl.load(f_at, mask=has, other=0.0).to(tl.float32)
        return tl.dot(x.to(tl.float32), f, input_precision="ieee")
    else:
        if READY:
            low = tl.load(f_at, mask=has, other=0.0)
            middle = tl.load(f_at + size, mask=has, other=0.0)
            high = tl.load(f_at + 2 * size, mask=has, other=0.0)
        else:
            low, middle, high = thirds(tl.load(f_at, mask=has, other=0.0))
        if INTERPRET:
            x = x.to(tl.float32)
            low, middle, high = low.to(tl.float32), middle.to(tl.float32), high.to(tl.float32)
        return tl.dot(x, high, tl.dot(x, middle, tl.dot(x, low)))


@triton.jit
def sum_of_squares(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, axis=1)


@stores("part_ptr")
@triton.jit(do_not_specialize=("tokens",))
def mixes_kernel(
    x_ptr, fn_ptr, part_ptr, tokens, x_st, x_sh, fn_so,
    D: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
    CHUNKS: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, READY: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens × CHUNKS neighbouring pieces of K; their sums ``[part, T, N]``.

    Columns 0..OUT are the product's, column OUT the sum of squares.
    """
    pid = tl.program_id(0)
    part = pid % PARTS
    token = (pid // PARTS) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    out = tl.arange(0, N)
    has = (out < OUT)[None, :]
    lane = tl.arange(0, STEP)
    rows = x_ptr + token.to(tl.int64)[:, None] * x_st + lane[None, :]
    columns = fn_ptr + out[None, :] * fn_so + lane[:, None]
    total = tl.zeros((TOKENS, N), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for c in range(CHUNKS):
        first = (part * CHUNKS + c) * STEP
        # A piece lies within one stream. Without the hint its loads are of two bytes each.
        offset = first // D * x_sh + tl.multiple_of(first % D, STEP)
        x = tl.load(rows + offset, mask=live[:, None], other=0.0)
        total += product(x, columns + first, OUT * fn_so, has, READY)
        squares += sum_of_squares(x)
    total = tl.where((out == OUT)[None, :], squares[:, None], total)
    at = part_ptr + (part.to(tl.int64) * tokens + token)[:, None] * N + out[None, :]
    tl.store(at, total, mask=live[:, None])
