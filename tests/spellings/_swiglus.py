"""Clamp, SiLU and product as people write them, one piece of it changed at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIMIT = 1.5  # within reach of the inputs, so that a missing clamp changes the result
WIDTH = 96
Pair = tuple[Tensor, Tensor]

SILU: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": F.silu,
    "module": lambda g: nn.SiLU()(g),
    "in_place": lambda g: F.silu(g.clone(), inplace=True),
    "over_exp": lambda g: g / (1 + torch.exp(-g)),
    "over_exp_methods": lambda g: g.div((-g).exp().add(1.0)),
    "times_sigmoid": lambda g: g * torch.sigmoid(g),
    "sigmoid_times": lambda g: g.sigmoid() * g,
    "expit": lambda g: torch.special.expit(g) * g,
    "times_one_over": lambda g: g * (1.0 / (1.0 + torch.exp(-g))),
}
LOOSE_SILU = {"times_sigmoid", "sigmoid_times", "expit", "times_one_over"}

CLAMP: dict[str, Callable[..., Pair]] = {
    "clamp": lambda g, u, b=LIMIT: (g.clamp(max=b), u.clamp(-b, b)),
    "keywords": lambda g, u, b=LIMIT: (torch.clamp(g, max=b), torch.clamp(u, min=-b, max=b)),
    "in_place": lambda g, u, b=LIMIT: (g.clone().clamp_(max=b), u.clone().clamp_(-b, b)),
    "clamp_max": lambda g, u, b=LIMIT: (g.clamp_max(b), u.clamp_max(b).clamp_min(-b)),
    "min_first": lambda g, u, b=LIMIT: (g.clamp_max(b), u.clamp_min(-b).clamp_max(b)),
    "hardtanh": lambda g, u, b=LIMIT: (g.clamp(max=b), F.hardtanh(u, -b, b)),
    "clip": lambda g, u, b=LIMIT: (torch.clip(g, None, b), torch.clip(u, -b, b)),
    "full_like": lambda g, u, b=LIMIT: (
        torch.minimum(g, torch.full_like(g, b)),
        torch.maximum(torch.minimum(u, torch.full_like(u, b)), torch.full_like(u, -b)),
    ),
    "full": lambda g, u, b=LIMIT: (
        torch.min(g, torch.full((), b, dtype=g.dtype)),
        torch.max(torch.min(u, u.new_full((1,), b)), u.new_full((1,), -b)),
    ),
    "where": lambda g, u, b=LIMIT: (torch.where(g > b, b, g), u.clamp(-b, b)),
    "where_both": lambda g, u, b=LIMIT: (
        torch.where(b < g, b, g),
        (lambda v: torch.where(v < -b, -b, v))(torch.where(u > b, b, u)),
    ),
    "where_or_equal": lambda g, u, b=LIMIT: (torch.where(g >= b, b, g), u.clamp(-b, b)),
    "none": lambda g, u, b=LIMIT: (g, u),
}

PACKED: dict[str, Callable[[Tensor], Pair]] = {
    "chunk": lambda x: x.chunk(2, dim=-1),
    "split": lambda x: x.split(x.shape[-1] // 2, dim=-1),
    "split_sizes": lambda x: torch.split(x, [x.shape[-1] // 2] * 2, dim=-1),
    "slices": lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
    "narrow": lambda x: _narrowed(x, x.shape[-1] // 2),
    "swapped_halves": lambda x: x.chunk(2, dim=-1)[::-1],
    "unbind": lambda x: x.unflatten(-1, (2, -1)).unbind(-2),
    "interleaved": lambda x: (x[..., ::2], x[..., 1::2]),
    "interleaved_pairs": lambda x: x.unflatten(-1, (-1, 2)).unbind(-1),
}


def _narrowed(x: Tensor, width: int) -> Pair:
    return x.narrow(-1, 0, width), x.narrow(-1, width, width)


def act(
    x: Any,
    *,
    pack: Callable[[Tensor], Pair] = PACKED["chunk"],
    clamp: Callable[[Tensor, Tensor], Pair] = CLAMP["clamp"],
    silu: Callable[[Tensor], Tensor] = F.silu,
    product: Callable[[Tensor, Tensor], Tensor] = lambda s, u: s * u,
    wide: bool = True,
) -> Tensor:
    """``wide``: in fp32 with one rounding at the end (the reference), else in x's dtype (HF)."""
    gate, up = pack(x)
    dtype = gate.dtype
    if wide:
        gate, up = gate.float(), up.float()
    gate, up = clamp(gate, up)
    return product(silu(gate), up).to(dtype)


# ---- edits that break it -----------------------------------------------------------------------

LIMITS: dict[str, Callable[..., Pair]] = {
    "gate not clamped": lambda g, u, b=LIMIT: (g, u.clamp(-b, b)),
    "gate clamped below": lambda g, u, b=LIMIT: (g.clamp(min=-b), u.clamp(-b, b)),
    "up not clamped": lambda g, u, b=LIMIT: (g.clamp(max=b), u),
    "up clamped above only": lambda g, u, b=LIMIT: (g.clamp(max=b), u.clamp(max=b)),
    "asymmetric up": lambda g, u, b=LIMIT: (g.clamp(max=b), u.clamp(-b, 2 * b)),
    "positive up": lambda g, u, b=LIMIT: (g.clamp(max=b), u.clamp(0, b)),
    "another limit for up": lambda g, u, b=LIMIT: (g.clamp(max=b), u.clamp(-1.0, 1.0)),
    "crossed limits": lambda g, u, b=LIMIT: (g.clamp(max=b), u.clamp_max(-b).clamp_min(b)),
    "where the other way": lambda g, u, b=LIMIT: (torch.where(g < b, b, g), u.clamp(-b, b)),
    "where to another limit": lambda g, u, b=LIMIT: (torch.where(g > b, 1.0, g), u.clamp(-b, b)),
    "minimum for maximum": lambda g, u, b=LIMIT: (g.clamp(min=b), u.clamp(-b, b)),
}
SILUS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "quick gelu": lambda g: g * torch.sigmoid(1.702 * g),
    "exp without sign": lambda g: g / (1 + torch.exp(g)),
    "two for one": lambda g: g / (2 + torch.exp(-g)),
    "squared": lambda g: g * g / (1 + torch.exp(-g)),
    "relu": F.relu,
}
