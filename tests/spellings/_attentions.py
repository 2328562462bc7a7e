"""Attention with a sink as people write it: weights of logits, and whole ones in each layout.

``WEIGHTS``: logits ``[.., T]`` and sinks that broadcast to ``[.., 1]`` → weights ``[.., T]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 0.2236  # no power of two, so that scaling rounds


def cat_softmax(s: Tensor, sink: Tensor) -> Tensor:
    """One more logit, dropped afterwards."""
    column = sink.expand(*s.shape[:-1], 1)
    return torch.cat((s, column), dim=-1).softmax(dim=-1)[..., :-1]


def hf(s: Tensor, sink: Tensor) -> Tensor:
    """transformers: the row's maximum is taken off first, in the dtype of the scores."""
    c = torch.cat([s, sink.expand(*s.shape[:-1], -1)], dim=-1)
    c = c - c.max(dim=-1, keepdim=True).values
    return F.softmax(c, dim=-1, dtype=c.dtype)[..., :-1]


def upcast(s: Tensor, sink: Tensor) -> Tensor:
    c = torch.cat((s, sink.expand(*s.shape[:-1], 1)), dim=-1)
    return F.softmax(c, dim=-1, dtype=torch.float32).narrow(-1, 0, s.shape[-1])


def by_hand(s: Tensor, sink: Tensor) -> Tensor:
    """DeepSeek's: the sink in the denominator only."""
    top = s.amax(dim=-1, keepdim=True)
    e = torch.exp(s - top)
    return e / (e.sum(dim=-1, keepdim=True) + torch.exp(sink - top))


def by_greatest(s: Tensor, sink: Tensor) -> Tensor:
    """The same, shifted by the sink where it is greater: nothing overflows."""
    top = torch.maximum(s.max(dim=-1, keepdim=True).values, sink)
    e = (s - top).exp()
    return e / ((sink - top).exp() + e.sum(-1, keepdim=True))


def by_logsumexp(s: Tensor, sink: Tensor) -> Tensor:
    """A softmax without the sink, times the share that the sink leaves."""
    rest = torch.sigmoid(torch.logsumexp(s, dim=-1, keepdim=True) - sink)
    return s.softmax(dim=-1) * rest


WEIGHTS = {
    f.__name__: f for f in (cat_softmax, by_hand, by_greatest, by_logsumexp)
}

# Edits of ``cat_softmax`` and ``by_hand`` that change what they mean.
WEIGHT_MUTANTS = {
    "no sink": lambda s, sink: s.softmax(-1) + 0 * sink,
    "the sink is kept": lambda s, sink: torch.cat(
        (sink.expand(*s.shape[:-1], 1), s), -1
    ).softmax(-1)[..., :-1],
    "the sink counts twice": lambda s, sink: torch.cat(
        (s, sink.expand(*s.shape[:-1], 2)), -1
    ).softmax(-1)[..., :-2],
    "softmax over the queries": lambda s, sink: torch.cat(
        (s, sink.expand(*s.shape[:-1], 1)), -1
    ).softmax(1)[..., :-1],
    "the sink is scaled": lambda s, sink: cat_softmax(s, sink * SCALE) * 1.5,
    "the sink without the shift": lambda s, sink: _unshifted(s, sink),
    "another shift below": lambda s, sink: _other_shift(s, sink),
    "squared": lambda s, sink: cat_softmax(s, sink).square(),
}


def _unshifted(s: Tensor, sink: Tensor) -> Tensor:
    top = s.amax(dim=-1, keepdim=True)
    e = torch.exp(s - top)
    return e / (e.sum(dim=-1, keepdim=True) + torch.exp(sink))


def _other_shift(s: Tensor, sink: Tensor) -> Tensor:
    top = s.amax(dim=-1, keepdim=True)
    e = torch.exp(s - top)
    return e / (torch.exp(s - top - 1).sum(dim=-1, keepdim=True) + torch.exp(sink - top))
