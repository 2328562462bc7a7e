"""What the launch of a Triton kernel reads and writes, found out once for launches that are alike.

torch compiles a kernel to Triton's IR for the answer, which takes some 60 ms, and asks wherever it
makes a launch functional and again, more than once a launch, in Inductor.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.ir import TensorBox

# What torch 2.12 and later call it, and 2.11.
NAMES = ("identify_accessed_tensors", "identify_mutated_tensors")
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Expr)
_answers: ContextVar[dict[object, Any] | None] = ContextVar("answers", default=None)


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Inside, and inside of that again, torch finds each answer once."""
    _install()
    token = _answers.set({}) if _answers.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _answers.reset(token)


@functools.cache
def _install() -> None:
    for name in NAMES:
        if hasattr(triton_kernel_wrap, name):
            setattr(triton_kernel_wrap, name, _remembering(getattr(triton_kernel_wrap, name)))


def _remembering(ask: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ask)
    def asked(kernel: Any, kwargs: dict[str, Any], descriptors: Any) -> Any:
        answers = _answers.get()
        if answers is None or descriptors:
            return ask(kernel, kwargs, descriptors)
        key = _function(kernel), frozenset((n, _described(v)) for n, v in kwargs.items())
        if key not in answers:
            answers[key] = ask(kernel, kwargs, descriptors)
        return copy.copy(answers[key])

    return asked


def _function(kernel: Any) -> object:
    """The kernel itself: each launch has it wrapped in warps and stages of its own, which are none
    of the IR's."""
    configs = getattr(kernel, "configs", ())
    return (kernel.fn, repr(configs[0].kwargs)) if configs else kernel


def _described(value: Any) -> object:
    """All that the IR depends on: of a tensor the dtype, of a symbol nothing; the value of what
    else there is, which may be a list."""
    if isinstance(value, Tensor | TensorBox):
        return "tensor", value.dtype
    if isinstance(value, SYMBOLS):
        return "symbol"
    return type(value), repr(value)
