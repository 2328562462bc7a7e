"""Indices of a known range, compared. Sorts are narrower on a GPU alone.

``tests/test_known_range.py`` asks for those, on a pretended GPU or a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._case import FP32, Case, Draw, plain

NAME = "known_range"
ROWS, N, K = 5, 13, 6


def _case(fn: Callable[..., Any], **more: Any) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        return draw(ROWS, N, dtype=FP32), draw(ROWS, K, dtype=FP32)

    return Case(plain(fn), inputs, **{"counts": {NAME: 1}, "parts": ("always",), **more})


def chosen(s: Tensor, k: int = K) -> Tensor:
    return s.topk(k).indices


def _experts(s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """transformers': what belongs to an expert that is elsewhere is left out."""
    ids, order = torch.sort(chosen(s).reshape(-1))
    elsewhere = (ids >= N).unsqueeze(-1)
    return x[order // K].masked_fill(elsewhere, 0.0), ids.clamp(max=N - 1)


def _none(at: Tensor, x: Tensor, bound: float = N) -> Tensor:
    return torch.where(at >= bound, 0.0, x)


SPELLINGS: dict[str, Case] = {
    "at least all": _case(lambda s, x: _none(chosen(s), x)),
    "more than the last": _case(lambda s, x: x * (chosen(s) > N - 1)),
    "less than all": _case(lambda s, x: x.where(chosen(s) < N, 0.0), parts=("always True",)),
    "at most the last": _case(lambda s, x: x.where(chosen(s) <= N - 1, 0.0)),
    "not negative": _case(lambda s, x: x.where(chosen(s) >= 0, 0.0), parts=("always True",)),
    "the least": _case(lambda s, x: _none(s.topk(K, largest=False).indices, x)),
    "along the first axis": _case(lambda s, x: _none(s.topk(2, dim=0).indices, s[:2], ROWS)),
    "sorted": _case(_experts),
    "argsort": _case(lambda s, x: _none(s.argsort(-1)[:, :K], x)),
    "argmax": _case(lambda s, x: _none(s.argmax(-1, keepdim=True), x)),
    "argmin of all": _case(lambda s, x: _none(s.argmin(), x, ROWS * N)),
    "cast": _case(lambda s, x: _none(chosen(s).int(), x)),
    "chosen again": _case(lambda s, x: _none(chosen(s).gather(1, s.argsort(-1)[:, :1] % K), x)),
    "turned round": _case(lambda s, x: _none(chosen(s).flip(-1), x)),
    "selected": _case(lambda s, x: _none(chosen(s).index_select(1, torch.arange(3)), x[:, :3])),
    "indexed": _case(lambda s, x: _none(chosen(s)[torch.arange(ROWS - 1, -1, -1)], x)),
}


def _mutant(fn: Callable[..., Any], like: str = "at least all", **more: Any) -> Case:
    return _case(fn, **{"counts": {}, "parts": (), "like": SPELLINGS[like], **more})


MUTANTS: dict[str, Case] = {
    "all but the last": _mutant(lambda s, x: _none(chosen(s), x, N - 1)),
    "more than the last but one": _mutant(
        lambda s, x: x * (chosen(s) > N - 2), "more than the last"
    ),
    "less than the last": _mutant(lambda s, x: x.where(chosen(s) < N - 1, 0.0), "less than all"),
    "positive": _mutant(lambda s, x: x.where(chosen(s) > 0, 0.0), "not negative"),
    "one is added": _mutant(lambda s, x: _none(chosen(s) + 1, x)),
    "values": _mutant(lambda s, x: _none(s.topk(K).values * 9, x)),
    "of another axis": _mutant(
        lambda s, x: _none(s.topk(2, dim=0).indices, s[:2], ROWS - 1), "along the first axis"
    ),
    "a cast that wraps": _mutant(
        lambda s, x: x.where((s.repeat(1, 20).topk(K).indices.to(torch.int8)) >= 0, 0.0),
        "not negative",
    ),
    "argmax of all, a row's bound": _mutant(
        lambda s, x: _none(s.abs().argmax(), x), "argmin of all"
    ),
    "some that are none": _mutant(
        lambda s, x: x.where(torch.where(chosen(s) < 4, -1, chosen(s)) >= 0, 0.0), "not negative"
    ),
    "from outside": _mutant(lambda s, x: x.where(s[:, :K].long() >= 0, 0.0), "not negative"),
}
KNOWN_MISSES: dict[str, Case] = {
    "at least half a place more": _case(
        lambda s, x: _none(chosen(s), x, N - 0.5), why="a float: integers are compared as fp32"
    ),
}
