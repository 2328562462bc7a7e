"""Where a kernel stores, said where it is defined.

torch must know what a launch writes. It reads that out of the kernel's IR, which takes some 60 ms
to make, for each kernel and each set of constants, while a user waits for the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Kernel = TypeVar("Kernel")


def stores(*always: str, **where: str) -> Callable[[Kernel], Kernel]:
    """The kernel stores to these arguments, and to those by name where an expression of its
    constants holds: ``@stores("out_ptr", scale_ptr="GROUP and not FAKE")``."""
    conditions = dict.fromkeys(always, "True") | where

    def declare(kernel: Kernel) -> Kernel:
        compiled = {name: compile(text, name, "eval") for name, text in conditions.items()}
        kernel.stores = compiled  # type: ignore[attr-defined]
        return kernel

    return declare


def written(kernel: Any, arguments: Mapping[str, Any]) -> list[str] | None:
    """The arguments that a launch with these constants among its arguments stores to, in the
    kernel's order; None where the kernel does not say."""
    conditions = getattr(kernel, "stores", None)
    if conditions is None:
        return None
    names = [n for n, held in conditions.items() if eval(held, {}, dict(arguments))]
    return sorted(names, key=kernel.arg_names.index)
