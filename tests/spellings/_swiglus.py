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

CLAMP: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "clamp": lambda g, u: (g.clamp(max=LIMIT), u.clamp(-LIMIT, LIMIT)),
    "keywords": lambda g, u: (torch.clamp(g, max=LIMIT), torch.clamp(u, min=-LIMIT, max=LIMIT)),
    "in_place": lambda g, u: (g.clone().clamp_(max=LIMIT), u.clone().clamp_(-LIMIT, LIMIT)),
    "clamp_max": lambda g, u: (g.clamp_max(LIMIT), u.clamp_max(LIMIT).clamp_min(-LIMIT)),
    "min_first": lambda g, u: (g.clamp_max(LIMIT), u.clamp_min(-LIMIT).clamp_max(LIMIT)),
    "hardtanh": lambda g, u: (g.clamp(max=LIMIT), F.hardtanh(u, -LIMIT, LIMIT)),
    "clip": lambda g, u: (torch.clip(g, None, LIMIT), torch.clip(u, -LIMIT, LIMIT)),
    "full_like": lambda g, u: (
        torch.minimum(g, torch.full_like(g, LIMIT)),
        torch.maximum(torch.minimum(u, torch.full_like(u, LIMIT)), torch.full_like(u, -LIMIT)),
    ),
    "full": lambda g, u: (
        torch.min(g, torch.full((), LIMIT, dtype=g.dtype)),
        torch.max(torch.min(u, u.new_full((1,), LIMIT)), u.new_full((1,), -LIMIT)),
    ),
    "where": lambda g, u: (torch.where(g > LIMIT, LIMIT, g), u.clamp(-LIMIT, LIMIT)),
    "where_both": lambda g, u: (
        torch.where(LIMIT < g, LIMIT, g),
        (lambda v: torch.where(v < -LIMIT, -LIMIT, v))(torch.where(u > LIMIT, LIMIT, u)),
    ),
    "where_or_equal": lambda g, u: (torch.where(g >= LIMIT, LIMIT, g), u.clamp(-LIMIT, LIMIT)),
    "none": lambda g, u: (g, u),
}

PACKED: dict[str, Callable[[Tensor], Pair]] = {
    "chunk": lambda x: x.chunk(2, dim=-1),
    "split": lambda x: x.split(x.shape[-1] // 2, dim=-1),
    "split_sizes": lambda x: torch.split(x, [WIDTH, WIDTH], dim=-1),
    "slices": lambda x: (x[..., :WIDTH], x[..., WIDTH:]),
    "narrow": lambda x: (x.narrow(-1, 0, WIDTH), x.narrow(-1, WIDTH, WIDTH)),
    "swapped_halves": lambda x: x.chunk(2, dim=-1)[::-1],
    "unbind": lambda x: x.unflatten(-1, (2, -1)).unbind(-2),
    "interleaved": lambda x: (x[..., ::2], x[..., 1::2]),
    "interleaved_pairs": lambda x: x.unflatten(-1, (-1, 2)).unbind(-1),
}


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

LIMITS: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "gate not clamped": lambda g, u: (g, u.clamp(-LIMIT, LIMIT)),
    "gate clamped below": lambda g, u: (g.clamp(min=-LIMIT), u.clamp(-LIMIT, LIMIT)),
    "up not clamped": lambda g, u: (g.clamp(max=LIMIT), u),
    "up clamped above only": lambda g, u: (g.clamp(max=LIMIT), u.clamp(max=LIMIT)),
    "asymmetric up": lambda g, u: (g.clamp(max=LIMIT), u.clamp(-LIMIT, 2 * LIMIT)),
    "positive up": lambda g, u: (g.clamp(max=LIMIT), u.clamp(0, LIMIT)),
    "another limit for up": lambda g, u: (g.clamp(max=LIMIT), u.clamp(-1.0, 1.0)),
    "crossed limits": lambda g, u: (g.clamp(max=LIMIT), u.clamp_max(-LIMIT).clamp_min(LIMIT)),
    "where the other way": lambda g, u: (torch.where(g < LIMIT, LIMIT, g), u.clamp(-LIMIT, LIMIT)),
    "where to another limit": lambda g, u: (torch.where(g > LIMIT, 1.0, g), u.clamp(-LIMIT, LIMIT)),
    "minimum for maximum": lambda g, u: (g.clamp(min=LIMIT), u.clamp(-LIMIT, LIMIT)),
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
