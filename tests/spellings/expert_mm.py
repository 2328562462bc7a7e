"""Rows sorted by expert, each times the weight of its expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import BF16, Case, Draw, plain

NAME = "expert_mm"
ROWS, K, N, EXPERTS = 9, 32, 48, 5
ENDS = (2, 2, 5, 6, ROWS)  # of experts' rows; the second has none


def inputs() -> tuple[Tensor, ...]:
    """x ``[9,32]``, weights ``[5,48,32]``, ends."""
    draw = Draw()
    x, w = draw(ROWS, K), draw(EXPERTS, N, K, scale=K**-0.5)
    return x, w, torch.tensor(ENDS, dtype=torch.int32)


def _case(fn: Callable[..., Any], **more: Any) -> Case:
    # Sums are in another order than torch's on a GPU.
    how = {"counts": {NAME: 1}, "parts": ("grouped product",), "exact": False}
    return Case(plain(fn), inputs, **{**how, **more})


def product(x: Tensor, w: Tensor, ends: Tensor, **more: Any) -> Tensor:
    return F.grouped_mm(x, w.mT, offs=ends, **more)


def _of(rows: int, **more: Any) -> Case:
    """The same weights, the last expert with most of the rows."""

    def many() -> tuple[Tensor, ...]:
        _, w, ends = inputs()
        ends[-1] = rows
        return Draw(1)(rows, K), w, ends

    return dataclasses.replace(_case(product), inputs=many, **more)


def _private(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """As transformers calls it."""
    return torch._grouped_mm(x, w.transpose(-2, -1), offs=ends)


def _searched(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """This project's plain model: the ends are looked for among the sorted experts of the rows."""
    every = torch.arange(EXPERTS)
    ids = torch.searchsorted(ends, torch.arange(ROWS), right=True)
    return product(x, w, torch.searchsorted(ids, every, right=True, out_int32=True))


def _counted(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """transformers': how many rows each expert has, one after the other."""
    counts = torch.cat((ends[:1], ends[1:] - ends[:-1]))
    return product(x, w, counts.cumsum(0, dtype=torch.int32))


def _two(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    gate, up = product(x, w, ends).chunk(2, dim=-1)
    y = torch.cat((F.silu(gate) * up, gate[:, :8]), dim=-1)  # [9, 32]
    return product(y, w, ends)


def halves(size: int) -> Tensor:
    return torch.tensor([size // 2, size], dtype=torch.int32)


SPELLINGS: dict[str, Case] = {
    "grouped_mm": _case(product),
    "torch's private name": _case(_private),
    "the result's dtype is said": _case(lambda *a: product(*a, out_dtype=BF16)),
    "weights along their columns": _case(
        lambda x, w, e: F.grouped_mm(x, w.mT.contiguous(), offs=e)
    ),
    "rows of a wider tensor": _case(
        lambda x, w, e: product(torch.cat((x, x), dim=-1)[:, K:], w, e)
    ),
    "chosen rows": _case(lambda x, w, e: product(x[torch.arange(ROWS) // 2], w, e)),
    "ends by search": _case(_searched),
    "ends by counting": _case(_counted),
    "as many as are taken": _of(EXPERTS * 128),
    "two, one behind the other": _case(_two, counts={NAME: 2, "clamp_swiglu_quant": 1}),
}


def _mutant(fn: Callable[..., Any], **more: Any) -> Case:
    like = SPELLINGS["grouped_mm"]
    how = {"counts": {}, "parts": (), "exact": True, "like": like}
    return _case(fn, **{**how, **more})


MUTANTS: dict[str, Case] = {
    "a batch of products": _mutant(
        lambda x, w, e: F.grouped_mm(x.expand(EXPERTS, -1, -1), w.mT)
    ),
    "groups of columns": _mutant(
        lambda x, w, e: F.grouped_mm(x.expand(2, -1, -1), w[0].mT, offs=halves(N))
    ),
    "groups of what is summed": _mutant(
        lambda x, w, e: F.grouped_mm(x, w[0].mT, offs=halves(K))
    ),
}
KNOWN_MISSES: dict[str, Case] = {
    "how many rows is not known": _case(product, dynamic={0: (0,)}, why="is a symbol"),
    "many rows": _of(EXPERTS * 128 + 1, why="more than 128 rows"),
}
