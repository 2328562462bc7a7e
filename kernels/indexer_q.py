"""The lightning indexer's queries: rope [→ matrix rotation] [→ fp8 quant, fp8 or fp4 fake quant].

Math     ``y = rope(x, cos, sin)`` on the trailing R elements of each head; with a matrix (a
         Hadamard matrix in DeepSeek's indexer, but nothing here depends on what it holds)
         ``y = (y @ matrix) * factor``; then per block of ``group`` elements
         ``s = max(amax|y|, floor) / 448``, for "pow2" rounded up, ``codes = e4m3(y / s)``; with fp4
         (of indexer_q, scale "pow2") the same with 6 and e2m1.
Shapes   x ``[B,S,H,D]``, cos and sin ``[B,S,R/2]``, matrix ``[D,D]``. indexer_q returns y, or
         ``codes * s`` for a group, ``[B,S,H,D]``; indexer_q_quant codes ``[B,S,H,D]`` and scales
         ``[B,S,H,D/group]``. D is a power of two from 16 to 256, ``D % group == 0``.
Dtypes   x bf16, fp16 or fp32; cos and sin fp32 or a 16-bit float; the matrix x's dtype or fp32.
         indexer_q returns x.dtype; codes are float8_e4m3fn, scales fp32, raw or powers of two.
Strides  any, 0 included; x has last stride 1. Results are dense.
Rounding rope_rounding as ``atoms.rope``; y is rounded to x.dtype behind the rope; behind the
         product with a matrix of x.dtype and again behind the factor, for an fp32 matrix only
         behind the factor; codes * s is rounded at the end. ``precise`` rounds there only.
         The order of the product's sums differs from eager's. ``via`` as ``atoms.block_scale``.
         e2m1 rounds to nearest, ties to even; fp4 names a form of ``atoms.e2m1``, which says what
         becomes of zeros' signs and of infinity; "" is fp8.
Errors   ValueError for other sizes and dtypes, an unknown form, fp4 with another scale or no group.
Source   DeepSeek-V3.2's lightning indexer (rotate_activation, act_quant); V4's fp4_act_quant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from ._common import (
    INTERPRET,
    Config,
    abs_max,
    batch_and_position,
    block_scale,
    divide,
    round_to,
)
from ._fp4 import fake_fp4, fp4_form
from ._launch import wrap_triton
from ._rows import load_rotated
from ._stores import stores
from ._turn import check_matrix, rounded_product, turned
from .indexer_logits import WIDE_DOT

SIZES = ("tokens", "length")
# Heads per program by token count: one where latency counts, several in flight for bandwidth.
CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (8, Config(rows=1, warps=1)),
    (32, Config(rows=4, warps=1)),
    (128, Config(rows=16, warps=4)),
    (None, Config(rows=8, warps=1)),
)
# With a matrix, which a program loads whole; at least 16 rows make a dot.
TURNED: tuple[tuple[int | None, Config], ...] = (
    (32, Config(rows=16, warps=4)),
    (512, Config(rows=64, warps=8)),
    (None, Config(rows=64, warps=4)),
)


@triton.jit
def _multiplied(y, m_ptr, m_si, m_so, D: tl.constexpr, FACTOR: tl.constexpr, PRECISE: tl.constexpr,
                PRECISION: tl.constexpr, XD: tl.constexpr):
    """fp32 rows of dtype XD's values times the matrix and the factor, rounded as the module."""
    i = tl.arange(0, D)
    m = tl.load(m_ptr + i[:, None] * m_si + i[None, :] * m_so)
    narrow: tl.constexpr = m_ptr.dtype.element_ty == XD and not PRECISE
    if INTERPRET or not narrow:
        y = tl.dot(y, m.to(tl.float32), input_precision=PRECISION)
    else:
        y = tl.dot(y.to(XD), m, input_precision=PRECISION)
    return rounded_product(y, FACTOR, narrow, PRECISE, XD)


@stores("out_ptr", scale_ptr="GROUP and not FAKE and not FP4")
@triton.jit(do_not_specialize=SIZES)
def indexer_q_kernel(
    x_ptr, cos_ptr, sin_ptr, m_ptr, out_ptr, scale_ptr, tokens, length,
    x_sb, x_ss, x_sh, cos_sb, cos_ss, cos_sd, sin_sb, sin_ss, sin_sd, m_si, m_so,
    D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    FLAT: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr, MATRIX: tl.constexpr,
    FACTOR: tl.constexpr, GROUP: tl.constexpr, FAKE: tl.constexpr, FLOOR: tl.constexpr,
    POW2: tl.constexpr, VIA_MUL: tl.constexpr, FP4: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ROWS heads, of one token or of several."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    live = token < tokens
    b, s = batch_and_position(token, length, FLAT)
    XD: tl.constexpr = x_ptr.dtype.element_ty
    y = load_rotated(
        x_ptr, b * x_sb + s * x_ss + head.to(tl.int64) * x_sh, 0, x_ptr,
        cos_ptr, b * cos_sb + s * cos_ss, cos_sd, sin_ptr, b * sin_sb + s * sin_ss, sin_sd, live,
        D, D, HALF, ROWS, 0, 0.0, False, EVERY, False, PRECISE, 1, 0, XD,
    )  # fmt: skip
    if not PRECISE:
        y = round_to(y, XD)
    if MATRIX:
        y = _multiplied(y, m_ptr, m_si, m_so, D, FACTOR, PRECISE, PRECISION, XD)
    row = row.to(tl.int64)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    if FP4 > 0:
        y = fake_fp4(y, D, ROWS, GROUP, FLOOR, VIA_MUL, FP4)
    elif GROUP > 0:
        blocks = tl.reshape(y, (ROWS, D // GROUP, GROUP))
        scale = block_scale(abs_max(blocks, 2), FLOOR, POW2, VIA_MUL)
        wide = scale[:, :, None]
        codes = divide(blocks, wide, POW2, FLOOR < 1e-30).to(tl.float8e4nv)
        if FAKE:
            y = tl.reshape(codes.to(tl.float32) * wide, (ROWS, D))
        else:
            tl.store(out_ptr + at, tl.reshape(codes, (ROWS, D)), mask=live[:, None])
            group = tl.arange(0, D // GROUP)
            tl.store(scale_ptr + row[:, None] * (D // GROUP) + group[None, :], scale,
                     mask=live[:, None])  # fmt: skip
    if FAKE or GROUP == 0:
        tl.store(out_ptr + at, y.to(XD), mask=live[:, None])


def _check(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, group: int, scale: str = "",
    fp4: str = "",
) -> None:  # fmt: skip
    """Raises ValueError with a sentence for what the kernel does not take."""
    d = x.shape[-1]
    common.require(x.dim() == 4, "x is [B, S, H, D]")
    common.require(d in (16, 32, 64, 128, 256), f"head_dim {d} is no power of two from 16 to 256")
    common.require(0 < 2 * cos.shape[-1] <= d, "rope_dim is not within head_dim")
    common.require(x.dtype in common.FLOATS, "x must be bf16, fp16 or fp32")
    common.require(x.stride(-1) == 1, "the last axis of x must be dense")
    common.require(cos.dtype == sin.dtype, "cos and sin differ in dtype")
    common.require(group in (0, 16, 32, 64, 128, 256) and (not group or d % group == 0),
                   f"groups of {group} do not divide {d}")  # fmt: skip
    check_matrix(matrix, d, x.dtype)
    if fp4_form(fp4, group, scale) == 0 and group:
        common.require_fp8(x.device)


def _launch(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, out: Tensor,
    scales: Tensor | None, *, factor: float, group: int, floor: float, scale: str, via: str,
    rope_rounding: str, precise: bool, fp4: str = "",
) -> None:  # fmt: skip
    batch, length, heads, d = x.shape
    common.require_static(heads=heads, head_dim=d, rope_dim=cos.shape[-1])
    tokens = batch * length
    config = common.launch_config(CONFIGS if matrix is None else TURNED, tokens)
    wrap_triton(indexer_q_kernel)[(common.cdiv(tokens * heads, config.rows),)](
        x, cos, sin, x if matrix is None else matrix, out, out if scales is None else scales,
        tokens, length, *common.strides(x)[:3], *common.strides(cos), *common.strides(sin),
        *((0, 0) if matrix is None else common.strides(matrix)),
        D=d, HALF=cos.shape[-1], HEADS=heads, ROWS=config.rows,
        FLAT=common.flat_mode(batch, length),
        EVERY=rope_rounding == "every" and not precise and cos.dtype == x.dtype, PRECISE=precise,
        MATRIX=matrix is not None, FACTOR=factor, GROUP=group, FAKE=group > 0 and scales is None,
        FLOOR=floor, POW2=scale == "pow2", VIA_MUL=via == "mul",
        FP4=fp4_form(fp4, group, scale), PRECISION=WIDE_DOT,
        num_warps=config.warps,
    )  # fmt: skip


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, factor: float, rope_rounding: str,
    precise: bool,
) -> Tensor:  # fmt: skip
    """rope and matrix in plain PyTorch; fp32 for ``precise``."""
    wide = x.float() if precise else x
    y = atoms.rope(wide, cos.unsqueeze(2), sin.unsqueeze(2),
                   rounding="once" if precise else rope_rounding)  # fmt: skip
    return y if matrix is None else turned(y, matrix, factor, precise, x.dtype)


@torch.library.triton_op("dsv4fuse::indexer_q", mutates_args=())
def indexer_q(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None = None, *, factor: float = 1.0,
    group: int = 0, floor: float = 1e-4, scale: str = "pow2", via: str = "div",
    rope_rounding: str, precise: bool = False, fp4: str = "",
) -> Tensor:  # fmt: skip
    """y, or y through fp8 or fp4 and back, ``[B,S,H,D]``: see the module's docstring."""
    _check(x, cos, sin, matrix, group, scale, fp4)
    if common.use_reference(x):
        y = _turned(x, cos, sin, matrix, factor, rope_rounding, precise)
        if group:
            y = atoms.fake_quant(y, group=group, floor=floor, scale=scale, via=via, fp4=fp4)
        return y.to(x.dtype).contiguous()
    out = x.new_empty(x.shape)
    _launch(x, cos, sin, matrix, out, None, factor=factor, group=group, floor=floor, scale=scale,
            via=via, rope_rounding=rope_rounding, precise=precise, fp4=fp4)
    return out


@indexer_q.register_fake
def _(x, cos, sin, matrix=None, *, group=0, scale="pow2", fp4="", **_):
    _check(x, cos, sin, matrix, group, scale, fp4)
    return x.new_empty(x.shape)


@torch.library.triton_op("dsv4fuse::indexer_q_quant", mutates_args=())
def indexer_q_quant(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None = None, *, factor: float = 1.0,
    group: int = 128, floor: float = 1e-4, scale: str = "pow2", via: str = "div",
    rope_rounding: str, precise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """codes ``[B,S,H,D]`` and scales ``[B,S,H,D/group]``: see the module's docstring."""
    _check(x, cos, sin, matrix, group)
    if common.use_reference(x):
        y = _turned(x, cos, sin, matrix, factor, rope_rounding, precise)
        codes, s = atoms.group_quant(y, group=group, floor=floor, scale=scale, via=via)
        return codes.contiguous(), s.contiguous()
    codes = x.new_empty(x.shape, dtype=common.FP8)
    scales = x.new_empty((*x.shape[:3], x.shape[3] // group), dtype=torch.float32)
    _launch(x, cos, sin, matrix, codes, scales, factor=factor, group=group, floor=floor,
            scale=scale, via=via, rope_rounding=rope_rounding, precise=precise)
    return codes, scales


@indexer_q_quant.register_fake
def _(x, cos, sin, matrix=None, *, group=128, **_):
    _check(x, cos, sin, matrix, group)
    scales = x.new_empty((*x.shape[:3], x.shape[3] // group), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=common.FP8), scales


def traffic(x: Tensor, cos: Tensor, sin: Tensor, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(x, cos, sin, *outputs)
