"""The arithmetic of SwiGLU, exactly as eager rounds it.

silu's ``x / (1 + exp(-x))`` is an IEEE division there, and of 16-bit values everything but silu
can be done two at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ._common import INTERPRET, max_nan, min_nan, narrow, round_to

# log2(e) in two, the first of 15 bits; the rest times ln(2), so that 1 + x·rest is its power.
LOG2E_HIGH = tl.constexpr(1.44268798828125)
LOG2E_REST = tl.constexpr(4.8884951521436535e-06)
SILU_BF16 = (90,)  # compute capabilities whose ex2 and rcp were tried on all 2^16 values


@triton.jit
def min16(a, b):
    """The minimum of 16-bit floats in their own dtype, two at a time; NaN is kept."""
    if INTERPRET:
        return min_nan(a.to(tl.float32), b.to(tl.float32)).to(a.dtype)
    else:
        BF16: tl.constexpr = a.dtype == tl.bfloat16
        return tl.inline_asm_elementwise(
            "min.NaN.bf16x2 $0, $1, $2;" if BF16 else "min.NaN.f16x2 $0, $1, $2;",
            "=r,r,r", [a, b], a.dtype, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def max16(a, b):
    """The maximum, as ``min16``."""
    if INTERPRET:
        return max_nan(a.to(tl.float32), b.to(tl.float32)).to(a.dtype)
    else:
        BF16: tl.constexpr = a.dtype == tl.bfloat16
        return tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;" if BF16 else "max.NaN.f16x2 $0, $1, $2;",
            "=r,r,r", [a, b], a.dtype, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def mul16(a, b):
    """The product of 16-bit floats, rounded once, two at a time: an FMA that adds -0."""
    if INTERPRET:
        return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)
    else:
        BF16: tl.constexpr = a.dtype == tl.bfloat16
        return tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }" if BF16
            else "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.f16x2 $0, $1, $2, z; }",
            "=r,r,r", [a, b], a.dtype, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _silu_rn(x):
    return tl.div_rn(x, 1.0 + libdevice.exp(-x))


@triton.jit
def _silu_newton(x):
    """The same for x in [-87, inf): a quotient without the range checks of a full division."""
    d = 1.0 + libdevice.exp(-x)
    r = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
    )
    q = x * r
    return tl.fma(tl.fma(q, d, -x), r * -1.0, q)  # negating r keeps the sign of a zero


@triton.jit
def _silu_bf16(x):
    """To 2^-21, x of bf16. log2(e) is LOG2E_HIGH and a rest: the product with the former is exact.

    A sixteenth of 1 + exp(-x), whose reciprocal does not underflow.
    """
    e = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -LOG2E_HIGH], tl.float32, is_pure=True, pack=1
    )
    d = tl.fma(e, tl.fma(x, -LOG2E_REST / 16, 0.0625), 0.0625)
    r = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
    )
    return (x * 0.0625) * r


@triton.jit
def silu(x, MODE: tl.constexpr):
    """``x / (1 + exp(-x))``. MODE 0: fast, 1e-6 relative. 1: the bits of ATen, x fp32.

    2: the bits of ATen where x came from 16 bits (all 2^16 are tested): a tile with a value
    below -87, or infinite, takes the full division, any other one correction of x * rcp(d).
    3: those of ATen once they are rounded to bf16, for any bf16 x below inf, on the GPUs of
    SILU_BF16: within 2^-21 of the middle between two bf16 lie the results of four x only.
    """
    if INTERPRET:
        return x / (1.0 + tl.exp(-x))
    elif MODE == 0:
        return x / (1.0 + tl.exp(-x))
    elif MODE == 1:
        return _silu_rn(x)
    elif MODE == 3:
        return _silu_bf16(x)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == float("inf"), 0xFFFFFFFF, bits)
        y = x
        if tl.max(bits, axis=None) > 0xC2AE0000:
            y = _silu_rn(x)
        else:
            y = _silu_newton(x)
        return y


@triton.jit
def swiglu(gate, up, w, LIMIT: tl.constexpr, HAS_LIMIT: tl.constexpr, PAIRS: tl.constexpr,
           HAS_W: tl.constexpr, STEPS: tl.constexpr, ROUND: tl.constexpr, SILU: tl.constexpr):
    """``[ROWS, BLOCK]`` in fp32; STEPS rounds to the dtype of gate after silu and the product.

    PAIRS: gate, up and the limit are clamped (and multiplied) in 16 bits; where nothing follows,
    the result stays in them.
    """
    DTYPE: tl.constexpr = gate.dtype
    if HAS_LIMIT and PAIRS:
        high = tl.full(gate.shape, LIMIT, tl.float32).to(DTYPE)
        low = tl.full(gate.shape, -LIMIT, tl.float32).to(DTYPE)
        gate = min16(gate, high)
        up = min16(max16(up, low), high)
    g, u = gate.to(tl.float32), up.to(tl.float32)
    if HAS_LIMIT and not PAIRS:
        g = min_nan(g, LIMIT)
        u = min_nan(max_nan(u, -LIMIT), LIMIT)
    y = silu(g, SILU)
    if STEPS and PAIRS:
        y = mul16(narrow(y, DTYPE), up)
    elif STEPS:
        y = round_to(round_to(y, DTYPE) * u, DTYPE)
    else:
        y = y * u
    if HAS_W:
        y = y.to(tl.float32) * w
    if ROUND and (HAS_W or not STEPS):
        y = round_to(y, DTYPE)
    return y
