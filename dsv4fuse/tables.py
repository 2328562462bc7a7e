"""Numbers looked up in a table that is a short constant of the traced program, and NaN."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import fx

from dsv4fuse import compat
from dsv4fuse.lower import Lowering, Opaque, means
from dsv4fuse.maps import Map
from dsv4fuse.terms import Term

aten, prims = torch.ops.aten, torch.ops.prims
LONGEST = 16
KEPT = (
    aten.lift_fresh_copy.default, aten.clone.default, aten.alias.default, aten._to_copy.default,
    prims.convert_element_type.default, prims.device_put.default,
)  # fmt: skip


def _numbers(node: Any) -> list[float]:
    """The entries of a table, as its dtype holds them."""
    source, dtype = node, node.meta["val"].dtype
    while source.op == "call_function" and source.target in KEPT:
        source = source.args[0]
    held = compat.constant(source) if source.op == "get_attr" else None
    if held is None or held.dim() != 1 or not 0 < len(held) <= LONGEST or dtype.is_complex:
        raise Opaque
    with compat.outside_compilation():
        return [float(x) for x in held.to(dtype).tolist()]


def _rank(low: Lowering, node: fx.Node, m: Map, x: Any, bounds: Any, right: bool) -> Term:
    """How many bounds are below x, or with ``right`` not above it; NaN is above all."""
    numbers, dtype = _numbers(bounds), node.meta["val"].dtype
    if any(not a <= b for a, b in itertools.pairwise(numbers)) or math.isnan(numbers[0]):
        raise Opaque
    value, total = low._operand(x, node, m), low.interner.const(0)
    if value.op in ("cat", "lace"):
        return low._distribute(node, m, value)
    for bound in numbers:
        test = low.make("lt" if right else "le", (value, low.interner.const(bound)), torch.bool)
        above = low.make("cast", (low.make("logical_not", (test,), torch.bool),), dtype)
        total = low.make("add", (total, above), dtype)
    return total


@means(aten.isnan.default)
def _isnan(low: Lowering, node: fx.Node, m: Map) -> Term:
    return low._spread(node, m, "ne", (node.args[0], node.args[0]))


@means(aten.bucketize.Tensor)
def _bucketize(low: Lowering, node: fx.Node, m: Map) -> Term:
    x, bounds = node.args[:2]
    return _rank(low, node, m, x, bounds, bool(node.kwargs.get("right", False)))


@means(aten.searchsorted.Tensor)
def _searchsorted(low: Lowering, node: fx.Node, m: Map) -> Term:
    bounds, x = node.args[:2]
    if node.kwargs.get("sorter") is not None:
        raise Opaque
    right = bool(node.kwargs.get("right", False)) or node.kwargs.get("side") == "right"
    return _rank(low, node, m, x, bounds, right)


@means(aten.index.Tensor)
def _entry(low: Lowering, node: fx.Node, m: Map) -> Term:
    """table[i], negative i from its end."""
    table, indices = node.args
    if len(indices) != 1 or indices[0] is None:
        raise Opaque
    dtype = indices[0].meta["val"].dtype
    if table.meta["val"].dim() != 1 or dtype.is_floating_point or dtype == torch.bool:
        raise Opaque
    *numbers, last = _numbers(table)
    i = low._operand(indices[0], node, m)
    if i.op in ("cat", "lace"):
        return low._distribute(node, m, i)
    i = low.make("remainder", (i, low.interner.const(len(numbers) + 1)), dtype)
    found = low.interner.const(last)
    for k in reversed(range(len(numbers))):
        test = low.make("eq", (i, low.interner.const(k)), torch.bool)
        branches = (test, low.interner.const(numbers[k]), found)
        found = low.make("where", branches, node.meta["val"].dtype)
    return found
