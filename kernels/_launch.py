"""Launches of kernels, and what takes their place where there is no GPU or nothing is to run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from . import _common as common

Instead = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], object]
_instead: ContextVar[Instead | None] = ContextVar("instead", default=None)


@contextlib.contextmanager
def instead_of_launches(do: Instead) -> Iterator[None]:
    """Inside, a launch is ``do(kernel, grid, args, kwargs)``."""
    token = _instead.set(do)
    try:
        yield
    finally:
        _instead.reset(token)


@dataclass(frozen=True)
class _Replaced:
    kernel: Any
    do: Instead

    def __getitem__(self, grid: Any) -> Callable[..., object]:
        return lambda *args, **kwargs: self.do(self.kernel, grid, args, kwargs)


def wrap_triton(kernel: Any) -> Any:
    """``torch.library.wrap_triton``; the kernel itself where Triton interprets.

    It has torch's name, by which torch finds the kernels of an op in the op's source.
    """
    do = _instead.get()
    if do is not None:
        return _Replaced(kernel, do)
    return kernel if common.INTERPRET.value else torch.library.wrap_triton(kernel)
