"""Edits that break norm → rope → cache write in more than one of its pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from ._case import EPS
from ._layouts import BATCH, NORM, ROPE, TURN
from ._norms import PLAIN


def shifted(q: Tensor, kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: Tensor):
    """kv is turned by the position after q's."""
    q = TURN(PLAIN["hf_unweighted"](q, w), cos.unsqueeze(2), sin.unsqueeze(2))
    cos, sin = cos.roll(-1, 1), sin.roll(-1, 1)
    cache[torch.arange(BATCH)[:, None], at % cache.shape[1]] = TURN(NORM(kv, w), cos, sin)
    return q


def before_rope(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor):
    y = NORM(x, w)
    cache[slots] = y
    return TURN(y, cos, sin)


def two_names(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor):
    """Two views of one cache that overlap, each written."""
    y = TURN(NORM(x, w), cos, sin)
    low, high = cache[:8], cache[3:]
    low[slots % 8] = y
    high[slots % 8] = y * 2
    return low.float().sum()


def alpha(x: Tensor, cos: Tensor, sin: Tensor, sub: float, add: float) -> Tensor:
    """A factor hidden in an argument of add and sub."""
    nope, r = x[..., :-ROPE], x[..., -ROPE:].float()
    even, odd = r[..., ::2], r[..., 1::2]
    a = torch.sub(even * cos, odd * sin, alpha=sub)
    b = torch.add(odd * cos, even * sin, alpha=add)
    return torch.cat((nope, torch.stack((a, b), -1).flatten(-2).to(x.dtype)), -1)


def alpha_eps(x: Tensor, w: Tensor) -> Tensor:
    mean = x.float().pow(2).mean(-1, keepdim=True)
    return w * (x.float() * torch.rsqrt(torch.add(mean, EPS, alpha=3))).to(x.dtype)


def rounded_eps(x: Tensor, w: Tensor) -> Tensor:
    """An eps that is not the number written: it was rounded to bf16 first."""
    eps = torch.full((1,), EPS, dtype=x.dtype)
    mean = x.float().pow(2).mean(-1, keepdim=True)
    return w * (x.float() * torch.rsqrt(mean + eps)).to(x.dtype)


def from_itself(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor) -> None:
    """Rows of the cache, turned, go to other rows of it that overlap: one launch would race."""
    cache[3:8] = TURN(NORM(cache[1:6], w), cos, sin)


def old_between(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor):
    """The rows are used before the old cache is read: no place for a launch that also writes."""
    y = TURN(NORM(x, w), cos, sin)
    used = y.float().sum(-1)
    old = cache.float().sum(-1)
    cache[slots] = y
    return used, old
