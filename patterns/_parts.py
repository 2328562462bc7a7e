"""Partial results of a split product in front of a norm: a sum that its kernel makes on loading."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dsv4fuse.layout import Order, arrange
from dsv4fuse.match import Bound
from dsv4fuse.views import argument

aten, prims = torch.ops.aten, torch.ops.prims
MOST = 16
CASTS = (prims.convert_element_type.default, aten._to_copy.default)
LAST = -1  # names the axis of the parts


@dataclass(frozen=True)
class Parts:
    """``parts.sum(0)`` in fp32, rounded once, seen through ``views`` (the first one first)."""

    node: fx.Node  # [S, ..]
    views: tuple[fx.Node, ...]
    dtype: torch.dtype  # of the sum once rounded

    def arranged(self, parts: Tensor, bound: Bound, order: Order) -> Tensor:
        """``[S, *order, lanes]``; ``bound`` is that of the sum's last view."""
        for view in self.views:
            parts = _behind(view, parts)
        rows = Bound(bound.node, (LAST, *bound.rows), bound.part, bound.laned)
        return arrange(parts, rows, (LAST, *order))


def parts_of(node: fx.Node) -> Parts | None:
    """The parts whose sum a node shows through views and at most one rounding of it."""
    dtype = node.meta["val"].dtype
    views: list[fx.Node] = []
    rounded = False
    while True:
        if _plain(node):
            views.append(node)
        elif node.target in CASTS and not rounded:
            rounded = True
        else:
            break
        node = node.args[0].args[0] if _piece(node) else node.args[0]
    if node.target is not aten.sum.dim_IntList or argument(node, 2, "keepdim", False):
        return None
    parts, axes = node.args[:2]
    wide = node.meta["val"].dtype
    fits = wide == torch.float32 if rounded else wide == dtype
    if list(axes) not in ([0], [-parts.meta["val"].dim()]) or not fits:
        return None
    if parts.target in CASTS and parts.meta["val"].dtype == torch.float32:
        parts = parts.args[0]  # each part is widened, which is exact
    value = parts.meta["val"]
    small = isinstance(value.shape[0], int) and value.shape[0] <= MOST
    if not small or value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return Parts(parts, tuple(reversed(views)), dtype)


def _plain(node: fx.Node) -> bool:
    """A view that the parts can be given as well, whatever its symbolic sizes are."""
    numbers = [*node.args[1:], *(node.args[0].args[1] if _piece(node) else ())]
    if node.target in (aten.view.default, aten.reshape.default):
        return _sizes(node).count(-1) <= 1
    fixed = all(not isinstance(n, fx.Node) for n in numbers)
    return fixed and (node.target in VIEWS or _piece(node))


def _piece(node: fx.Node) -> bool:
    """One output of a split."""
    return node.target is operator.getitem and node.args[0].target is aten.split_with_sizes.default


def _behind(view: fx.Node, t: Tensor) -> Tensor:
    """A view of the sum, of the parts: the same with one axis more in front."""
    if not _piece(view):
        return VIEWS[view.target](view, t, len(view.args[0].meta["val"].shape))
    split, k = view.args
    axis = argument(split, 2, "dim", 0) % view.meta["val"].dim()
    return t.narrow(axis + 1, sum(split.args[1][:k]), split.args[1][k])


def _sizes(view: fx.Node) -> list[int | tuple[int]]:
    """A reshape's sizes: numbers, the base's axes that a symbol names in 1-tuples, or −1."""
    base = [str(n) for n in view.args[0].meta["val"].shape]
    named = ((n, base.index(str(n)) if str(n) in base else None) for n in view.meta["val"].shape)
    return [n if isinstance(n, int) else -1 if axis is None else (axis,) for n, axis in named]


def _shaped(view: fx.Node, t: Tensor, rank: int) -> Tensor:
    sizes = (t.shape[n[0] + 1] if isinstance(n, tuple) else n for n in _sizes(view))
    return t.view(t.shape[0], *sizes)


def _sliced(view: fx.Node, t: Tensor, rank: int) -> Tensor:
    start, end, step = (argument(view, i, n, d) for i, n, d in
                        ((2, "start", 0), (3, "end", None), (4, "step", 1)))  # fmt: skip
    axis = argument(view, 1, "dim", 0) % rank
    return torch.ops.aten.slice.Tensor(t, axis + 1, start, end, step)


VIEWS = {
    aten.view.default: _shaped,
    aten.reshape.default: _shaped,
    aten.unsqueeze.default: lambda v, t, rank: t.unsqueeze(v.args[1] % (rank + 1) + 1),
    aten.transpose.int: lambda v, t, rank: t.transpose(*(a % rank + 1 for a in v.args[1:])),
    aten.permute.default: lambda v, t, rank: t.permute(0, *(a % rank + 1 for a in v.args[1])),
    aten.slice.Tensor: _sliced,
}
