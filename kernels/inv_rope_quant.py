"""Inverse rope of the attention output [→ fp8 group quant for the grouped projection].

Math     ``y = rope(o, cos, sin, inverse)`` on the trailing R elements of each head. For quant
         the H heads fall into ``groups`` of H/groups neighbours, whose K = H/groups * D
         elements are quantised in blocks of ``group``:
         ``s = max(amax|y|, floor) / 448``, for "pow2" rounded up, ``codes = e4m3(y / s)``.
Shapes   o ``[B,S,H,D]``, cos and sin ``[B,S,R/2]``; T = B*S. codes ``[T, groups, K]``,
         scales ``[T, groups, K/group]``, or for col_major **the padded physical tensor**
         ``[groups, K/group, align4(T)]``. ``D % group == 0``; a block may hold both kinds.
Dtypes   o bf16, fp16 or fp32; cos and sin fp32 or a 16-bit float; codes float8_e4m3fn;
         scales fp32, raw ("fp32") or powers of two ("pow2").
Strides  of o, cos, sin any, 0 included; o has last stride 1. inv_rope's out ``[B,S,H,D]`` is
         dense in that order or as ``[B,H,S,D]`` (heads_first). codes are dense as
         ``[T,groups,K]`` (token_major) or the transposed view of a dense ``[groups,T,K]``.
Padding  col_major scales pad the tokens to a multiple of 4, whatever a program holds, with 0.
Rounding rope_rounding as ``atoms.rope``; y is rounded to o.dtype before the quantisation, but
         not for ``precise``. ``via`` as ``atoms.block_scale``; on CUDA both give a product
         with fp32(1/448), as eager does. NaN gives NaN codes and scale in its block.
Source   TensorRT-LLM #14254 (several tokens per program, scale rows padded to 4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from . import norm_rope_cache as rows
from ._common import (
    Config,
    abs_max,
    batch_and_position,
    block_scale,
    divide,
    rotate,
    round_to,
)
from ._launch import wrap_triton
from ._stores import stores

# Rows per program by token count: tokens of a head, or for row-major scales heads of a token;
# columns = elements of one head per program, 0 = all of them. One warp: a block's amax is a
# shuffle, no barrier. 4 tokens make a 16-byte store of column-major scales, 4 heads one of 64.
CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (2, Config(rows=1, warps=1, columns=128)),
    (4, Config(rows=2, warps=1, columns=128)),
    (32, Config(rows=8, warps=4, columns=128)),
    (64, Config(rows=8, warps=4)),
    (256, Config(rows=4, warps=1)),
    (512, Config(rows=8, warps=2)),
    (None, Config(rows=4, warps=1)),
)


@triton.jit
def _rotated(x, cos_at, sin_at, cos_sd, sin_sd, live, first, NOPE: tl.constexpr,
             GROUP: tl.constexpr, ROWS: tl.constexpr, EVERY: tl.constexpr,
             PRECISE: tl.constexpr, dtype: tl.constexpr):
    """fp32 ``[ROWS, GROUP]``, columns first.. of a head, turned back where they are rope."""
    pair = first // 2 + tl.arange(0, GROUP // 2) - NOPE // 2
    inside = (pair >= 0)[None, :]
    mask = live[:, None] & inside
    cos = tl.load(cos_at[:, None] + pair[None, :] * cos_sd, mask=mask, other=1.0)
    sin = tl.load(sin_at[:, None] + pair[None, :] * sin_sd, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(x, (ROWS, GROUP // 2, 2)))
    back = sin.to(tl.float32) * -1.0  # Triton's unary minus is 0 - x, which is no -0 at position 0
    even, odd = rotate(even, odd, cos.to(tl.float32), back, inside, EVERY, not PRECISE, dtype)
    y = tl.reshape(tl.join(even, odd), (ROWS, GROUP))
    if not PRECISE:
        y = round_to(y, dtype)
    return y


# Neither a token count nor a stride that follows it may recompile the kernel.
@stores("codes_ptr", "scale_ptr")
@triton.jit(do_not_specialize=("tokens", "padded", "length", "s_sk"))
def inv_rope_quant_kernel(
    o_ptr, codes_ptr, scale_ptr, cos_ptr, sin_ptr, tokens, padded, length,
    o_sb, o_ss, o_sh, c_st, c_sg, s_st, s_sg, s_sk, cos_sb, cos_ss, cos_sd,
    sin_sb, sin_ss, sin_sd,
    D: tl.constexpr, NOPE: tl.constexpr, HEADS: tl.constexpr, PER: tl.constexpr,
    GROUP: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BY_HEAD: tl.constexpr,
    FLAT: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr, FLOOR: tl.constexpr,
    POW2: tl.constexpr, VIA_MUL: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows × BLOCKS blocks; a row is a head of a token, PER heads make a group.

    Its rows are neighbouring tokens, whose scales lie side by side if they are column-major, or,
    BY_HEAD, neighbouring heads, as those of row-major scales do.
    """
    SPLIT: tl.constexpr = D // (GROUP * BLOCKS)
    NARROW: tl.constexpr = not PRECISE and o_ptr.dtype.element_ty.primitive_bitwidth == 16
    pid = tl.program_id(0)
    part = pid % SPLIT
    if BY_HEAD:
        row = (pid // SPLIT) * ROWS + tl.arange(0, ROWS)
        token, head = row // HEADS, row % HEADS
    else:
        token = (pid // (SPLIT * HEADS)) * ROWS + tl.arange(0, ROWS)
        head = (pid // SPLIT) % HEADS
    live = token < tokens
    b, s = batch_and_position(token, length, FLAT)
    o_at = o_ptr + b * o_sb + s * o_ss + head.to(tl.int64) * o_sh
    cos_at = cos_ptr + b * cos_sb + s * cos_ss
    sin_at = sin_ptr + b * sin_sb + s * sin_ss
    lane = tl.arange(0, GROUP)
    t = token.to(tl.int64)
    codes_at = codes_ptr + t * c_st + (head // PER).to(tl.int64) * c_sg + (head % PER) * D
    scale_at = scale_ptr + t * s_st + (head // PER).to(tl.int64) * s_sg
    k = (head % PER) * (D // GROUP) + part * BLOCKS
    WIDTH: tl.constexpr = triton.next_power_of_2(BLOCKS)
    block = tl.arange(0, WIDTH)
    scales = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in tl.static_range(BLOCKS):
        first = (part * BLOCKS + i) * GROUP
        x = tl.load(o_at[:, None] + (first + lane)[None, :], mask=live[:, None], other=0.0)
        y = x.to(tl.float32)
        # With the whole head in a program only its last blocks can hold rope, known when
        # compiling; otherwise the branch is uniform over the program.
        if SPLIT == 1:
            if (i + 1) * GROUP > NOPE:
                y = _rotated(y, cos_at, sin_at, cos_sd, sin_sd, live, first, NOPE, GROUP, ROWS,
                             EVERY, PRECISE, x.dtype)
        else:
            if first + GROUP > NOPE:
                y = _rotated(y, cos_at, sin_at, cos_sd, sin_sd, live, first, NOPE, GROUP, ROWS,
                             EVERY, PRECISE, x.dtype)
        scale = block_scale(abs_max(y, 1), FLOOR, POW2, VIA_MUL)
        codes = divide(y, scale[:, None], POW2, FLOOR < 1e-30, NARROW).to(tl.float8e4nv)
        tl.store(codes_at[:, None] + (first + lane)[None, :], codes, mask=live[:, None])
        if BY_HEAD:
            scales = tl.where((block == i)[None, :], scale[:, None], scales)
        else:
            tl.store(scale_at + (k + i).to(tl.int64) * s_sk, tl.where(live, scale, 0.0),
                     mask=token < padded)
    if BY_HEAD:  # all of them at a time: memory is written by 64 bytes
        at = (scale_at + k.to(tl.int64))[:, None] + block[None, :]
        tl.store(at, scales, mask=live[:, None] & (block < BLOCKS)[None, :])


def _check(o: Tensor, cos: Tensor, sin: Tensor, groups: int, group: int) -> None:
    heads, d = o.shape[2], o.shape[3]
    common.require(heads % groups == 0, f"{heads} heads do not make {groups} groups")
    common.require(group in (32, 64, 128), "the group must be 32, 64 or 128")
    common.require(d % group == 0, f"head_dim {d} is no multiple of {group}")
    common.require(0 < 2 * cos.shape[-1] <= d, "rope_dim is not within head_dim")
    common.require(o.dtype in common.FLOATS, "o must be bf16, fp16 or fp32")
    common.require(o.stride(-1) == 1, "the last axis of o must be dense")
    common.require(cos.dtype == sin.dtype, "cos and sin differ in dtype")
    common.require_fp8(o.device)


def allocate(
    o: Tensor, groups: int, group: int, col_major: bool, token_major: bool
) -> tuple[Tensor, Tensor]:
    """codes ``[T,groups,K]`` and the scales, with the strides the docstring promises."""
    tokens, k = o.shape[0] * o.shape[1], o.shape[2] // groups * o.shape[3]
    if token_major:
        codes = o.new_empty((tokens, groups, k), dtype=common.FP8)
    else:
        codes = o.new_empty((groups, tokens, k), dtype=common.FP8).transpose(0, 1)
    if col_major:
        shape = (groups, k // group, common.align4(tokens))
    else:
        shape = (tokens, groups, k // group)
    return codes, o.new_empty(shape, dtype=torch.float32)


def _launch(
    o: Tensor, cos: Tensor, sin: Tensor, codes: Tensor, scales: Tensor, *, group: int,
    floor: float, scale: str, via: str, rope_rounding: str, precise: bool, col_major: bool,
) -> None:  # fmt: skip
    batch, length, heads, d = o.shape
    common.require_static(heads=heads, head_dim=d, rope_dim=cos.shape[-1])
    tokens = batch * length
    config = common.launch_config(CONFIGS, tokens)
    width = config.columns or d
    blocks = width // group if width >= group and d % width == 0 else d // group
    padded = common.align4(tokens) if col_major else tokens
    steps = common.strides(scales)
    sg, sk, st = steps if col_major else (*steps[1:], steps[0])
    by_head = not col_major
    programs = common.cdiv(tokens * heads if by_head else padded, config.rows)
    grid = (programs * (1 if by_head else heads) * (d // group // blocks),)
    wrap_triton(inv_rope_quant_kernel)[grid](
        o, codes, scales, cos, sin, tokens, padded, length, *common.strides(o)[:3],
        *common.strides(codes)[:2], st, sg, sk, *common.strides(cos), *common.strides(sin),
        D=d, NOPE=d - 2 * cos.shape[-1], HEADS=heads, PER=heads // codes.shape[1], GROUP=group,
        BLOCKS=blocks, ROWS=config.rows, BY_HEAD=by_head, FLAT=common.flat_mode(batch, length),
        EVERY=rope_rounding == "every" and not precise and cos.dtype == o.dtype,
        PRECISE=precise, FLOOR=floor, POW2=scale == "pow2", VIA_MUL=via == "mul",
        num_warps=config.warps,
    )  # fmt: skip


def _reference_rope(
    o: Tensor, cos: Tensor, sin: Tensor, rope_rounding: str, precise: bool, inverse: bool = True
) -> Tensor:
    x = o.float() if precise else o
    rounding = "once" if precise else rope_rounding
    return atoms.rope(x, cos.unsqueeze(2), sin.unsqueeze(2), inverse=inverse, rounding=rounding)


def reference(
    o: Tensor, cos: Tensor, sin: Tensor, *, rope_rounding: str, precise: bool = False,
    inverse: bool = True, heads_first: bool = False,
) -> Tensor:  # fmt: skip
    """``inv_rope`` in plain PyTorch."""
    out = rows.allocate(o, None, None, None, "none", "none", heads_first)[0]
    return out.copy_(_reference_rope(o, cos, sin, rope_rounding, precise, inverse))


def reference_quant(
    o: Tensor, cos: Tensor, sin: Tensor, *, groups: int, group: int = 128, floor: float = 1e-10,
    scale: str = "fp32", via: str = "div", rope_rounding: str, precise: bool = False,
    col_major: bool = False, token_major: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``inv_rope_quant`` in plain PyTorch."""
    codes, scales = allocate(o, groups, group, col_major, token_major)
    y = _reference_rope(o, cos, sin, rope_rounding, precise).reshape(codes.shape)
    c, s = atoms.group_quant(y, group=group, floor=floor, scale=scale, via=via)
    codes.copy_(c)
    if col_major:
        scales.zero_()[..., : codes.shape[0]] = s.permute(1, 2, 0)
    else:
        scales.copy_(s)
    return codes, scales


@torch.library.triton_op("dsv4fuse::inv_rope", mutates_args=())
def inv_rope(
    o: Tensor, cos: Tensor, sin: Tensor, *, rope_rounding: str, precise: bool = False,
    inverse: bool = True, heads_first: bool = False,
) -> Tensor:  # fmt: skip
    """Inverse (or plain) rope, ``[B,S,H,D]``: see the module's docstring."""
    if common.use_reference(o):
        return reference(o, cos, sin, rope_rounding=rope_rounding, precise=precise,
                         inverse=inverse, heads_first=heads_first)
    return rows.launch(
        o, None, cos, sin, None, None, q_eps=0.0, kv_eps=0.0, q_norm="none", kv_norm="none",
        rope_rounding=rope_rounding, precise=precise, q_heads_first=heads_first, quant_group=0,
        quant_floor=0.0, quant_scale="fp32", via="div", inverse=inverse,
    )[0]  # fmt: skip


@inv_rope.register_fake
def _(o, cos, sin, *, heads_first=False, **_):
    rows.check(o, None, cos, sin)
    return rows.allocate(o, None, None, None, "none", "none", heads_first)[0]


@torch.library.triton_op("dsv4fuse::inv_rope_quant", mutates_args=())
def inv_rope_quant(
    o: Tensor, cos: Tensor, sin: Tensor, *, groups: int, group: int = 128, floor: float = 1e-10,
    scale: str = "fp32", via: str = "div", rope_rounding: str, precise: bool = False,
    col_major: bool = False, token_major: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Inverse rope as fp8 codes and scales per group of heads: see the module's docstring."""
    _check(o, cos, sin, groups, group)
    kw = dict(group=group, floor=floor, scale=scale, via=via, rope_rounding=rope_rounding,
              precise=precise, col_major=col_major)
    if common.use_reference(o):
        return reference_quant(o, cos, sin, groups=groups, token_major=token_major, **kw)
    codes, scales = allocate(o, groups, group, col_major, token_major)
    _launch(o, cos, sin, codes, scales, **kw)
    return codes, scales


@inv_rope_quant.register_fake
def _(o, cos, sin, *, groups, group=128, col_major=False, token_major=True, **_):
    _check(o, cos, sin, groups, group)
    return allocate(o, groups, group, col_major, token_major)


def traffic(o: Tensor, cos: Tensor, sin: Tensor, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(o, cos, sin, *outputs)
