"""RMSNorm → fp8 group quant, and the kv latent's RMSNorm in the same launch.

Math     ``y = rms_norm(x, weight, eps)``, per row and per ``group`` columns
         ``s = max(amax|y|, floor) / 448``, for "pow2" and "e8m0" rounded up to a power of two,
         ``codes = e4m3(y / s)``; besides ``kv_out = rms_norm(kv, kv_weight, kv_eps)``.
Shapes   x, codes and normed ``[T,N]``, N a multiple of the group (32, 64 or 128) up to 8192;
         scales ``[T, N/group]``; kv and kv_out ``[T,M]``, M up to 8192. weights ``[N]``, ``[M]``
         or None. normed has shape [0] unless ``keep``, kv_out without kv.
Dtypes   x and kv bf16, fp16 or fp32; weights any of these; codes float8_e4m3fn; scales fp32
         ("fp32" raw, "pow2") or float8_e8m0fnu ("e8m0"); normed and kv_out as PyTorch promotes.
Strides  rows of x and kv any, their last axis and the weights dense. Outputs are dense. Scales
         are dense row-major, or for col_major the transposed view, strides ``(1, align4(T))``,
         of a dense ``[N/group, align4(T)]`` whose pad rows are zero (e8m0: byte 0).
Rounding norm and kv_norm: a ``rounding`` of ``atoms.rms_norm``; what is quantised is the rounded
         value. ``precise``: fp32 from the load to the codes and to the one store of normed.
         ``via`` as ``atoms.block_scale``; on CUDA both give a product with fp32(1/448). ``by``:
         the codes are y / s ("div"), or y times the rounded reciprocal of s ("mul").
NaN      spoils its row, as it does in eager.
Source   ATOM PR #704, item 3 (q and kv latent norms and q's group quant in one launch).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from ._common import Config, abs_max, block_scale, divide, narrow, scale_byte
from ._launch import wrap_triton
from ._norms import (
    load_piece,
    load_weight,
    out_dtype,
    pieces,
    reciprocal_rms,
    scaled,
    squares,
)
from ._stores import stores
from .clamp_swiglu_quant import allocate_scales, finish_scales

MAX_WIDTH = 8192
MOST_VALUES = 48  # of a lane; more than one row at a time, or a wide row's weights cost most

# Rows of 1024 per program. Few tokens: eight warps share the latency of one row. Many: a lane has
# 32 values of one row, and the program's four rows are in flight together.
CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (512, Config(rows=1, warps=8)),
    (None, Config(rows=4, warps=4)),
)


@triton.jit
def _store(y, out_ptr, code_ptr, scale_ptr, row, live, stored, s_st, s_sg,
           START: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
           KEEP: tl.constexpr, GROUP: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr,
           VIA_MUL: tl.constexpr, BY_MUL: tl.constexpr, PRECISE: tl.constexpr):
    """Normed columns START.. of rows: kept, or as codes and scales, or both."""
    col = START + tl.arange(0, WIDTH)
    t = row.to(tl.int64)
    at = t[:, None] * N + col[None, :]
    mask = live[:, None]
    if START + WIDTH > N:
        mask = mask & (col < N)[None, :]
    if KEEP:
        tl.store(out_ptr + at, narrow(y, out_ptr.dtype.element_ty), mask=mask)
    if GROUP > 0:
        blocks = tl.reshape(y, (ROWS, WIDTH // GROUP, GROUP))
        scale = block_scale(abs_max(blocks, 2), FLOOR, SCALE != 0, VIA_MUL)
        NARROW: tl.constexpr = not PRECISE and out_ptr.dtype.element_ty.primitive_bitwidth == 16
        codes = divide(blocks, scale[:, :, None], SCALE != 0 or BY_MUL, FLOOR < 1e-30, NARROW)
        codes = codes.to(tl.float8e4nv)
        tl.store(code_ptr + at, tl.reshape(codes, (ROWS, WIDTH)), mask=mask)
        scale = tl.where(live[:, None], scale, 0.0)
        g = START // GROUP + tl.arange(0, WIDTH // GROUP)
        put = stored[:, None] & (g < N // GROUP)[None, :]
        place = scale_ptr + t[:, None] * s_st + g.to(tl.int64)[None, :] * s_sg
        if SCALE == 2:
            tl.store(place, scale_byte(scale), mask=put)
        else:
            tl.store(place, scale, mask=put)


@triton.jit
def _rows(x_ptr, w_ptr, out_ptr, code_ptr, scale_ptr, row, tokens, padded, x_st, s_st, s_sg,
          OD: tl.constexpr, N: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
          ROWS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, HAS_W: tl.constexpr,
          PRECISE: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, FLOOR: tl.constexpr,
          SCALE: tl.constexpr, VIA_MUL: tl.constexpr, BY_MUL: tl.constexpr):
    """Whole rows, held as up to three pieces of a power of two each: A + B + C ≥ N columns."""
    live = row < tokens
    stored = row < padded
    at = row.to(tl.int64) * x_st
    XD: tl.constexpr = x_ptr.dtype.element_ty
    a = load_piece(x_ptr, at, live, 0.0, 0, A, N).to(tl.float32)
    wa = load_weight(w_ptr, 0, A, N, HAS_W)
    square = squares(a, NORM, PRECISE, XD)
    if B > 0:
        b = load_piece(x_ptr, at, live, 0.0, A, B, N).to(tl.float32)
        wb = load_weight(w_ptr, A, B, N, HAS_W)
    if C > 0:
        c = load_piece(x_ptr, at, live, 0.0, A + B, C, N).to(tl.float32)
        wc = load_weight(w_ptr, A + B, C, N, HAS_W)
    if C == A:  # three equal pieces
        square += squares(b, NORM, PRECISE, XD) + squares(c, NORM, PRECISE, XD)
    total = tl.sum(square, axis=1)
    if B > 0 and C != A:
        total += tl.sum(squares(b, NORM, PRECISE, XD), axis=1)
    if C > 0 and C != A:
        total += tl.sum(squares(c, NORM, PRECISE, XD), axis=1)
    rstd = reciprocal_rms(total, N, NORM, EPS, PRECISE, XD)
    y = scaled(a, rstd, wa, HAS_W, NORM, PRECISE, XD, OD)
    _store(y, out_ptr, code_ptr, scale_ptr, row, live, stored, s_st, s_sg, 0, A, N, ROWS, KEEP,
           GROUP, FLOOR, SCALE, VIA_MUL, BY_MUL, PRECISE)
    if B > 0:
        y = scaled(b, rstd, wb, HAS_W, NORM, PRECISE, XD, OD)
        _store(y, out_ptr, code_ptr, scale_ptr, row, live, stored, s_st, s_sg, A, B, N, ROWS,
               KEEP, GROUP, FLOOR, SCALE, VIA_MUL, BY_MUL, PRECISE)
    if C > 0:
        y = scaled(c, rstd, wc, HAS_W, NORM, PRECISE, XD, OD)
        _store(y, out_ptr, code_ptr, scale_ptr, row, live, stored, s_st, s_sg, A + B, C, N,
               ROWS, KEEP, GROUP, FLOOR, SCALE, VIA_MUL, BY_MUL, PRECISE)


@stores(out_ptr="KEEP", code_ptr="GROUP", scale_ptr="GROUP", kv_out_ptr="M")
@triton.jit(do_not_specialize=("tokens", "padded", "s_sg", "q_programs"))
def norm_quant_kernel(
    x_ptr, w_ptr, out_ptr, code_ptr, scale_ptr, kv_ptr, kv_w_ptr, kv_out_ptr,
    tokens, padded, q_programs, x_st, kv_st, s_st, s_sg,
    N: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, HAS_W: tl.constexpr,
    KEEP: tl.constexpr, GROUP: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr,
    VIA_MUL: tl.constexpr, BY_MUL: tl.constexpr, M: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, KC: tl.constexpr, KV_ROWS: tl.constexpr,
    KV_NORM: tl.constexpr, KV_EPS: tl.constexpr, KV_W: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Programs below q_programs take ROWS rows of x each, the rest KV_ROWS rows of kv."""
    pid = tl.program_id(0)
    if pid < q_programs:
        row = pid * ROWS + tl.arange(0, ROWS)
        _rows(x_ptr, w_ptr, out_ptr, code_ptr, scale_ptr, row, tokens, padded, x_st, s_st, s_sg,
              out_ptr.dtype.element_ty, N, A, B, C, ROWS, NORM, EPS, HAS_W, PRECISE, KEEP, GROUP,
              FLOOR, SCALE, VIA_MUL, BY_MUL)
    if M > 0:
        if pid >= q_programs:
            row = (pid - q_programs) * KV_ROWS + tl.arange(0, KV_ROWS)
            _rows(kv_ptr, kv_w_ptr, kv_out_ptr, kv_out_ptr, kv_out_ptr, row, tokens, tokens,
                  kv_st, 0, 0, kv_out_ptr.dtype.element_ty, M, KA, KB, KC, KV_ROWS, KV_NORM,
                  KV_EPS, KV_W, PRECISE, True, 0, 0.0, 0, False, False)


def _check(
    x: Tensor, weight: Tensor | None, kv: Tensor | None, kv_weight: Tensor | None, group: int,
    scale: str,
) -> None:  # fmt: skip
    for name, t, w in (("x", x, weight), ("kv", kv, kv_weight)):
        if t is None:
            continue
        common.require(t.dim() == 2, f"{name} must be [T, lanes]")
        common.require(t.dtype in common.FLOATS, f"{name} must be bf16, fp16 or fp32")
        common.require(t.stride(-1) == 1 or t.shape[-1] == 1, f"the lanes of {name} must be dense")
        common.require(0 < t.shape[-1] <= MAX_WIDTH, f"{name} is wider than {MAX_WIDTH}")
        if w is not None:
            common.require(w.shape == t.shape[-1:], f"the weight of {name} must be [lanes]")
            common.require(w.dtype in common.FLOATS, "weights must be bf16, fp16 or fp32")
            common.require(w.stride(0) == 1 or w.shape[0] == 1, "weights must be dense")
    if kv is not None:
        common.require(kv.dtype == x.dtype, f"x is {x.dtype}, kv is {kv.dtype}")
    common.require(scale in common.SCALES, f"no scale format {scale!r} here")
    common.require(group in (32, 64, 128), "the group must be 32, 64 or 128")
    common.require(x.shape[-1] % group == 0, f"{x.shape[-1]} is no multiple of {group}")
    common.require_fp8(x.device)


def allocate(
    x: Tensor, weight: Tensor | None, kv: Tensor | None, kv_weight: Tensor | None, norm: str,
    kv_norm: str, group: int, scale: str, col_major: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """codes, the scales' buffer, normed and kv_out, as the docstring says."""
    codes = x.new_empty(x.shape, dtype=common.FP8)
    normed = x.new_empty(x.shape if keep else (0,), dtype=out_dtype(x.dtype, weight, norm))
    kv_dtype = x.dtype if kv is None else out_dtype(kv.dtype, kv_weight, kv_norm)
    kv_out = x.new_empty((0,) if kv is None else kv.shape, dtype=kv_dtype)
    return codes, allocate_scales(codes, group, scale, col_major), normed, kv_out


def row_config(tokens: int | torch.SymInt, width: int) -> Config:
    """The launch for rows of another width: as many values a lane, no lane without a value."""
    config = common.launch_config(CONFIGS, tokens)
    if config.rows == 1:
        return Config(1, max(1, min(config.warps, config.warps * pieces(width)[0] // 1024)))
    rows, warps = config.rows, config.warps
    while rows * width > MOST_VALUES * 32 * warps:
        if warps == 16 or (warps == 8 and rows > 2):
            rows //= 2
        else:
            warps *= 2
    return Config(rows, warps)


def _launch(
    x: Tensor, weight: Tensor | None, kv: Tensor | None, kv_weight: Tensor | None,
    outs: tuple[Tensor, ...], *, eps: float, norm: str, kv_eps: float, kv_norm: str,
    precise: bool, group: int, floor: float, scale: str, via: str, by: str,
    col_major: bool, keep: bool,
) -> None:  # fmt: skip
    (tokens, width), m = x.shape, 0 if kv is None else kv.shape[-1]
    common.require_static(lanes=width, kv_lanes=m)
    config = row_config(tokens, width)
    parts, kv_parts = pieces(width, group), pieces(m)
    kv_rows = config.rows * max(1, parts[0] // kv_parts[0]) if m else 1
    padded = common.align4(tokens) if col_major else tokens
    q_programs = common.cdiv(padded, config.rows)
    grid = (q_programs + (common.cdiv(tokens, kv_rows) if m else 0),)
    codes, scales, normed, kv_out = outs
    s_st, s_sg = (1, scales.stride(0)) if col_major else common.strides(scales)
    wrap_triton(norm_quant_kernel)[grid](
        x, x if weight is None else weight, normed, codes, scales, x if kv is None else kv,
        x if kv_weight is None else kv_weight, kv_out, tokens, padded, q_programs,
        common.strides(x)[0], 0 if kv is None else common.strides(kv)[0], s_st, s_sg,
        N=width, A=parts[0], B=parts[1], C=parts[2], ROWS=config.rows, NORM=common.NORMS[norm],
        EPS=eps, HAS_W=weight is not None, KEEP=keep, GROUP=group, FLOOR=floor,
        SCALE=common.SCALES[scale], VIA_MUL=via == "mul", BY_MUL=by == "mul", M=m,
        KA=kv_parts[0], KB=kv_parts[1], KC=kv_parts[2], KV_ROWS=kv_rows,
        KV_NORM=common.NORMS[kv_norm], KV_EPS=kv_eps,
        KV_W=kv_weight is not None, PRECISE=precise, num_warps=config.warps,
    )  # fmt: skip


def _reference_norm(
    x: Tensor, weight: Tensor | None, eps: float, norm: str, precise: bool
) -> Tensor:
    """The normed rows, in fp32 for precise, otherwise in their dtype."""
    if precise:
        x, weight, norm = x.float(), None if weight is None else weight.float(), "once"
    return atoms.rms_norm(x, weight, eps=eps, rounding=norm)


def reference(
    x: Tensor, weight: Tensor | None, kv: Tensor | None, kv_weight: Tensor | None, *, eps: float,
    norm: str, kv_eps: float = 0.0, kv_norm: str = "once", precise: bool = False,
    group: int = 128, floor: float = 1e-10, scale: str = "fp32", via: str = "div", by: str = "div",
    col_major: bool = False, keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op in plain PyTorch, composed of atoms."""
    outs = allocate(x, weight, kv, kv_weight, norm, kv_norm, group, scale, col_major, keep)
    codes, buffer, normed, kv_out = outs
    y = _reference_norm(x, weight, eps, norm, precise)
    kind = "fp32" if scale == "fp32" else "pow2"
    found, s = atoms.group_quant(y, group=group, floor=floor, scale=kind, via=via, by=by)
    codes.copy_(found)
    s = s.to(torch.float8_e8m0fnu).view(torch.uint8) if scale == "e8m0" else s
    buffer.zero_()
    (buffer.t().narrow(0, 0, x.shape[0]) if col_major else buffer).copy_(s)
    if keep:
        normed.copy_(y)
    if kv is not None:
        kv_out.copy_(_reference_norm(kv, kv_weight, kv_eps, kv_norm, precise))
    return codes, finish_scales(buffer, x.shape[0], scale, col_major), normed, kv_out


@torch.library.triton_op("dsv4fuse::norm_quant", mutates_args=())
def norm_quant(
    x: Tensor, weight: Tensor | None, kv: Tensor | None, kv_weight: Tensor | None, *, eps: float,
    norm: str, kv_eps: float = 0.0, kv_norm: str = "once", precise: bool = False,
    group: int = 128, floor: float = 1e-10, scale: str = "fp32", via: str = "div", by: str = "div",
    col_major: bool = False, keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(codes, scales, normed, kv_out): see the module's docstring."""
    _check(x, weight, kv, kv_weight, group, scale)
    kw = dict(eps=eps, norm=norm, kv_eps=kv_eps, kv_norm=kv_norm, precise=precise, group=group,
              floor=floor, scale=scale, via=via, by=by, col_major=col_major, keep=keep)  # fmt: skip
    if common.use_reference(x):
        return reference(x, weight, kv, kv_weight, **kw)
    outs = allocate(x, weight, kv, kv_weight, norm, kv_norm, group, scale, col_major, keep)
    _launch(x, weight, kv, kv_weight, outs, **kw)
    codes, buffer, normed, kv_out = outs
    return codes, finish_scales(buffer, x.shape[0], scale, col_major), normed, kv_out


@norm_quant.register_fake
def _(x, weight, kv, kv_weight, *, norm, kv_norm="once", group=128, scale="fp32",
      col_major=False, keep=False, **_):  # fmt: skip
    _check(x, weight, kv, kv_weight, group, scale)
    codes, buffer, normed, kv_out = allocate(
        x, weight, kv, kv_weight, norm, kv_norm, group, scale, col_major, keep
    )
    return codes, finish_scales(buffer, x.shape[0], scale, col_major), normed, kv_out


def traffic(x: Tensor, kv: Tensor | None, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(x, kv, *outputs)
