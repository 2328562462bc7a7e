"""Inductor's decompositions, with an outer product as pointwise in every version of torch.

torch 2.12 multiplies ``[B, M, 1] @ [B, 1, N]`` elementwise; 2.11 hands it to cuBLAS, a launch of
its own and another one to copy its operand (the angles of a rope: positions times frequencies).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.symbolic_shapes import statically_known_true

bmm = torch.ops.aten.bmm.default


def table() -> dict[Any, Callable[..., Any]]:
    """By operation, as Inductor and ``make_fx`` take them."""
    theirs = select_decomp_table()
    return theirs if outer_products_are_pointwise() else theirs | {bmm: _bmm}


def other() -> dict[Any, Callable[..., Any]] | None:
    """The table where it is not Inductor's own, which it is not given: then torch 2.13 has no cache
    from one process to the next."""
    return None if outer_products_are_pointwise() else table()


def spelled(
    func: Any, args: Any, kwargs: Any, table: Mapping[Any, Callable[..., Any]]
) -> Any:
    """The operation by the table, or else as torch spells it out; NotImplemented where neither
    does. What it is made of is called: a mode that wants to see that is entered before."""
    for spell in (table.get(func), func.decompose):
        found = spell(*args, **kwargs) if spell is not None else NotImplemented
        if found is not NotImplemented:
            return found
    return NotImplemented


@functools.cache
def outer_products_are_pointwise() -> bool:
    """By this torch's own decompositions."""
    a, b = torch.empty(2, 3, 1, device="meta"), torch.empty(2, 1, 4, device="meta")
    return isinstance(select_decomp_table()[bmm](a, b), Tensor)


def _bmm(a: Tensor, b: Tensor, *more: Any, **others: Any) -> Any:
    if statically_known_true(a.shape[2] == 1):
        return (a * b).contiguous()
    return select_decomp_table()[bmm](a, b, *more, **others)
