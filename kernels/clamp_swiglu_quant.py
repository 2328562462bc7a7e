"""clamp → silu → mul [→ routing weight] [→ fp8 group quant].

Math     ``y = silu(min(gate, limit)) * clamp(up, -limit, limit) [* weight]``, then for the
         quant op per row and per ``group`` columns ``s = max(amax|y|, floor) / 448``, for
         "pow2" and "e8m0" rounded up to a power of two, ``codes = e4m3(y / s)``.
Shapes   gate, up ``[T,I]``, weight ``[T]`` or ``[T,1]`` or None; out and codes ``[T,I]``,
         scales ``[T, I/group]``. For quant ``I % group == 0``; group 32, 64 or 128.
Dtypes   gate, up one of bf16, fp16, fp32; weight any of these; codes float8_e4m3fn; scales
         fp32 ("fp32" raw, "pow2") or float8_e8m0fnu ("e8m0").
Strides  gate and up any, so halves of a packed ``[T,2I]`` (chunked or interleaved) are read
         in place. out and codes are dense. Scales are dense row-major, or for col_major the
         transposed view, strides ``(1, align4(T))``, of a dense ``[I/group, align4(T)]``
         whose pad rows are zero (e8m0: byte 0).
Rounding as ``atoms.clamp_swiglu``; y is rounded to its dtype before the quantisation.
         ``precise``: fp32 from the load to the one store or to the codes. ``via`` as
         ``atoms.block_scale``; on CUDA both give a product with fp32(1/448), as eager does. ``by``:
         the codes are y / s ("div"), or y times the rounded reciprocal of s ("mul").
NaN      propagates as through torch.clamp; a NaN makes its group's scale and codes NaN.
Source   ATOM PR #704, item 2 (clamp, SwiGLU, routing weight and group quant in one launch).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from ._common import (
    Config,
    abs_max,
    block_scale,
    divide,
    narrow,
    scale_byte,
)
from ._launch import target, wrap_triton
from ._stores import stores
from ._swiglu import SILU_BF16, swiglu

# Few tokens: one 8-byte load of gate and of up per lane, so that all SMs share the exponentials.
# Many tokens: two or four 16-byte loads of each in flight per lane, and a group's amax in one warp.
CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (32, Config(rows=1, warps=4, columns=512)),
    (512, Config(rows=2, warps=4, columns=256)),
    (2048, Config(rows=1, warps=4, columns=1024)),
    (None, Config(rows=1, warps=1, columns=1024)),
)
BITS = {torch.bfloat16: 8, torch.float16: 11}  # of a significand


@stores("out_ptr", scale_ptr="GROUP")
@triton.jit(do_not_specialize=("tokens", "padded", "s_sg"))  # they follow the count
def clamp_swiglu_kernel(
    gate_ptr, up_ptr, w_ptr, out_ptr, scale_ptr, tokens, padded,
    g_st, g_si, u_st, u_si, w_st, s_st, s_sg,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LIMIT: tl.constexpr,
    HAS_LIMIT: tl.constexpr, PAIRS: tl.constexpr, HAS_W: tl.constexpr, STEPS: tl.constexpr,
    ROUND: tl.constexpr, SILU: tl.constexpr, GROUP: tl.constexpr, FLOOR: tl.constexpr,
    SCALE: tl.constexpr, VIA_MUL: tl.constexpr, BY_MUL: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens × BLOCK columns. Column blocks are neighbours in the grid."""
    COLUMN_BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    start = (pid % COLUMN_BLOCKS) * BLOCK
    row = (pid // COLUMN_BLOCKS) * ROWS + tl.arange(0, ROWS)
    col = start + tl.arange(0, BLOCK)
    mask = (row < tokens)[:, None]
    if COLUMNS % BLOCK != 0:
        mask = mask & (col < COLUMNS)[None, :]
    t = row.to(tl.int64)
    at = col.to(tl.int64)[None, :]
    gate = tl.load(gate_ptr + t[:, None] * g_st + at * g_si, mask=mask, other=0.0)
    up = tl.load(up_ptr + t[:, None] * u_st + at * u_si, mask=mask, other=0.0)
    w = 1.0
    if HAS_W:
        w = tl.load(w_ptr + t * w_st, mask=row < tokens, other=0.0).to(tl.float32)[:, None]
    y = swiglu(gate, up, w, LIMIT, HAS_LIMIT, PAIRS, HAS_W, STEPS, ROUND, SILU)
    out = out_ptr + t[:, None] * COLUMNS + at
    if GROUP == 0:
        if y.dtype == tl.float32:
            y = narrow(y, out_ptr.dtype.element_ty)
        tl.store(out, y, mask=mask)
    else:
        blocks = tl.reshape(y.to(tl.float32), (ROWS, BLOCK // GROUP, GROUP))
        scale = block_scale(abs_max(blocks, 2), FLOOR, SCALE != 0, VIA_MUL)
        NARROW: tl.constexpr = ROUND and gate.dtype.primitive_bitwidth == 16
        codes = divide(blocks, scale[:, :, None], SCALE != 0 or BY_MUL, FLOOR < 1e-30, NARROW)
        codes = codes.to(tl.float8e4nv)
        tl.store(out, tl.reshape(codes, (ROWS, BLOCK)), mask=mask)
        scale = tl.where((row < tokens)[:, None], scale, 0.0)
        group = start // GROUP + tl.arange(0, BLOCK // GROUP)
        keep = (row < padded)[:, None] & (group < COLUMNS // GROUP)[None, :]
        at = t[:, None] * s_st + group.to(tl.int64)[None, :] * s_sg
        if SCALE == 2:
            tl.store(scale_ptr + at, scale_byte(scale), mask=keep)
        else:
            tl.store(scale_ptr + at, scale, mask=keep)


def out_dtype(gate: Tensor, weight: Tensor | None, rounding: str) -> torch.dtype:
    """gate's dtype, or its promotion with a weight that multiplies after the rounding."""
    if weight is None or rounding == "once":
        return gate.dtype
    return torch.promote_types(gate.dtype, weight.dtype)


def column_block(columns: int, wanted: int, group: int) -> int:
    """A power of two, ``wanted`` at most and one group at least, that divides the row if any does.

    3072 runs as three blocks of 1024, not as one of 4096 with a quarter of its lanes idle.
    """
    divisor = columns & -columns
    if divisor < max(group, 32):  # only without quantisation: tail lanes are masked
        return min(wanted, max(32, triton.next_power_of_2(columns)))
    return max(min(wanted, divisor), group)


def _check(gate: Tensor, up: Tensor, weight: Tensor | None, rounding: str, group: int) -> None:
    common.require(gate.dim() == 2 and up.dim() == 2, "gate and up must be [T, I]")
    sizes = f"gate is {list(gate.shape)}, up is {list(up.shape)}"
    common.require(gate.shape == up.shape, sizes)  # the kernel would read past the smaller one
    common.require(gate.dtype == up.dtype, f"gate is {gate.dtype}, up is {up.dtype}")
    common.require(gate.dtype in common.FLOATS, "gate and up must be bf16, fp16 or fp32")
    common.require(rounding in ("once", "silu"), f"no rounding {rounding!r} here")
    if weight is not None:
        common.require(weight.dim() == 1 or weight.shape[1:] == (1,), "weight must be [T] or [T,1]")
    if group:
        common.require(group in (32, 64, 128), "the group must be 32, 64 or 128")
        common.require(gate.shape[-1] % group == 0, f"{gate.shape[-1]} is no multiple of {group}")
        common.require_fp8(gate.device)


def allocate_scales(codes: Tensor, group: int, scale: str, col_major: bool) -> Tensor:
    """The scales' dense buffer (bytes for e8m0), padded and still transposed for col_major."""
    dtype = torch.uint8 if scale == "e8m0" else torch.float32
    tokens, groups = codes.shape[0], codes.shape[1] // group
    shape = (groups, common.align4(tokens)) if col_major else (tokens, groups)
    return codes.new_empty(shape, dtype=dtype)


def finish_scales(buffer: Tensor, tokens: int, scale: str, col_major: bool) -> Tensor:
    """``[T, I/group]``: the unpadded part, as e8m0 where that was asked for."""
    scales = buffer.view(torch.float8_e8m0fnu) if scale == "e8m0" else buffer
    return scales.t().narrow(0, 0, tokens) if col_major else scales


def _launch(
    gate: Tensor, up: Tensor, weight: Tensor | None, out: Tensor, scales: Tensor, *,
    limit: float | None, rounding: str, precise: bool, dtype: torch.dtype, group: int = 0,
    floor: float = 0.0, scale: str = "fp32", via: str = "div", by: str = "div",
    col_major: bool = False,
) -> None:  # fmt: skip
    tokens, columns = gate.shape
    common.require_static(columns=columns)
    config = common.launch_config(CONFIGS, tokens)
    block = column_block(columns, config.columns, group)
    padded = common.align4(tokens) if col_major else tokens
    scale_strides = (1, scales.stride(0)) if col_major else common.strides(scales)
    grid = (common.cdiv(padded, config.rows) * common.cdiv(columns, block),)
    steps = rounding == "silu" and not precise
    wrap_triton(clamp_swiglu_kernel)[grid](
        gate, up, gate if weight is None else weight, out, scales, tokens, padded,
        *common.strides(gate), *common.strides(up),
        0 if weight is None else common.strides(weight)[0], *scale_strides,
        COLUMNS=columns, BLOCK=block, ROWS=config.rows, LIMIT=0.0 if limit is None else limit,
        HAS_LIMIT=limit is not None, PAIRS=_pairs(gate.dtype, limit, steps),
        HAS_W=weight is not None, STEPS=steps, ROUND=not precise and dtype == gate.dtype,
        SILU=_silu_mode(gate.dtype, steps and limit is not None, precise),
        GROUP=group, FLOOR=floor, SCALE=common.SCALES[scale], VIA_MUL=via == "mul",
        BY_MUL=by == "mul", num_warps=config.warps,
    )  # fmt: skip


def _pairs(dtype: torch.dtype, limit: float | None, steps: bool) -> bool:
    """May 16-bit values be clamped as such? The module does so (steps), or the limit is one."""
    if dtype not in BITS:
        return False
    return steps or limit is None or (math.frexp(limit)[0] * 2 ** BITS[dtype]).is_integer()


def _silu_mode(dtype: torch.dtype, narrow: bool, precise: bool) -> int:
    """MODE of ``_swiglu.silu``; narrow: of a clamped value, and rounded to its dtype."""
    if precise:
        return 0
    if narrow and dtype == torch.bfloat16 and target() in SILU_BF16:
        return 3
    return 1 if dtype == torch.float32 else 2


def _reference_product(
    gate: Tensor, up: Tensor, weight: Tensor | None, limit: float | None, rounding: str,
    precise: bool,
) -> Tensor:  # fmt: skip
    """y, in fp32 for precise, otherwise in its dtype."""
    weight = weight.unsqueeze(-1) if weight is not None and weight.dim() == 1 else weight
    if precise:
        gate, up, rounding = gate.float(), up.float(), "once"
        weight = None if weight is None else weight.float()
    return atoms.clamp_swiglu(gate, up, weight, limit=limit, rounding=rounding)


def reference(
    gate: Tensor, up: Tensor, weight: Tensor | None, *, limit: float | None, rounding: str,
    precise: bool = False,
) -> Tensor:  # fmt: skip
    """``clamp_swiglu`` in plain PyTorch."""
    y = _reference_product(gate, up, weight, limit, rounding, precise)
    return y.to(out_dtype(gate, weight, rounding)).contiguous()


def reference_quant(
    gate: Tensor, up: Tensor, weight: Tensor | None, *, limit: float | None, rounding: str,
    precise: bool = False, group: int = 128, floor: float = 1e-10, scale: str = "fp32",
    via: str = "div", by: str = "div", col_major: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``clamp_swiglu_quant`` in plain PyTorch."""
    y = _reference_product(gate, up, weight, limit, rounding, precise)
    kind = "fp32" if scale == "fp32" else "pow2"
    codes, s = atoms.group_quant(y, group=group, floor=floor, scale=kind, via=via, by=by)
    s = s.to(torch.float8_e8m0fnu).view(torch.uint8) if scale == "e8m0" else s
    buffer = allocate_scales(codes, group, scale, col_major).zero_()
    (buffer.t().narrow(0, 0, codes.shape[0]) if col_major else buffer).copy_(s)
    return codes, finish_scales(buffer, codes.shape[0], scale, col_major)


@torch.library.triton_op("dsv4fuse::clamp_swiglu", mutates_args=())
def clamp_swiglu(
    gate: Tensor, up: Tensor, weight: Tensor | None, *, limit: float | None, rounding: str,
    precise: bool = False,
) -> Tensor:  # fmt: skip
    """Clamped SwiGLU, ``[T,I]``: see the module's docstring."""
    _check(gate, up, weight, rounding, 0)
    if common.use_reference(gate):
        return reference(gate, up, weight, limit=limit, rounding=rounding, precise=precise)
    dtype = out_dtype(gate, weight, rounding)
    out = gate.new_empty(gate.shape, dtype=dtype)
    _launch(gate, up, weight, out, out, limit=limit, rounding=rounding,
            precise=precise, dtype=dtype)
    return out


@clamp_swiglu.register_fake
def _(gate, up, weight, *, limit, rounding, precise=False):
    _check(gate, up, weight, rounding, 0)
    return gate.new_empty(gate.shape, dtype=out_dtype(gate, weight, rounding))


@torch.library.triton_op("dsv4fuse::clamp_swiglu_quant", mutates_args=())
def clamp_swiglu_quant(
    gate: Tensor, up: Tensor, weight: Tensor | None, *, limit: float | None, rounding: str,
    precise: bool = False, group: int = 128, floor: float = 1e-10, scale: str = "fp32",
    via: str = "div", by: str = "div", col_major: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Clamped SwiGLU as fp8 codes and scales: see the module's docstring."""
    _check(gate, up, weight, rounding, group)
    kw = dict(limit=limit, rounding=rounding, precise=precise, group=group, floor=floor,
              scale=scale, via=via, by=by, col_major=col_major)  # fmt: skip
    if common.use_reference(gate):
        return reference_quant(gate, up, weight, **kw)
    codes = gate.new_empty(gate.shape, dtype=common.FP8)
    scales = allocate_scales(codes, group, scale, col_major)
    _launch(gate, up, weight, codes, scales, dtype=out_dtype(gate, weight, rounding), **kw)
    return codes, finish_scales(scales, gate.shape[0], scale, col_major)


@clamp_swiglu_quant.register_fake
def _(gate, up, weight, *, rounding, group=128, scale="fp32", col_major=False, **_):
    _check(gate, up, weight, rounding, group)
    codes = gate.new_empty(gate.shape, dtype=common.FP8)
    scales = allocate_scales(codes, group, scale, col_major)
    return codes, finish_scales(scales, gate.shape[0], scale, col_major)


def traffic(gate: Tensor, up: Tensor, weight: Tensor | None, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(gate, up, weight, *outputs)
