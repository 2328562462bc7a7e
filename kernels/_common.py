"""What the kernels share: exact rounding, NaN-keeping minima, block scales, launch choice.

Rounding facts the helpers encode (each is compared with eager, bit by bit, in the tests):

* eager PyTorch rounds every product before it adds; Triton contracts ``a*b + c*d`` to an FMA.
* ``tensor / python_float`` on CUDA is a product with the fp32 reciprocal, on a CPU a division.
* ``tensor / tensor`` is an IEEE division; Triton's ``/`` is not.
* ``torch.clamp`` and ``amax`` keep NaN; Triton's minimum, maximum and max drop it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from triton import cdiv  # noqa: F401  (works on symbols)
from triton.language.extra import libdevice

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRET = tl.constexpr(INTERPRETED)  # inside kernels: no inline assembly, no libdevice
FP8 = torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
NORMS = {"none": 0, "once": 1, "rstd": 2, "weight": 3, "every": 4}
SCALES = {"fp32": 0, "pow2": 1, "e8m0": 2}


@triton.jit
def mul_rn(a, b):
    """The fp32 product, rounded: never contracted into an FMA with a later sum."""
    if INTERPRET:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 → dtype, nearest even. Two at a time: the single conversion runs at a quarter rate."""
    if INTERPRET or dtype == tl.float32:
        return x.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.float16, is_pure=True, pack=2
        )


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 → dtype → fp32; free for fp32."""
    if INTERPRET or dtype != tl.bfloat16:
        return narrow(x, dtype).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; "
            "shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def round_few(x, dtype: tl.constexpr):
    """The same for a scalar or one value per row, which may not come in pairs."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def min_nan(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rsqrt(x):
    if INTERPRET:
        return 1.0 / tl.sqrt_rn(x)
    else:
        return libdevice.rsqrt(x)


@triton.jit
def abs_max(x, axis: tl.constexpr):
    """max |x| along axis, NaN if any is NaN: as integers, fp32 order and NaN sorts above inf."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(amax, FLOOR: tl.constexpr, POW2: tl.constexpr, VIA_MUL: tl.constexpr,
                TOP: tl.constexpr = 448.0):  # fmt: skip
    """``max(amax, floor) / TOP``, rounded up to a power of two by ceil(log2) if POW2.
    On CUDA eager divides by a Python scalar through its fp32 reciprocal, so both vias agree.
    """
    amax = max_nan(amax, FLOOR)
    if INTERPRET:
        raw = amax * (1.0 / TOP) if VIA_MUL else amax / TOP
    else:
        raw = amax * (1.0 / TOP)
    if POW2:
        # not a bit trick: within an ulp above 2^k log2f rounds to k, and eager keeps 2^k
        if INTERPRET:
            return tl.exp2(tl.ceil(tl.log2(raw)))
        else:
            return libdevice.exp2(tl.ceil(libdevice.log2(raw)))
    else:
        return raw


@triton.jit
def divide(x, s, POW2: tl.constexpr, TINY: tl.constexpr, NARROW: tl.constexpr = False):
    """IEEE ``x / s`` for a block x and its scale s, which broadcasts against x.

    A power of two has an exact reciprocal; otherwise one reciprocal per block and Markstein's
    two corrections give the correctly rounded quotient for 5 instructions instead of about 12.
    NARROW, an x of 16 bits: one correction does (tried for every significand of x and of s).
    TINY (floor < 1e-30) may underflow in between, and takes the full division.
    """
    if POW2:
        return x * tl.div_rn(1.0, s)
    else:
        if INTERPRET or TINY:
            x, s = tl.broadcast(x, s)
            return tl.div_rn(x, s)
        else:
            r = tl.div_rn(1.0, s)
            s = tl.where(s == float("inf"), 1.0, s)  # then r = 0: finite / inf 0, inf / inf NaN
            q = x * r
            back = r * -1.0  # a true sign flip, of zeros too: Triton's unary minus is 0 - r
            q = tl.fma(tl.fma(q, s, -x), back, q)
            if not NARROW:
                q = tl.fma(tl.fma(q, s, -x), back, q)
            return q


@triton.jit
def scale_byte(s):
    """The e8m0 byte of a power of two: its biased fp32 exponent (NaN and inf give 255)."""
    return ((s.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)


@triton.jit
def rotate(even, odd, cos, sin, inside, EVERY: tl.constexpr, EXACT: tl.constexpr,
           dtype: tl.constexpr):  # fmt: skip
    """Rotated pairs where ``inside``, the untouched ones elsewhere (±0, inf, NaN kept)."""
    if EVERY:
        ec, os_ = round_to(mul_rn(even, cos), dtype), round_to(mul_rn(odd, sin), dtype)
        oc, es = round_to(mul_rn(odd, cos), dtype), round_to(mul_rn(even, sin), dtype)
    else:
        if EXACT:
            ec, os_ = mul_rn(even, cos), mul_rn(odd, sin)
            oc, es = mul_rn(odd, cos), mul_rn(even, sin)
        else:
            ec, os_ = even * cos, odd * sin
            oc, es = odd * cos, even * sin
    return tl.where(inside, ec - os_, even), tl.where(inside, oc + es, odd)


@triton.jit
def long(count):
    """A size or stride as int64: where torch looks for what a kernel writes, it is a plain int."""
    return tl.cast(count, tl.int64)


@triton.jit
def batch_and_position(token, length, FLAT: tl.constexpr):
    """(b, s) of a flat token index, int64. FLAT: 1 = one batch row, 2 = one position, 0 = both."""
    if FLAT == 1:
        b, s = token * 0, token
    elif FLAT == 2:
        b, s = token, token * 0
    else:
        b, s = token // length, token % length
    return b.to(tl.int64), s.to(tl.int64)


@dataclass(frozen=True)
class Config:
    """A launch shape: rows (or tokens) per program, warps, columns per program where it tiles."""

    rows: int
    warps: int
    columns: int = 0


Table = Sequence[tuple[int | None, Config]]  # bound on the token count → launch shape


def size_hint(value: int | torch.SymInt, default: int = 1024) -> int:
    """A likely value of a size, for choosing a launch only: never installs a guard."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    node = value.node
    known = getattr(node, "_hint", None)
    if isinstance(known, int):
        return known
    env = node.shape_env
    for name, extra in (("optimization_hint", {"fallback": default}), ("size_hint", {})):
        try:
            return int(getattr(env, name)(node.expr, **extra))
        except Exception:  # an unbacked size, or a torch without this method
            continue
    return default


Pick = Callable[[Sequence[Any], Any], Any]  # (a table's shapes, the one it names) → that to use
_pick: ContextVar[Pick | None] = ContextVar("pick", default=None)


@contextlib.contextmanager
def picking(pick: Pick) -> Iterator[None]:
    """Inside, ``pick`` chooses the launch shapes."""
    token = _pick.set(pick)
    try:
        yield
    finally:
        _pick.reset(token)


def launch_config(table: Table, tokens: int | torch.SymInt) -> Config:
    """The first entry whose bound is not below the token count (None bounds nothing)."""
    count = size_hint(tokens)
    found = next(config for bound, config in table if bound is None or count <= bound)
    pick = _pick.get()
    return found if pick is None else pick([config for _, config in table], found)


def flat_mode(batch: int | torch.SymInt, length: int | torch.SymInt) -> int:
    """Which of the two token axes is known to be 1, without asking a symbol."""
    if not isinstance(batch, torch.SymInt) and batch == 1:
        return 1
    return 2 if not isinstance(length, torch.SymInt) and length == 1 else 0


def align4(tokens: int | torch.SymInt) -> int | torch.SymInt:
    """Spelled so that a symbolic size is known not to be below ``tokens``: no guard."""
    return tokens + 3 * tokens % 4


def use_reference(x: Tensor) -> bool:
    """Plain PyTorch on a CPU; interpreted kernels only for real tensors, not while tracing."""
    return x.device.type == "cpu" and not (INTERPRETED and type(x) in (Tensor, Parameter))


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def require_static(**sizes: int | torch.SymInt) -> None:
    """Sizes that are compiled into a kernel; only token counts may be symbolic."""
    for name, size in sizes.items():
        require(not isinstance(size, torch.SymInt), f"{name} must be a fixed size, not symbolic")


def require_fp8(device: torch.device) -> None:
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        require(found >= (8, 9), f"fp8 e4m3 needs compute capability 8.9, this GPU has {found}")


def is_one(size: int | torch.SymInt) -> bool:
    """Known to be 1, without a guard."""
    return not isinstance(size, torch.SymInt) and size == 1


def strides(t: Tensor) -> tuple[int | torch.SymInt, ...]:
    """As kernels take them: 0 along an axis of one, where it says nothing and may be anything.
    Torch 2.11 cannot compile the launch of a kernel that takes a number from 2^31 on."""
    return tuple(0 if is_one(n) else s for n, s in zip(t.shape, t.stride(), strict=True))


def named_strides(t: Tensor | None, name: str, axes: str) -> dict[str, int | torch.SymInt]:
    """``name_s?`` for each of the first axes; 0 for no tensor."""
    steps = [0] * len(axes) if t is None else strides(t)
    return {f"{name}_s{axis}": step for axis, step in zip(axes, steps, strict=False)}


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements; an expanded axis (stride 0) counts once."""
    pairs = [(t, zip(t.shape, t.stride(), strict=True)) for t in tensors if t is not None]
    return sum(math.prod(n for n, step in axes if step or not n) * t.itemsize for t, axes in pairs)
