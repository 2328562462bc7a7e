"""Pointwise values in front of a site that nothing else reads.

Inductor computes them inside of the site's own kernels and never writes them. A fused op cannot:
for it they are written, and read again. So what was measured of the site alone does not speak for
it where they are a good part of what it reads, and its time is taken with them.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, fx

from dsv4fuse import compat
from dsv4fuse.fusion import Candidate
from dsv4fuse.readers import is_tensor
from dsv4fuse.views import VIEWS

PART = 1 / 8  # of the bytes of inputs and outputs


def in_front(
    candidate: Candidate, region: list[fx.Node], planned: Collection[fx.Node] = ()
) -> list[fx.Node]:
    """Those values in the graph's order, or nothing where they are too small to matter; what is
    ``planned`` to be computed by other sites is none of them. None are timed with a site whose
    inputs are drawn until its result is determined (``settled``)."""
    inside, found = set(region), set[fx.Node]()
    left = {n for n in candidate.inputs if n not in candidate.caches}
    while left:
        node = max(left)  # the last in the graph: who reads it is known by now
        left.remove(node)
        if _inlined(node) and node not in planned and inside | found >= set(node.users):
            found.add(node)
            left |= set(node.all_input_nodes)
    # A part of what others read parts of stays outside: what is drawn for a site are tensors.
    found = {n for n in found if all(a in found or is_tensor(a) for a in n.all_input_nodes)}
    large = _written(candidate, found) > PART * _whole(candidate)
    return sorted(found) if large and candidate.settled is None else []


def traffic(candidate: Candidate, front: Collection[fx.Node]) -> tuple[float, float]:
    """What the front reads, and what it writes as kernels of its own, as parts of the bytes that
    the site itself reads and writes. Of a leaf it reads no more elements than it computes."""
    leaves = {a for n in front for a in n.all_input_nodes if is_tensor(a)} - set(front)
    most = max((_size(n) for n in front if _pointwise(n)), default=0)
    read = sum(min(_size(n), most) * n.meta["val"].element_size() for n in leaves)
    whole = _whole(candidate)
    return read / whole, _written(candidate, front) / whole


def _written(candidate: Candidate, front: Collection[fx.Node]) -> int:
    return sum(_bytes(n) for n in candidate.inputs if _computed(n, front))


def _whole(candidate: Candidate) -> int:
    return sum(map(_bytes, (*candidate.inputs, *candidate.outputs)))


def _inlined(node: fx.Node) -> bool:
    return node.op == "call_function" and (node.target in VIEWS or _pointwise(node))


def _pointwise(node: fx.Node) -> bool:
    """A copy is none: the op may read what is copied, in whatever order it lies."""
    moved = node.target is torch.ops.aten.clone.default
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and is_tensor(node) and not moved


def _computed(node: fx.Node, found: Collection[fx.Node]) -> bool:
    """Is it, or does it show, a value that is more than shown?"""
    while node in found and not _pointwise(node):
        node = node.all_input_nodes[0]
    return node in found


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return 0
    return _size(node) * value.element_size()


def _size(node: fx.Node) -> int:
    return math.prod(map(compat.hint, node.meta["val"].shape))
