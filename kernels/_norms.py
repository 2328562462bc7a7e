"""RMSNorm inside kernels, in the steps and roundings of ``atoms.rms_norm``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import mul_rn, round_few, round_to, rsqrt


@triton.jit
def load_piece(ptr, at, live, other, START: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """Columns START.. of rows at ``at``; ``[ROWS, WIDTH]``."""
    col = START + tl.arange(0, WIDTH)
    mask = live[:, None]
    if START + WIDTH > N:
        mask = mask & (col < N)[None, :]
    return tl.load(ptr + at[:, None] + col[None, :], mask=mask, other=other)


@triton.jit
def load_weight(ptr, START: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
                HAS_W: tl.constexpr):
    """The weight of the same columns, read before the reduction that precedes its use."""
    if HAS_W:
        col = START + tl.arange(0, WIDTH)
        if START + WIDTH > N:
            return tl.load(ptr + col, mask=col < N, other=0.0)
        else:
            return tl.load(ptr + col)
    else:
        return 0.0


@triton.jit
def squares(x, NORM: tl.constexpr, PRECISE: tl.constexpr, XD: tl.constexpr):
    """x² of fp32 rows, rounded to XD for "every"."""
    if NORM == 4 and not PRECISE:
        return round_to(mul_rn(x, x), XD)
    else:
        return x * x


@triton.jit
def reciprocal_rms(total, D: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
                   PRECISE: tl.constexpr, XD: tl.constexpr):
    """rsqrt(Σ x² / D + eps), one value a row, rounded where NORM says."""
    mean = mul_rn(total, 1.0 / D)
    if NORM == 4 and not PRECISE:  # "every"
        return round_few(rsqrt(round_few(round_few(mean, XD) + EPS, XD)), XD)
    else:
        rstd = rsqrt(mean + EPS)
        if NORM == 2 and not PRECISE:  # "rstd"
            rstd = round_few(rstd, XD)
        return rstd


@triton.jit
def scaled(x, rstd, w, HAS_W: tl.constexpr, NORM: tl.constexpr, PRECISE: tl.constexpr,
           XD: tl.constexpr, OD: tl.constexpr):
    """``x · rstd [· w]``: XD is the input's dtype, OD the output's; w ``[lanes]``."""
    y = x * rstd[:, None]
    if not PRECISE and (NORM != 1 or not HAS_W):  # "once" rounds after the weight alone
        y = round_to(y, XD)
    if HAS_W:
        y = y * w.to(tl.float32)[None, :]
        if not PRECISE:
            y = round_to(y, OD)
    return y


def out_dtype(x: torch.dtype, weight: Tensor | None, norm: str) -> torch.dtype:
    """What PyTorch's promotion gives: the weight counts where it multiplies a rounded value."""
    if weight is None or norm in ("none", "once"):
        return x
    return torch.promote_types(x, weight.dtype)


def pieces(width: int, least: int = 32) -> tuple[int, int, int]:
    """At most three powers of two that cover a row: 7168 = 4096 + 2048 + 1024.

    Three equal ones where that is exact (1536 = 3 · 512): their squares are added lane by lane,
    before one reduction. Where width is a multiple of ``least``, a power of two, so is each piece.
    """
    third = width // 3
    if width == 3 * third and third & (third - 1) == 0 and third >= least:
        return third, third, third
    out: list[int] = []
    for left in (2, 1, 0):
        power = 1 << width.bit_length() >> 1
        whole = power == width or (left > 0 and power >= least)
        out.append(power if whole else max(least, triton.next_power_of_2(width)))
        width = max(0, width - out[-1])
    return out[0], out[1], out[2]
