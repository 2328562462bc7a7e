"""A top-k whose order nobody sees: not sorted, nor made at all where it takes all there are.

Scope: ``torch.topk`` (sorted, as it is by default) of which only the indices are read, through
pointwise operations and new axes of size one, and end as the places to which a scatter writes one
number, along the axis of the top-k: a mask of the chosen. On a GPU torch finds the k largest
first, the same ones in either case, and then sorts them. Where it takes as many as there are (the
512 entries of a prompt of 2048 tokens, an index_topk of 512), the scores do not matter, nor what
is computed for them alone. Sources: transformers' indexer, this project's plain model in a prefill.
No kernel.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dsv4fuse import exact
from dsv4fuse.fusion import Candidate, Fusion
from dsv4fuse.readers import is_tensor
from dsv4fuse.scene import Scene
from dsv4fuse.views import argument

aten = torch.ops.aten
FILLS = (aten.full.default, aten.full_like.default, aten.scalar_tensor.default)


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    nodes = (n for n in scene.graph.nodes if n.target is aten.topk.default)
    return [c for n in nodes if (c := _candidate(n)) is not None]


def _candidate(topk: fx.Node) -> Candidate | None:
    read = {user.args[1] for user in topk.users if user.target is operator.getitem and user.users}
    if read != {1} or not argument(topk, 4, "sorted", True):
        return None
    if topk.args[0].meta["val"].dim() == 0:  # type: ignore[union-attr]
        return None  # one number has no order
    followed = _followed(topk)
    if followed is None:
        return None
    inside, ends = followed
    front = _only_for(topk) if _takes_all(topk) else None
    every = front is not None
    region = (*(front or (topk,)), *inside, *ends)
    inputs = tuple(dict.fromkeys(a for n in region for a in n.all_input_nodes if a not in region))
    call = _Chosen(topk, every, (*inside, *ends), inputs, ends)
    parts = "all there are, no top-k → scatter" if every else "top-k, unsorted → scatter"
    return Candidate("unsorted_topk", ends[0], inputs, call, ends, detail={"parts": parts})


def _takes_all(topk: fx.Node) -> bool:
    """Are as many asked for as lie along its axis? With a symbol in the shape, which the indices
    that are made instead would want to be given, it counts as no."""
    shape = topk.args[0].meta["val"].shape  # type: ignore[union-attr]
    static = all(isinstance(size, int) for size in (*shape, topk.args[1]))
    return static and topk.args[1] == shape[argument(topk, 2, "dim", -1)]


def _only_for(topk: fx.Node) -> tuple[fx.Node, ...] | None:
    """A top-k and, in front of it, what is computed for it alone; None where random numbers are:
    others are drawn behind them."""
    found = {topk}
    for node in reversed(topk.graph.nodes):
        if node.op == "call_function" and node.users and found.issuperset(node.users):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                return None
            found.add(node)
    return tuple(sorted(found))


def _followed(topk: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]] | None:
    """The nodes between a top-k and the scatters that end all that is made of its indices; None
    where anything else reads it."""
    rank, dim = topk.args[0].meta["val"].dim(), argument(topk, 2, "dim", -1)  # type: ignore
    axes: dict[fx.Node, int] = {}  # along which a node holds what is chosen, in any order
    ends = []
    for node in topk.graph.nodes:
        if node.target is operator.getitem and node.args == (topk, 1):
            axes[node] = dim % rank
        elif own := [a for a in node.all_input_nodes if a in axes]:
            if _ends(node, axes):
                ends.append(node)
            else:
                axis = _axis(node, own, axes)
                if axis is None:
                    return None
                axes[node] = axis
    return (tuple(axes), tuple(ends)) if ends else None


def _ends(node: fx.Node, axes: dict[fx.Node, int]) -> bool:
    """Is it a scatter of one number, to places that are chosen along its own axis?"""
    if node.target is not aten.scatter.value:
        return False
    base, dim, index = node.args[:3]
    return base not in axes and axes.get(index) == dim % node.meta["val"].dim()  # type: ignore


def _axis(node: fx.Node, own: list[fx.Node], axes: dict[fx.Node, int]) -> int | None:
    """The axis of a node that computes the same of each of the chosen."""
    if not is_tensor(node):
        return None
    rank = node.meta["val"].dim()
    if node.target is aten.unsqueeze.default:
        axis = axes[own[0]]
        return axis + (node.args[1] % rank <= axis)  # type: ignore[operator]
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return None
    found = {axes[a] + rank - a.meta["val"].dim() for a in own}
    if len(found) != 1 or any(_is_one(a.meta["val"].shape[axes[a]]) for a in own):
        return None
    (axis,) = found
    others = (a for a in node.all_input_nodes if a not in axes and is_tensor(a))
    return axis if all(_alike(a, axis - rank) for a in others) else None


def _alike(node: fx.Node, axis: int) -> bool:
    """Is a value the same all along an axis, which is counted from the last?"""
    shape = node.meta["val"].shape
    return node.target in FILLS or len(shape) < -axis or _is_one(shape[axis])


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


@dataclass(frozen=True)
class _Chosen:
    """A site's replacement: what is ``behind`` the top-k, of the same that were chosen."""

    topk: fx.Node
    every: bool
    behind: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]

    def __call__(self, *given: Any) -> tuple[Tensor, ...]:
        env: dict[fx.Node, Any] = dict(zip(self.inputs, given, strict=True))
        env[self.topk] = (None, _every(self.topk) if self.every else _unsorted(self.topk, env))
        exact.run(self.behind, env, self.ends)
        return tuple(env[n] for n in self.ends)


def _unsorted(topk: fx.Node, env: dict[fx.Node, Any]) -> Tensor:
    x, k = (env.get(a, a) for a in topk.args[:2])
    dim, largest = argument(topk, 2, "dim", -1), argument(topk, 3, "largest", True)
    return aten.topk.default(x, k, dim, largest, False)[1]


def _every(topk: fx.Node) -> Tensor:
    """All places along a top-k's axis, in order."""
    like = topk.meta["val"][1]
    axis = argument(topk, 2, "dim", -1) % like.dim()
    places = torch.arange(like.shape[axis], device=like.device)
    return places.view([-1 if i == axis else 1 for i in range(like.dim())]).expand(like.shape)


FUSION = Fusion("unsorted_topk", find, (), {}, kernel=False)
