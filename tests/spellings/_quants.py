"""fp8 group quantisation as people write it, one piece of it changed at a time.

``quantise(x, group, **pieces)`` answers codes ``[..., n, group]`` and scales ``[..., n, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
MAX = torch.finfo(FP8).max
FLOOR = 0.5  # large enough that some blocks lie below it
Piece = Callable[..., Any]


def quantise(
    x: Tensor,
    group: int,
    *,
    blocks: Piece = lambda x, g: x.unflatten(-1, (-1, g)),
    amax: Piece = lambda b: b.float().abs().amax(-1, keepdim=True),
    floor: Piece = lambda a, f=FLOOR: a.clamp_min(f),
    scale: Piece = lambda a: a / MAX,
    codes: Piece = lambda b, s: (b.float() / s).clamp(-MAX, MAX).to(FP8),
) -> tuple[Tensor, Tensor]:
    b = blocks(x, group)
    s = scale(floor(amax(b)))
    return codes(b, s), s


def fake(x: Tensor, group: int, **pieces: Piece) -> Tensor:
    """x through fp8 and back."""
    codes, s = quantise(x, group, **pieces)
    return (codes.float() * s).flatten(-2).to(x.dtype)


def _pow2(a: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(a / MAX)))


VARIANTS: dict[str, dict[str, Piece]] = {
    "default": {},
    # blocks
    "view": dict(blocks=lambda x, g: x.view(*x.shape[:-1], -1, g)),
    "reshape": dict(blocks=lambda x, g: x.reshape(*x.shape[:-1], x.shape[-1] // g, g)),
    "widened_first": dict(blocks=lambda x, g: x.float().unflatten(-1, (-1, g))),
    # block maxima
    "float_after_abs": dict(amax=lambda b: b.abs().float().amax(-1, keepdim=True)),
    "float_after_amax": dict(amax=lambda b: b.abs().amax(-1, keepdim=True).float()),
    "max_values": dict(amax=lambda b: b.float().abs().max(dim=-1, keepdim=True).values),
    "max_first": dict(amax=lambda b: b.float().abs().max(-1, True)[0]),
    "functions": dict(amax=lambda b: torch.amax(torch.abs(b.float()), dim=-1, keepdim=True)),
    "no_keepdim": dict(amax=lambda b: b.float().abs().amax(dim=-1).unsqueeze(-1)),
    "infinity_norm": dict(
        amax=lambda b: torch.linalg.vector_norm(b.float(), ord=torch.inf, dim=-1)[..., None]
    ),
    # floors
    "clamp": dict(floor=lambda a, f=FLOOR: a.clamp(min=f)),
    "maximum": dict(floor=lambda a, f=FLOOR: torch.maximum(a, torch.full_like(a, f))),
    "clip": dict(floor=lambda a, f=FLOOR: torch.clip(a, f)),
    "where": dict(floor=lambda a, f=FLOOR: torch.where(a < f, f, a)),
    "where_swapped": dict(floor=lambda a, f=FLOOR: torch.where(f > a, f, a)),
    "no_floor": dict(floor=lambda a, f=FLOOR: a),
    # scales
    "times_inverse": dict(scale=lambda a: a * (1.0 / MAX)),
    "pow2": dict(scale=_pow2),
    "pow2_methods": dict(scale=lambda a: (a / MAX).log2().ceil().exp2()),
    "pow2_times_inverse": dict(scale=lambda a: (a * (1 / MAX)).log2().ceil().exp2()),
    "pow2_by_pow": dict(scale=lambda a: torch.pow(2.0, torch.ceil(torch.log2(a / MAX)))),
    "pow2_by_stars": dict(scale=lambda a: 2 ** (a / MAX).log2().ceil()),
    # codes
    "not_saturated": dict(codes=lambda b, s: (b.float() / s).to(FP8)),
    "clamped_in_two": dict(
        codes=lambda b, s: (b.float() / s).clamp_min(-MAX).clamp_max(MAX).to(FP8)
    ),
    "promoted": dict(codes=lambda b, s: (b / s).clamp(min=-MAX, max=MAX).to(FP8)),
    "clamped_in_place": dict(codes=lambda b, s: (b.float() / s).clamp_(-MAX, MAX).to(FP8)),
    "pow2_reciprocal": dict(
        scale=_pow2, codes=lambda b, s: (b.float() * s.reciprocal()).clamp(-MAX, MAX).to(FP8)
    ),
    "pow2_one_over": dict(
        scale=_pow2, codes=lambda b, s: (b.float() * (1.0 / s)).clamp(-MAX, MAX).to(FP8)
    ),
}
LOOSE = {"pow2_by_pow", "pow2_by_stars"}  # matched through an ulp rule
MISSES: dict[str, tuple[dict[str, Piece], str]] = {
    "where_or_equal": (
        dict(floor=lambda a, f=FLOOR: torch.where(a <= f, f, a)),
        "where with ≤ answers the bound's zero for the other zero, a clamp does not",
    ),
    "reciprocal": (
        dict(codes=lambda b, s: (b.float() * s.reciprocal()).clamp(-MAX, MAX).to(FP8)),
        "the kernel divides; a product with the rounded reciprocal differs, so it is declined",
    ),
    "max_and_min": (
        dict(amax=lambda b: torch.maximum(b.amax(-1, True), -b.amin(-1, True)).float()),
        "the larger of two extremes is not seen as a maximum of absolute values",
    ),
}
MUTANTS: dict[str, dict[str, Piece]] = {  # of "default", a few of "pow2"
    "floor_after_division": dict(
        floor=lambda a, f=FLOOR: a, scale=lambda a: (a / MAX).clamp_min(FLOOR)
    ),
    "no_abs": dict(amax=lambda b: b.float().amax(-1, keepdim=True)),
    "mean_for_maximum": dict(amax=lambda b: b.float().abs().mean(-1, keepdim=True)),
    "maximum_of_the_row": dict(
        amax=lambda b: b.float().abs().amax((-2, -1), keepdim=True).expand(*b.shape[:-1], 1)
    ),
    "other_axis": dict(
        amax=lambda b: b.float().abs().amax(-2, keepdim=True)[..., :1].expand(*b.shape[:-1], 1)
    ),
    "half_the_block": dict(amax=lambda b: b[..., ::2].float().abs().amax(-1, keepdim=True)),
    "scale_of_next_block": dict(
        amax=lambda b: b.roll(1, -2).float().abs().amax(-1, keepdim=True)
    ),
    "strided_blocks": dict(blocks=lambda x, g: x.unflatten(-1, (g, -1)).transpose(-1, -2)),
    "other_maximum": dict(scale=lambda a: a / 240.0),
    "scale_inverted": dict(scale=lambda a: MAX / a),
    "scale_cubed_root": dict(scale=lambda a: (a / MAX).sqrt()),
    "times_scale": dict(codes=lambda b, s: (b.float() * s).clamp(-MAX, MAX).to(FP8)),
    "saturates_early": dict(codes=lambda b, s: (b.float() / s).clamp(-240, 240).to(FP8)),
    "positive_only": dict(codes=lambda b, s: (b.float() / s).clamp(0, MAX).to(FP8)),
    "rounded_quotient": dict(codes=lambda b, s: (b.float() / s).bfloat16().to(FP8)),
    "pow2_floor": dict(scale=lambda a: torch.exp2(torch.floor(torch.log2(a / MAX)))),
    "pow2_round": dict(scale=lambda a: torch.exp2(torch.round(torch.log2(a / MAX)))),
    "three_by_pow": dict(scale=lambda a: torch.pow(3.0, torch.ceil(torch.log2(a / MAX)))),
    "pow_of_two": dict(scale=lambda a: torch.pow(torch.ceil(torch.log2(a / MAX)), 2.0)),
    "min_values": dict(amax=lambda b: b.float().abs().min(dim=-1, keepdim=True).values),
    "max_indices": dict(amax=lambda b: b.float().abs().max(dim=-1, keepdim=True).indices.float()),
    "where_below": dict(floor=lambda a, f=FLOOR: torch.where(a > f, f, a)),
    "where_another_bound": dict(floor=lambda a, f=FLOOR: torch.where(a < f, 1.3 * f, a)),
    "natural_log": dict(scale=lambda a: torch.exp(torch.ceil(torch.log(a / MAX)))),
}
