"""Whole steps of a layer: q and kv together, several layers, a module with its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _norms, _ropes
from ._case import BF16, FP32, Draw
from ._layouts import BATCH, DIM, HEADS, NORM, ROPE, SEQ, TURN

B, S, H = BATCH, SEQ, HEADS


def tables(draw: Draw, *lead: int, dtype: torch.dtype | None = FP32) -> tuple[Tensor, ...]:
    """cos and sin, or for dtype None the complex frequencies."""
    cos, sin = draw.angles(*lead, ROPE // 2)
    return (torch.complex(cos, sin),) if dtype is None else (cos.to(dtype), sin.to(dtype))


def both(q: Tensor, kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: Tensor):
    """The decode or prefill step of a layer: q and kv turned by the same tables."""
    q = _ropes.REAL["hf"](_norms.PLAIN["hf_unweighted"](q, w), cos.unsqueeze(2), sin.unsqueeze(2))
    kv = _ropes.REAL["hf"](NORM(kv, w), cos, sin)
    cache[torch.arange(BATCH)[:, None], at % cache.shape[1]] = kv
    return q


def both_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    q, kv, w = draw(B, S, H, DIM), draw(B, S, DIM), draw(DIM)
    at = torch.arange(S) + torch.tensor([[3], [9]])
    return q, kv, w, *tables(draw, B, S), draw(B, 8, DIM), at


def several(q: Tensor, kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: Tensor):
    """Two layers with one weight and one cache each, unrelated work in between."""
    out = []
    for layer in (0, 1):
        q = both(q, kv, w, cos, sin, cache[layer], at)
        kv = kv * 0.5 + q.mean(2)
        out += [q, q.float().sum(-1)]
    return out


def busy(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Every intermediate has a second reader."""
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _norms.EPS)
    normed = wide * rstd
    y = w * normed.to(x.dtype)
    z = TURN(y, cos, sin)
    return z, rstd, normed.sum(-1), y, z.abs().amax()


class Layer(nn.Module):
    """Weights and the cache belong to the module."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.norm = norm(DIM, eps=_norms.EPS, dtype=BF16)
        self.norm.weight.data.copy_(Draw(4)(DIM))
        self.register_buffer("cache", Draw(5)(B, 8, DIM))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        y = TURN(self.norm(x), cos, sin)
        self.cache[torch.arange(B)[:, None], at % 8] = y
        return self.cache[:, :2]


def layer_inputs() -> tuple[Tensor, ...]:
    _, kv, _, cos, sin, _, at = both_inputs()
    return kv, cos, sin, at
