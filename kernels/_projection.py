"""Host side shared by the ops of inv_rope_grouped_bmm: shapes, launch tables, plain products; the
tile of expert_mm's product, too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _common as common


@dataclass(frozen=True)
class Tile:
    """Rows (tokens), output columns and summed lanes of a program's tile; warps; pipeline stages;
    the shape of its loop (SINGLE of ``grouped_kernel``)."""

    rows: int
    columns: int
    lanes: int
    warps: int
    stages: int
    single: bool = False


# By token count, measured on an H200. Up to 16 tokens the weights are what moves: so many
# columns that each SM has one part of them, and many stages in flight.
PROGRAMS = 96  # an H200 has 132 SMs
TILES: dict[str, tuple[tuple[int | None, Tile], ...]] = {
    "wide": (  # weights in o's dtype
        (16, Tile(16, 64, 64, 4, 10, single=True)),
        (64, Tile(64, 64, 64, 4, 8)),
        (256, Tile(128, 128, 64, 8, 4)),
        (None, Tile(128, 256, 64, 8, 3)),
    ),
    "e4m3": (  # weights dequantised on the way
        (16, Tile(16, 64, 128, 4, 4)),
        (64, Tile(64, 64, 128, 4, 3)),
        (256, Tile(128, 64, 64, 4, 3)),
        (None, Tile(128, 128, 64, 8, 3)),
    ),
    "fp8": (  # codes times codes; the lanes are a scale's block
        (16, Tile(16, 64, 128, 4, 4)),
        (64, Tile(64, 64, 128, 4, 4)),
        (None, Tile(64, 128, 128, 4, 3)),
    ),
}


def columns_of(tile: Tile, groups: int, tokens: int | torch.SymInt, n: int) -> int:
    """A tile's columns: fewer where the launch would leave SMs without a program."""
    rows = common.cdiv(common.size_hint(tokens), tile.rows)
    columns = min(tile.columns, max(16, 1 << (n - 1).bit_length()))
    while columns > 16 and groups * rows * common.cdiv(n, columns) < PROGRAMS:
        columns //= 2
    return columns


def check(o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, w_scale: Tensor | None) -> None:
    heads, d = o.shape[2], o.shape[3]
    groups, _, k = w.shape
    common.require(heads % groups == 0, f"{heads} heads do not make {groups} groups")
    common.require(k == heads // groups * d, f"w takes {k} elements, not {heads // groups * d}")
    common.require(d % 16 == 0, f"head_dim {d} is no multiple of 16")
    common.require(0 < 2 * cos.shape[-1] <= d, "rope_dim is not within head_dim")
    common.require(o.dtype in common.FLOATS[:2], "o must be bf16 or fp16")
    common.require(o.stride(-1) == 1, "the last axis of o must be dense")
    common.require(cos.dtype == sin.dtype, "cos and sin differ in dtype")
    if w_scale is None:
        common.require(w.dtype == o.dtype, "w must have o's dtype, or be e4m3 with scales")
    else:
        _check_scales(w, w_scale)
        common.require_fp8(o.device)


def _check_scales(w: Tensor, w_scale: Tensor) -> None:
    common.require(w.dtype == common.FP8, "w with scales must be e4m3")
    common.require(w_scale.dtype == torch.float32, "the scales of w must be fp32")
    groups, n, k = w.shape
    fits = w_scale.dim() == 3 and w_scale.shape[0] == groups
    fits = fits and n % w_scale.shape[1] == 0 and k % w_scale.shape[2] == 0
    common.require(fits, "the scales of w must be [groups, N / block, K / block]")
    lanes = k // w_scale.shape[2]
    common.require(lanes & (lanes - 1) == 0 and lanes >= 16, "a block of w must hold 2^n lanes")


def output(o: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    return o.dtype if out_dtype is None else out_dtype


def allocate(o: Tensor, w: Tensor, out_dtype: torch.dtype | None, token_major: bool) -> Tensor:
    """out ``[T,G,N]``, dense or a view of a dense ``[G,T,N]``."""
    tokens, (groups, n, _) = o.shape[0] * o.shape[1], w.shape
    dtype = output(o, out_dtype)
    if token_major:
        return o.new_empty((tokens, groups, n), dtype=dtype)
    return o.new_empty((groups, tokens, n), dtype=dtype).transpose(0, 1)


def power_of_two(n: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides n (0: any does)."""
    return min(most, n & -n) if n else most


@torch.library.custom_op("dsv4fuse::grouped_bmm", mutates_args=())
def grouped_bmm(y: Tensor, w: Tensor) -> Tensor:
    """y ``[T,G,K]`` times w ``[G,N,K]`` as a dense ``[T,G,N]``.

    Opaque, since a graph has no bmm that writes strided rows: without it a copy of the result
    costs a fifth of the product.
    """
    out = y.new_empty((y.shape[0], w.shape[0], w.shape[1]))
    torch.bmm(y.transpose(0, 1), w.transpose(1, 2), out=out.transpose(0, 1))
    return out


@grouped_bmm.register_fake
def _(y, w):
    return y.new_empty((y.shape[0], w.shape[0], w.shape[1]))


def product(y: Tensor, w: Tensor, token_major: bool) -> Tensor:
    """``[B,S,H,D]`` times the groups' weights by bmm, out as ``allocate`` promises."""
    groups, _, k = w.shape
    y = y.reshape(y.shape[0] * y.shape[1], groups, k)
    if token_major:
        return grouped_bmm(y, w)
    return torch.bmm(y.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1)


def weights(w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 weights times their blocks' scales, rounded to dtype."""
    sn, sk = w.shape[1] // w_scale.shape[1], w.shape[2] // w_scale.shape[2]
    scale = w_scale.repeat_interleave(sn, 1).repeat_interleave(sk, 2)
    return (w.float() * scale).to(dtype)
