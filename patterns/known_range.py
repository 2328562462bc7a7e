"""Integers whose range is known, a top-k's indices: sorted by fewer bits, compared at no cost.

Scope: what the graph shows to be indices along an axis (of a top-k, a sort, an argmax), through
views, casts and selections. On a GPU torch sorts by radix, 64 bits of an int64 in eight passes: a
router's choice among 256 experts needs one. A comparison with a number that all or none of them
reach (experts that are elsewhere, where none is) is that constant, and Inductor leaves out what
hangs on it. Source: transformers' experts, by grouped products.
No kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dsv4fuse import compat
from dsv4fuse.fusion import Candidate, Fusion
from dsv4fuse.scene import Scene
from dsv4fuse.views import argument

from ._known import SORTS, counts

aten = torch.ops.aten
INLINED = 512  # entries that Inductor sorts in a kernel of its own, among other things
COMPARISONS: dict[Any, Callable[[int, int], bool]] = {
    aten.ge.Scalar: operator.ge, aten.gt.Scalar: operator.gt,
    aten.le.Scalar: operator.le, aten.lt.Scalar: operator.lt,
}  # fmt: skip


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    known, found = counts(scene), []
    for node in scene.graph.nodes:
        if node.target in COMPARISONS and node.args[0] in known:
            found.append(_compared(node, known[node.args[0]]))
        elif node.target in SORTS and node.args[0] in known:
            found.append(_sorted(node, known[node.args[0]]))
    return [c for c in found if c is not None]


def _compared(node: fx.Node, count: int) -> Candidate | None:
    """A comparison that has the same answer for all of the values."""
    source, number = node.args
    if not isinstance(number, int):  # with a float integers are compared as fp32
        return None
    least, most = (COMPARISONS[node.target](v, number) for v in (0, count - 1))
    if least != most:
        return None

    def call(x: Tensor) -> tuple[Tensor]:
        return (torch.full_like(x, most, dtype=torch.bool),)

    return _candidate((node,), source, count, call, f"compared, always {most}")


def _sorted(node: fx.Node, count: int) -> Candidate | None:
    """A sort by as many bits as the values have."""
    source, dtype = node.args[0], node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    fits = (d for d in (torch.uint8, torch.int16, torch.int32) if count - 1 <= torch.iinfo(d).max)
    narrow = next(fits, dtype)
    outputs = tuple(u for u in node.users if u.target is operator.getitem and u.users)
    value = source.meta["val"]  # type: ignore[union-attr]
    long = value.dim() and compat.hint(value.shape[argument(node, 1, "dim", -1)]) > INLINED
    if not outputs or not long or not value.is_cuda or narrow.itemsize >= dtype.itemsize:
        return None

    def call(x: Tensor) -> tuple[Tensor, ...]:
        values, places = node.target(x.to(narrow), *node.args[1:], **node.kwargs)  # type: ignore
        return tuple(places if n.args[1] else values.to(dtype) for n in outputs)

    return _candidate(outputs, source, count, call, f"sorted by {8 * narrow.itemsize} bits")


def _candidate(
    outputs: tuple[fx.Node, ...], source: Any, count: int, call: Callable[..., Any], parts: str
) -> Candidate:
    places = {source: (count, None)}
    return Candidate("known_range", outputs[0], (source,), call, outputs, places=places,
                     detail={"parts": parts})  # fmt: skip


FUSION = Fusion("known_range", find, (), {}, kernel=False)
