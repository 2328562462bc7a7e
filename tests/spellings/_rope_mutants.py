"""Edits that break slices_and_stack, the plainest of the ropes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ropes import Rope, cut, register, turn

MUTANTS: dict[str, Rope] = {}
# What is left of a rope in these: one with other tables, or one of other lanes without their norm.
STILL_ROPES = {
    "cos_and_sin_exchanged": "norm",
    "leading_lanes": "Q: rope",
    "nope_from_elsewhere": "Q: rope",
    "lanes_before_the_rope": "Q: rope",
}


def _pairs(turned_by: Callable[..., Any]) -> Rope:
    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        nope, r = cut(x, cos)
        r = r.float()
        turned = torch.stack(turned_by(r[..., 0::2], r[..., 1::2], cos, sin), dim=-1)
        return torch.cat((nope, turned.flatten(-2).to(x.dtype)), dim=-1)

    return rope


MUTANTS["even_and_odd_swapped"] = _pairs(lambda e, o, c, s: (o * c - e * s, e * c + o * s))
MUTANTS["results_swapped"] = _pairs(lambda e, o, c, s: (o * c + e * s, e * c - o * s))
MUTANTS["sign_of_one_sine"] = _pairs(lambda e, o, c, s: (e * c + o * s, o * c + e * s))
MUTANTS["sign_of_the_other_sine"] = _pairs(lambda e, o, c, s: (e * c - o * s, o * c - e * s))
MUTANTS["cos_and_sin_exchanged"] = _pairs(lambda e, o, c, s: (e * s - o * c, o * s + e * c))
MUTANTS["one_cos_is_sin"] = _pairs(lambda e, o, c, s: (e * c - o * s, o * s + e * s))
MUTANTS["odd_in_both"] = _pairs(lambda e, o, c, s: (e * c - o * s, o * c + o * s))
MUTANTS["pairs_rotated_by_one"] = _pairs(
    lambda e, o, c, s: (e * c - o.roll(1, -1) * s, o * c + e * s)
)
MUTANTS["tables_reversed"] = _pairs(
    lambda e, o, c, s: (e * c.flip(-1) - o * s.flip(-1), o * c.flip(-1) + e * s.flip(-1))
)
MUTANTS["tables_of_other_tokens"] = _pairs(
    lambda e, o, c, s: (e * c - o * s, o * c.roll(1, 1) + e * s)
)
MUTANTS["rounded_on_the_way"] = _pairs(
    lambda e, o, c, s: ((e * c).bfloat16().float() - o * s, o * c + e * s)
)


@register(MUTANTS)
def neox_halves(x, cos, sin):
    nope, r = cut(x, cos)
    a, b = r.float().chunk(2, dim=-1)
    return torch.cat((nope, torch.cat(turn(a, b, cos, sin), dim=-1).to(x.dtype)), dim=-1)


@register(MUTANTS)
def leading_lanes(x, cos, sin):
    rd = 2 * cos.shape[-1]
    r = x[..., :rd].float()
    turned = torch.stack(turn(r[..., 0::2], r[..., 1::2], cos, sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., rd:]), dim=-1)


@register(MUTANTS)
def halves_in_pairs_out(x, cos, sin):
    nope, r = cut(x, cos)
    a, b = r.float().chunk(2, dim=-1)
    turned = torch.stack(turn(a, b, cos, sin), dim=-1).flatten(-2)
    return torch.cat((nope, turned.to(x.dtype)), dim=-1)


@register(MUTANTS)
def nope_from_elsewhere(x, cos, sin):
    r = x[..., -2 * cos.shape[-1] :].float()
    turned = torch.stack(turn(r[..., 0::2], r[..., 1::2], cos, sin), dim=-1).flatten(-2)
    return torch.cat((x[..., : -2 * cos.shape[-1]].roll(1, -1), turned.to(x.dtype)), dim=-1)


@register(MUTANTS)
def lanes_before_the_rope(x, cos, sin):
    start = x.shape[-1] - 2 * cos.shape[-1] - 2
    r = x[..., start:-2].float()
    turned = torch.stack(turn(r[..., 0::2], r[..., 1::2], cos, sin), dim=-1).flatten(-2)
    return torch.cat((x[..., : start + 2], turned.to(x.dtype)), dim=-1)
