"""The op that quantises the turned heads and multiplies fp8 codes: see inv_rope_grouped_bmm."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from . import inv_rope_quant as rope
from ._common import named_strides
from ._grouped import grouped_fp8_kernel
from ._launch import wrap_triton
from ._projection import TILES, allocate, check, columns_of, output, product, weights
from ._strategies import LANES

BF16_ROWS = "the products of single groups come as dense rows of bf16"


def _check(o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, w_scale: Tensor) -> None:
    check(o, cos, sin, w, w_scale)
    block = w.shape[2] // w_scale.shape[2]
    common.require(o.shape[3] % block == 0, f"head_dim is no multiple of the block of {block}")
    common.require(block in (32, 64, 128), "a block of w must hold 32, 64 or 128 lanes")
    common.require(w.stride(-1) == 1, "the last axis of w must be dense")


@torch.library.custom_op("dsv4fuse::grouped_scaled_mm", mutates_args=())
def grouped_scaled_mm(codes: Tensor, scales: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """``launch`` by torch's block-scaled product, one for each group: bf16 ``[T,G,N]``.

    For blocks of 128 × 128, a multiple of 4 tokens and of ``LANES``, as cuBLAS wants its scales;
    on Hopper only.
    """
    out = codes.new_empty((codes.shape[0], *w.shape[:2]), dtype=torch.bfloat16)
    for g in range(w.shape[0]):
        torch._scaled_mm(codes[:, g], w[g].t(), scales[g].t(), w_scale[g].t(),
                         out_dtype=torch.bfloat16, out=out[:, g])  # fmt: skip
    return out


@grouped_scaled_mm.register_fake
def _(codes, scales, w, w_scale):
    return codes.new_empty((codes.shape[0], *w.shape[:2]), dtype=torch.bfloat16)


def launch(
    codes: Tensor, scales: Tensor, w: Tensor, w_scale: Tensor, out: Tensor
) -> None:
    """codes ``[T,G,K]``, scales ``[G, K/SK, ≥ T]`` against e4m3 weights, into out ``[T,G,N]``."""
    tokens, groups, k = codes.shape
    common.require_static(groups=groups, width=k)
    n, sn, sk = w.shape[1], w.shape[1] // w_scale.shape[1], k // w_scale.shape[2]
    tile = common.launch_config(TILES["fp8"], tokens)
    columns = columns_of(tile, groups, tokens, n)
    grid = (groups * common.cdiv(tokens, tile.rows) * common.cdiv(n, columns),)
    wrap_triton(grouped_fp8_kernel)[grid](
        a_ptr=codes, as_ptr=scales, w_ptr=w, ws_ptr=w_scale, out_ptr=out, tokens=tokens,
        **named_strides(codes, "a", "tg"), **named_strides(scales, "as", "gk"),
        **named_strides(w, "w", "gn"), **named_strides(w_scale, "ws", "gnk"),
        **named_strides(out, "out", "tg"), K=k, N=n, SN=sn, SK=sk, BM=tile.rows, BN=columns,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def reference(
    o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, w_scale: Tensor, *, floor: float,
    scale: str, via: str, rope_rounding: str, precise: bool = False,
    out_dtype: torch.dtype | None = None, token_major: bool = True,
) -> Tensor:  # fmt: skip
    """``inv_rope_grouped_fp8`` in plain PyTorch."""
    y = rope.reference(o, cos, sin, rope_rounding=rope_rounding, precise=precise)
    y = atoms.fake_quant(y.float(), group=w.shape[2] // w_scale.shape[2], floor=floor, scale=scale,
                         via=via)  # fmt: skip
    out = product(y, weights(w, w_scale, torch.float32), token_major)
    return out.to(output(o, out_dtype))


@torch.library.triton_op("dsv4fuse::inv_rope_grouped_fp8", mutates_args=())
def inv_rope_grouped_fp8(
    o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, w_scale: Tensor, *, floor: float = 1e-10,
    scale: str = "fp32", via: str = "div", rope_rounding: str, precise: bool = False,
    out_dtype: torch.dtype | None = None, token_major: bool = True, strategy: str = "batched",
) -> Tensor:  # fmt: skip
    """Inverse rope, fp8 quant and grouped projection of codes by codes."""
    _check(o, cos, sin, w, w_scale)
    common.require(strategy in ("batched", "groups"), f"no strategy {strategy!r} here")
    quant = dict(floor=floor, scale=scale, via=via, rope_rounding=rope_rounding, precise=precise)
    if common.use_reference(o):
        return reference(o, cos, sin, w, w_scale, out_dtype=out_dtype, token_major=token_major,
                         **quant)
    codes, scales = rope.inv_rope_quant(
        o, cos, sin, groups=w.shape[0], group=w.shape[2] // w_scale.shape[2], col_major=True,
        token_major=False, **quant,
    )  # fmt: skip
    if strategy == "groups":
        common.require(token_major and output(o, out_dtype) == torch.bfloat16, BF16_ROWS)
        common.require(w.shape[2] % LANES == 0, f"a group's lanes are no multiple of {LANES}")
        return grouped_scaled_mm(codes, scales, w, w_scale)
    out = allocate(o, w, out_dtype, token_major)
    launch(codes, scales, w, w_scale, out)
    return out


@inv_rope_grouped_fp8.register_fake
def _(o, cos, sin, w, w_scale, *, out_dtype=None, token_major=True, **_):
    _check(o, cos, sin, w, w_scale)
    return allocate(o, w, out_dtype, token_major)
