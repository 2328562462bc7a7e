"""Integers of which a graph shows how large they may be: indices of a top-k, a sort, an argmax."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dsv4fuse.readers import is_tensor
from dsv4fuse.scene import Scene, once
from dsv4fuse.views import VIEWS, argument

aten, prims = torch.ops.aten, torch.ops.prims
SORTS = (aten.sort.default, aten.sort.stable)
CASTS = (prims.convert_element_type.default, aten._to_copy.default)
# Each value of theirs is one of their first argument's.
CHOSEN = (VIEWS - {operator.getitem, aten.as_strided.default}) | {
    aten.clone.default, aten.index.Tensor, aten.gather.default, prims.rev.default,
}  # fmt: skip


@once
def counts(scene: Scene) -> dict[fx.Node, int]:
    """Of nodes that hold such integers, how many there are: 0 to one less are the values."""
    known: dict[fx.Node, int] = {}
    for node in scene.graph.nodes:
        if (count := _count(node, known)) is not None:
            known[node] = count
    return known


def _count(node: fx.Node, known: dict[fx.Node, int]) -> int | None:
    """One more than the largest value that an integer tensor may hold, if none is negative."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(node):
        return None
    if node.target in (aten.argmax.default, aten.argmin.default):
        return _size(source, argument(node, 1, "dim", None))
    if node.target is operator.getitem and node.args[1] == 1:
        if source.target is aten.topk.default:
            return _size(source.args[0], argument(source, 2, "dim", -1))
        if source.target in SORTS:
            return _size(source.args[0], argument(source, 1, "dim", -1))
    if node.target is operator.getitem and source.target in (aten.topk.default, *SORTS):
        return known.get(source.args[0])
    if node.target is operator.getitem or node.target in CHOSEN:
        return known.get(source)
    if node.target in CASTS and source in known:
        dtype = node.meta["val"].dtype
        held = dtype != torch.bool and not dtype.is_floating_point and not dtype.is_complex
        return known[source] if held and known[source] <= torch.iinfo(dtype).max else None
    return None


def _size(node: Any, dim: int | None) -> int | None:
    """How many there are along an axis, or (None) in all; None if that is a symbol."""
    value = node.meta["val"]
    size = value.numel() if dim is None or not value.dim() else value.shape[dim]
    return size if isinstance(size, int) else None
