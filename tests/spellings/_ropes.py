"""Rope on the trailing interleaved pairs as people write it.

``rope(x, cos, sin)``, cos and sin ``[..., R/2]`` in fp32 broadcasting against x's leading axes;
those in COMPLEX take ``rope(x, freqs)``. The inverse is the same with −sin, or the conjugate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rope = Callable[..., Tensor]
REAL: dict[str, Rope] = {}
COMPLEX: dict[str, Rope] = {}
EVERY: dict[str, Rope] = {}  # tables and arithmetic in x's dtype
MISSES: dict[str, tuple[Rope, str]] = {}


def register(table: dict[str, Rope]) -> Callable[[Rope], Rope]:
    def enter(fn: Rope) -> Rope:
        table[fn.__name__.strip("_")] = fn
        return fn

    return enter


def cut(x: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    rd = 2 * cos.shape[-1]
    return x[..., :-rd], x[..., -rd:]


def turn(even: Tensor, odd: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return even * cos - odd * sin, odd * cos + even * sin


def _rotate_half(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


@register(REAL)
def slices_and_stack(x, cos, sin):
    nope, r = cut(x, cos)
    r = r.float()
    turned = torch.stack(turn(r[..., 0::2], r[..., 1::2], cos, sin), dim=-1).flatten(-2)
    return torch.cat((nope, turned.to(x.dtype)), dim=-1)


@register(REAL)
def hf(x, cos, sin):
    cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    nope, r = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
    turned = ((r.float() * cos) + (_rotate_half(r).float() * sin)).to(x.dtype)
    return torch.cat([nope, turned], dim=-1)


@register(REAL)
def doubled_by_stack(x, cos, sin):
    cos, sin = (torch.stack((t, t), dim=-1).flatten(-2) for t in (cos, sin))
    nope, r = x.split([x.shape[-1] - cos.shape[-1], cos.shape[-1]], dim=-1)
    pairs = r.float().unflatten(-1, (-1, 2))
    half = torch.cat((-pairs[..., 1:], pairs[..., :1]), dim=-1).flatten(-2)
    return torch.cat((nope, (r.float() * cos + half * sin).to(x.dtype)), dim=-1)


@register(REAL)
def unflatten_unbind(x, cos, sin):
    nope, r = cut(x, cos)
    even, odd = r.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack(turn(even, odd, cos, sin), dim=-1).flatten(-2)
    return torch.cat((nope, turned.to(x.dtype)), dim=-1)


@register(REAL)
def chunk_of_pairs(x, cos, sin):
    nope, r = cut(x, cos)
    even, odd = r.float().unflatten(-1, (-1, 2)).chunk(2, dim=-1)
    turned = torch.cat(turn(even, odd, cos.unsqueeze(-1), sin.unsqueeze(-1)), dim=-1)
    return torch.cat((nope, turned.flatten(-2).to(x.dtype)), dim=-1)


@register(REAL)
def split_of_pairs(x, cos, sin):
    nope, r = cut(x, cos)
    even, odd = r.float().reshape(*r.shape[:-1], -1, 2).split(1, dim=-1)
    a, b = turn(even.squeeze(-1), odd.squeeze(-1), cos, sin)
    return torch.cat((nope, torch.stack((a, b), -1).reshape(r.shape).to(x.dtype)), -1)


@register(REAL)
def view_pairs(x, cos, sin):
    nope, r = cut(x, cos)
    pairs = r.float().contiguous().view(*r.shape[:-1], -1, 2)
    a, b = turn(pairs[..., 0], pairs[..., 1], cos, sin)
    return torch.cat((nope, torch.stack((a, b), -1).view(r.shape).type_as(x)), -1)


@register(REAL)
def select_pairs(x, cos, sin):
    rd = 2 * cos.shape[-1]
    pairs = x.narrow(-1, x.shape[-1] - rd, rd).float().unflatten(-1, (-1, 2))
    a, b = turn(pairs.select(-1, 0), pairs.select(-1, 1), cos, sin)
    turned = torch.stack([a, b], dim=-1).flatten(-2, -1).to(x.dtype)
    return torch.cat([x.narrow(-1, 0, x.shape[-1] - rd), turned], dim=-1)


def _transposed_pairs(x, cos, sin):
    nope, r = cut(x, cos)
    rows = r.float().unflatten(-1, (-1, 2)).transpose(-1, -2)
    a, b = turn(rows[..., 0, :], rows[..., 1, :], cos, sin)
    turned = torch.stack((a, b), dim=-2).transpose(-1, -2).flatten(-2)
    return torch.cat((nope, turned.to(x.dtype)), dim=-1)


@register(REAL)
def slices_of_the_whole(x, cos, sin):
    start = x.shape[-1] - 2 * cos.shape[-1]
    a, b = turn(x[..., start::2].float(), x[..., start + 1 :: 2].float(), cos, sin)
    return torch.cat((x[..., :start], torch.stack((a, b), -1).flatten(-2).to(x.dtype)), -1)


def _strided_assignment(x, cos, sin):
    out, start = x.clone(), x.shape[-1] - 2 * cos.shape[-1]
    a, b = turn(x[..., start::2].float(), x[..., start + 1 :: 2].float(), cos, sin)
    out[..., start::2] = a.to(x.dtype)
    out[..., start + 1 :: 2] = b.to(x.dtype)
    return out


@register(REAL)
def assignment_into_empty(x, cos, sin):
    nope, r = cut(x, cos)
    out = torch.empty_like(r)
    out[..., 0::2], out[..., 1::2] = turn(r[..., 0::2].float(), r[..., 1::2].float(), cos, sin)
    return torch.cat((nope, out), dim=-1)


@register(REAL)
def copy_into_the_slice(x, cos, sin):
    x = x.clone()
    r = x[..., -2 * cos.shape[-1] :]
    even, odd = r.float().unflatten(-1, (-1, 2)).unbind(-1)
    r.copy_(torch.stack(turn(even, odd, cos, sin), dim=-1).flatten(-2))
    return x


@register(REAL)
def assignment_into_the_slice(x, cos, sin):
    x, rd = x.clone(), 2 * cos.shape[-1]
    wide = x[..., -rd:].float()
    a, b = turn(wide[..., ::2], wide[..., 1::2], cos, sin)
    x[..., -rd:] = torch.stack((a, b), dim=-1).flatten(-2).to(x.dtype)
    return x


@register(REAL)
def methods_and_commuted(x, cos, sin):
    nope, r = cut(x, cos)
    even, odd = r[..., ::2].float(), r[..., 1::2].float()
    a = torch.sub(cos.mul(even), sin.mul(odd))
    b = torch.add(sin * even, cos * odd)
    return torch.cat((nope, torch.stack((a, b), -1).flatten(-2).to(x.dtype)), -1)


@register(REAL)
def minus_one(x, cos, sin):
    nope, r = cut(x, cos)
    even, odd = r[..., ::2].float(), r[..., 1::2].float()
    a = even * cos + (odd * -1) * sin
    b = odd * cos + even * sin
    return torch.cat((nope, torch.stack((a, b), -1).flatten(-2).to(x.dtype)), -1)


@register(REAL)
def sum_of_pairs(x, cos, sin):
    nope, r = cut(x, cos)
    pairs = r.float().unflatten(-1, (-1, 2))
    a = (pairs * torch.stack((cos, -sin), dim=-1)).sum(-1)
    b = (pairs * torch.stack((sin, cos), dim=-1)).sum(-1)
    return torch.cat((nope, torch.stack((a, b), -1).flatten(-2).to(x.dtype)), -1)


# ---- complex -----------------------------------------------------------------------------------


@register(COMPLEX)
def reference(x, freqs):
    x = x.clone()
    y = x[..., -2 * freqs.shape[-1] :]
    z = torch.view_as_complex(y.float().unflatten(-1, (-1, 2)))
    y.copy_(torch.view_as_real(z * freqs).flatten(-2))
    return x


@register(COMPLEX)
def complex_cat(x, freqs):
    nope, r = cut(x, freqs)
    z = torch.view_as_complex(r.float().reshape(*r.shape[:-1], -1, 2))
    return torch.cat((nope, torch.view_as_real(z * freqs).flatten(-2).type_as(x)), dim=-1)


@register(COMPLEX)
def complex_swapped(x, freqs):
    nope, r = cut(x, freqs)
    z = torch.view_as_complex(r.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.cat((nope, torch.view_as_real(freqs * z).reshape(r.shape).to(x.dtype)), dim=-1)


# ---- in the activation's dtype -----------------------------------------------------------------


@register(EVERY)
def narrow_slices(x, cos, sin):
    nope, r = cut(x, cos)
    turned = torch.stack(turn(r[..., 0::2], r[..., 1::2], cos, sin), dim=-1).flatten(-2)
    return torch.cat((nope, turned), dim=-1)


@register(EVERY)
def narrow_rotate_half(x, cos, sin):
    cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    nope, r = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
    return torch.cat([nope, r * cos + _rotate_half(r) * sin], dim=-1)


# ---- not matched -------------------------------------------------------------------------------


def _matrix(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    nope, r = cut(x, cos)
    m = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    pairs = r.float().unflatten(-1, (-1, 2)).unsqueeze(-1)
    return torch.cat((nope, (m @ pairs).squeeze(-1).flatten(-2).to(x.dtype)), -1)


def _gathered_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    nope, r = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
    lane = torch.arange(cos.shape[-1])
    half = r.float()[..., lane ^ 1] * torch.where(lane % 2 == 0, -1.0, 1.0)
    return torch.cat([nope, (r.float() * cos + half * sin).to(x.dtype)], dim=-1)


MISSES["matrix"] = (_matrix, "a 2×2 matrix product is a matmul, whose rounding order is not told")
MISSES["transposed_pairs"] = (
    _transposed_pairs,
    "a stack in front of the last axis counts as joined rows, though a transpose follows",
)
MISSES["strided_assignment"] = (
    _strided_assignment,
    "a strided assignment is read where it covers the whole axis, not behind the nope lanes",
)
MISSES["gathered_half"] = (_gathered_half, "lanes picked through an index tensor are opaque")
