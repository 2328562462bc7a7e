"""A mask of the largest entries, however it is made of their indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._case import FP32, Case, Draw, plain

NAME = "unsorted_topk"
ROWS, N, K = 5, 13, 6


def inputs() -> tuple[Tensor, ...]:
    """Scores ``[2,5,13]``, some of them equal, and how many of the first entries a row sees."""
    draw = Draw()
    scores = draw(2, ROWS, N, dtype=FP32).round()
    return scores, torch.arange(2, 2 + 2 * ROWS).view(2, ROWS)


def seen(scores: Tensor, limit: Tensor) -> Tensor:
    """transformers' indexer: what a row does not see yet is replaced, and put beyond the end."""
    every = torch.arange(N, device=scores.device)
    scores = scores.masked_fill(every >= limit.unsqueeze(-1), float("-inf"))
    at = scores.topk(K, dim=-1).indices
    at = torch.where(at >= limit.unsqueeze(-1), torch.full_like(at, -1), at)
    bias = scores.new_full((2, 1, ROWS, N + 1), float("-inf"))
    place = torch.where(at >= 0, at, N).unsqueeze(1)
    return bias.scatter(-1, place, 0.0)[..., :N]


def mask(at: Tensor, dim: int = -1) -> Tensor:
    return torch.zeros(2, ROWS, N, dtype=torch.bool, device=at.device).scatter(dim, at, True)


def _two(scores: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    at = scores.topk(K).indices
    return mask(at), scores.scatter(-1, at, float("-inf"))


def _case(fn: Callable[..., Any], **more: Any) -> Case:
    return Case(plain(fn), inputs, **{"counts": {NAME: 1}, "parts": ("unsorted",), **more})


def _all(fn: Callable[..., Any]) -> Case:
    return _case(fn, parts=("no top-k",))


def _all_seen(scores: Tensor, limit: Tensor) -> Tensor:
    at = (scores.exp() + limit.unsqueeze(-1)).topk(N).indices
    return mask(torch.where(at >= limit.unsqueeze(-1), 0, at))


SPELLINGS: dict[str, Case] = {
    "a mask": _case(lambda s, n: mask(s.topk(K).indices)),
    "second of two": _case(lambda s, n: mask(torch.topk(s, K, sorted=True)[1])),
    "the least": _case(lambda s, n: mask(s.topk(K, largest=False).indices)),
    "the first axis": _case(lambda s, n: mask(s.topk(2, dim=1).indices, 1)),
    "in place": _case(lambda s, n: torch.full_like(s, -1.0).scatter_(-1, s.topk(K).indices, 0.0)),
    "cast": _case(lambda s, n: mask(s.topk(K).indices.int().long())),
    "moved": _case(lambda s, n: mask((s.topk(K).indices + n.unsqueeze(-1)).remainder(N))),
    "behind a threshold": _case(seen),
    "two masks": _case(_two),
    "all but one": _case(lambda s, n: mask(s.topk(N - 1).indices)),
    "all": _all(lambda s, n: mask(s.topk(N).indices)),
    "all that are seen": _all(_all_seen),
    "all of the first axis": _all(lambda s, n: mask(s.topk(ROWS, dim=1).indices, 1)),
    "all, of scores that are read": _all(lambda s, n: s.scatter(-1, s.topk(N).indices, 0.0)),
}


def _mutant(fn: Callable[..., Any], like: str = "a mask", **more: Any) -> Case:
    return _case(fn, **{"counts": {}, "parts": (), "like": SPELLINGS[like], **more})


def _values(scores: Tensor, limit: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    values, at = scores.topk(k)
    return mask(at), values


def _returned(scores: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    at = scores.topk(K).indices
    return mask(at), at


def _by_place(scores: Tensor, limit: Tensor) -> Tensor:
    at = scores.topk(K).indices
    return mask(torch.where(torch.arange(K, device=at.device) < 3, at, 0))


MUTANTS: dict[str, Case] = {
    "values are read": _mutant(_values),
    "indices are returned": _mutant(_returned),
    "places are added": _mutant(
        lambda s, n: mask((s.topk(K).indices + torch.arange(K, device=s.device)).remainder(N))
    ),
    "the first three": _mutant(_by_place),
    "the first three, cut": _mutant(lambda s, n: mask(s.topk(K).indices[..., :3])),
    "summed up": _mutant(lambda s, n: mask(s.topk(K).indices.cumsum(-1).remainder(N))),
    "a number for each": _mutant(
        lambda s, n: s.scatter(-1, s.topk(K).indices, torch.arange(K * 1.0).expand(2, ROWS, K))
    ),
    "along another axis": _mutant(
        lambda s, n: mask(s.topk(K).indices.remainder(ROWS), 1)
    ),
    "added up": _mutant(
        lambda s, n: s.scatter_add(-1, s.topk(K).indices, torch.arange(K * 1.0).expand(2, ROWS, K))
    ),
    "values of all are read": _mutant(lambda s, n: _values(s, n, N), "all"),
    "all, cut": _mutant(lambda s, n: mask(s.topk(N).indices[..., :3]), "all"),
    "the sum of neighbours": _mutant(
        lambda s, n: mask((s.topk(K).indices + s.topk(K).indices.flip(-1)).remainder(N))
    ),
}
KNOWN_MISSES: dict[str, Case] = {}
