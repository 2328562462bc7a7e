"""What a spelling is: a plain function or module, its inputs, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 0.0123  # large, so that a misplaced eps is seen; no bf16 number, so that a rounded one is


@dataclass(frozen=True)
class Case:
    """One way to write a fusion.

    ``parts`` are words that the reasons of the taken sites must hold together, ``absent`` words
    that none may hold. ``exact`` asks for equal bits, which every rule but the ``ulp`` ones and
    every reduction in the same order gives; ``decomposed``, of what Inductor's decompositions make
    of it, where eager's own kernel has other bits on another CPU. A mutant names in ``like`` the
    spelling that it is one edit away from: on equal inputs their results must differ, or the edit
    is none. ``why`` is the reason of a known miss, and what the report of a mutant must say where
    it declines.
    """

    build: Callable[[], Callable[..., Any]]
    inputs: Callable[[], tuple[Any, ...]]
    counts: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    exact: bool = True
    decomposed: bool = False
    dynamic: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    like: Case | None = None
    why: str = ""


def plain(fn: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """A factory of a function that has no state."""
    return lambda: fn


class Draw:
    """Random tensors that depend on nothing but their order."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = BF16, scale: float = 2.0) -> Tensor:
        x = torch.randn(*shape, generator=self.generator).mul_(scale)
        if len(shape) > 1 and shape[-2] > 1:
            x[..., 0, :] *= 1e-3  # a row where eps and floors decide
        return x.to(dtype)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def angles(self, *shape: int) -> tuple[Tensor, Tensor]:
        """cos and sin of angles that differ everywhere."""
        a = torch.rand(*shape, generator=self.generator) * 6.28
        return a.cos(), a.sin()
