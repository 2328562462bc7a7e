"""Where a kernel stores, said where it is defined.

torch must know what a launch writes. It reads that out of the kernel's IR, which takes some 60 ms
to make, for each kernel and each set of constants, while a user waits for the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Kernel = TypeVar("Kernel")


def stores(*always: str, **where: str) -> Callable[[Kernel], Kernel]:
    """The kernel stores to these arguments, and to those by name where constants of its launch are
    set, or not: ``@stores("out_ptr", scale_ptr="GROUP and not FAKE")``."""
    conditions = {n: () for n in always} | {n: tuple(c.split(" and ")) for n, c in where.items()}

    def declare(kernel: Kernel) -> Kernel:
        kernel.stores = conditions  # type: ignore[attr-defined]
        return kernel

    return declare


def written(kernel: Any, arguments: Mapping[str, Any]) -> list[str] | None:
    """The arguments that a launch with these constants among its arguments stores to, in the
    kernel's order; None where the kernel does not say. torch wraps it in each launch's warps."""
    kernel = kernel.fn if hasattr(kernel, "configs") else kernel
    conditions = getattr(kernel, "stores", None)
    if conditions is None:
        return None
    names = [n for n, terms in conditions.items() if all(_holds(t, arguments) for t in terms)]
    return sorted(names, key=kernel.arg_names.index)


def _holds(term: str, arguments: Mapping[str, Any]) -> bool:
    name = term.removeprefix("not ")
    return bool(arguments[name]) == (name == term)
