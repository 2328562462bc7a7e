"""What a graph makes of expert ids beside their sort: counts, ends, the inverse of an order.

Counts of ids: a histogram, comparisons with a range that are summed up (so is a one-hot), ones
added to zeros at them. Ends: a sum along counts, or a binary search in the sorted ids.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsv4fuse import maps, rules
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex, Term, straight
from dsv4fuse.views import VIEWS, argument

from ._known import CASTS, SORTS, counts

aten = torch.ops.aten
FLOATS = (torch.float32, torch.float64)
HELD = 1 << 24  # numbers that fp32 counts to, one at a time
HISTC = ((1, "bins", 100), (2, "min", 0), (3, "max", 0))
READ_THROUGH = (VIEWS - {operator.getitem}) | {*CASTS, aten.eq.Tensor}


@dataclass(frozen=True)
class Ids:
    """Expert ids ``[S]``, the nodes that hold them, and those that hold them sorted."""

    scene: Scene
    node: fx.Node
    ordered: tuple[fx.Node, ...] = ()

    @property
    def known(self) -> int | None:
        """One more than the largest id, where the graph shows that and that none is negative."""
        return counts(self.scene).get(self.node)

    def readers(self) -> list[fx.Node]:
        """Who reads the ids, sorted or not."""
        return reached(self.scene, (self.node, *self.scene.alike(self.node), *self.ordered))

    def shown(self, node: Any, ordered: bool = False) -> bool | None:
        """Does a node ``[S]`` hold these ids (sorted), as ``holds`` says?"""
        own = () if ordered else (self.node,)
        return shown(self.scene, node, (*own, *self.ordered))


@dataclass(frozen=True)
class Counted:
    """How many ids are e, or (``ends``) not above e, for each e below ``experts``.

    ``negative``: negative ones too; ``narrow``: of the ids as int32; ``inside``: it has no meaning
    where an id is no expert.
    """

    node: fx.Node
    experts: int
    ends: bool = False
    negative: bool = False
    narrow: bool = False
    inside: bool = False


def reached(scene: Scene, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Who reads the nodes, also through views, casts and comparisons, in the graph's order."""
    found, stack = set[fx.Node](), list(nodes)
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                stack += [user] if user.target in READ_THROUGH else []
    return sorted((n for n in found if n in scene.order), key=scene.order.__getitem__)


def ascends(node: fx.Node) -> bool:
    """Is it a sort of integers ``[S]``, the least first?"""
    if node.target not in SORTS or argument(node, 2, "descending", False):
        return False
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    return value.dim() == 1 and value.dtype in rules.INTEGERS


def counted(ids: Ids) -> list[Counted]:
    """All counts and ends of ids in a graph; narrow and negative only where there may be such."""
    found = [c for n in ids.readers() if n.target in READERS and (c := READERS[n.target](ids, n))]
    found = [c for c in found if _held(ids, c.node)]
    return found + [
        replace(c, node=_cast(user), ends=True)
        for c in found if not c.ends for n in _casts(ids, c.node) for user in n.users
        if user.target is aten.cumsum.default and user.args[1] in (0, -1) and _held(ids, user)
    ]  # fmt: skip


def _held(ids: Ids, node: fx.Node) -> bool:
    """Does its dtype hold every number of ids?"""
    size, dtype = ids.node.meta["val"].shape[0], node.meta["val"].dtype
    few = not isinstance(size, int) or size <= HELD
    return dtype in rules.INTEGERS or dtype in FLOATS and few


def _casts(ids: Ids, node: fx.Node) -> list[fx.Node]:
    """It and its casts."""
    return [node, *(n for n in node.users if n.target in CASTS and _held(ids, n))]


def _cast(node: fx.Node) -> fx.Node:
    """What is made of numbers: integers, if that is all."""
    user = next(iter(node.users), node)
    only = len(node.users) == 1 and user.target in CASTS
    return user if only and user.meta["val"].dtype in rules.INTEGERS else node


def holds(t: Term | Complex, wanted: Sequence[Term | Complex]) -> bool | None:
    """Is it one of these integers, seen through casts? False if all of them are held, True if as
    int32 only, None if it is none."""
    narrow = False
    while all(t is not w for w in wanted):
        if isinstance(t, Complex) or t.op != "cast" or t.args[0].dtype not in rules.INTEGERS:
            return None
        if t.dtype not in (*rules.INTEGERS, *FLOATS):
            return None
        narrow |= t.dtype == torch.int32
        t = t.args[0]
    return narrow


def shown(scene: Scene, node: Any, others: Sequence[fx.Node]) -> bool | None:
    """``holds`` of a node, all of one of the others ``[S]``."""
    shapes = [n.meta["val"].shape for n in (node, *others)]
    whole = all(len(s) == 1 and statically_known_true(s[0] == shapes[0][0]) for s in shapes)
    terms = map(scene.low.term, others)
    return holds(scene.low.term(node), list(terms)) if whole else None


def counts_up(t: Term | Complex, along: Any, first: int = 0) -> bool:
    """Is it ``first + i``, of the index i along an axis?"""
    while isinstance(t, Term) and t.op == "cast" and t.dtype in rules.INTEGERS:
        t = t.args[0]
    return isinstance(t, Term) and t.op == "coord" and t.args[0] == maps.affine(along, first)


def _histogram(ids: Ids, node: fx.Node) -> Counted | None:
    """``histc`` in bins of width one: with E of them from 0 to E - 1 that is E / (E - 1) times an
    id, rounded down. It leaves out what is outside; with E = 1 it takes its range from the ids."""
    n, low, high = (argument(node, i, k, d) for i, k, d in HISTC)
    if not isinstance(n, int) or n < 2 or (low, high) != (0, n - 1):
        return None
    narrow = ids.shown(node.args[0])
    return None if narrow is None else Counted(node, n, narrow=narrow and ids.known is None)


def _compared(ids: Ids, node: fx.Node) -> Counted | None:
    """``(ids[:, None] == arange(E)).sum(0)``, whichever axis comes first."""
    same, low = node.args[0], ids.scene.low
    while same.target in CASTS:
        same = same.args[0]
    if same.target is not aten.eq.Tensor or same.meta["val"].dim() != 2:
        return None
    dims = argument(node, 1, "dim", None) or ()
    if len(dims) != 1 or node.meta["val"].dim() != 1:
        return None
    axis, t = dims[0] % 2, low.term(same)
    along, place = straight(same)[axis], straight(same)[1 - axis]
    experts = same.meta["val"].shape[1 - axis]
    wanted = [low.read(n, (along,)) for n in (ids.node, *ids.ordered)]
    if not statically_known_true(same.meta["val"].shape[axis] == ids.node.meta["val"].shape[0]):
        return None
    for a, b in (t.args, t.args[::-1]) if isinstance(t, Term) and t.op == "eq" else ():
        narrow = holds(a, wanted)
        if narrow is not None and counts_up(b, place) and isinstance(experts, int):
            return Counted(node, experts, narrow=narrow and ids.known is None)
    return None


def _added(ids: Ids, node: fx.Node) -> Counted | None:
    """Ones added to zeros: where an id is no expert, ``scatter_add`` fails; an index counts
    negative ones from the end."""
    if node.target is aten.index_put.default:
        if len(node.args[1]) != 1 or argument(node, 3, "accumulate", False) is not True:
            return None
        base, (index,), ones = node.args[:3]
    else:
        base, _, index, ones = node.args[:4]
    shape, low = base.meta["val"].shape, ids.scene.low
    if len(shape) != 1 or not isinstance(shape[0], int) or ids.shown(index) is None:
        return None
    if node.target is aten.index_put.default and not 0 < (ids.known or 0) <= shape[0]:
        return None
    fills = [low.term(n) for n in (base, ones)]
    made = [rules.number(t) if isinstance(t, Term) else None for t in fills]
    return Counted(node, shape[0], inside=True) if made == [0, 1] else None


def _searched(ids: Ids, node: fx.Node) -> Counted | None:
    """``searchsorted(sorted ids, arange(E), right=True)``, or the same by ``bucketize``."""
    held, asked = node.args[:2]
    if node.target is aten.bucketize.Tensor:
        held, asked = asked, held
    right = node.kwargs.get("right", False) or node.kwargs.get("side") == "right"
    shape, sorter = asked.meta["val"].shape, node.kwargs.get("sorter")
    if len(shape) != 1 or not isinstance(shape[0], int) or sorter is not None:
        return None
    asks = counts_up(ids.scene.low.term(asked), straight(asked)[0], int(not right))
    if not asks or not ids.ordered or ids.shown(held, ordered=True) is not False:
        return None
    return Counted(_cast(node), shape[0], ends=True, negative=ids.known is None)


READERS: dict[Any, Callable[[Ids, fx.Node], Counted | None]] = {
    aten.histc.default: _histogram, aten.sum.dim_IntList: _compared,
    aten.scatter_add.default: _added, aten.index_put.default: _added,
    aten.searchsorted.Tensor: _searched, aten.bucketize.Tensor: _searched,
}  # fmt: skip


def inverses(scene: Scene, order: fx.Node) -> list[fx.Node]:
    """The nodes that hold where each place of an order has gone: numbers written at its places, or
    what sorts it."""
    found = []
    for node in reached(scene, (order,)):
        if ascends(node) and shown(scene, node.args[0], [order]) is False:
            found += [u for u in node.users if u.target is operator.getitem and u.args[1] == 1]
        elif _written(scene, node, order):
            found.append(node)
    return found


def _written(scene: Scene, node: fx.Node, order: fx.Node) -> bool:
    """Is it ``base[order] = arange(S)``, of any base ``[S]``?"""
    if node.target is aten.index_put.default:
        if len(node.args[1]) != 1 or argument(node, 3, "accumulate", False):
            return False
        base, (index,), numbers = node.args[:3]
    elif node.target is aten.scatter.src:
        base, _, index, numbers = node.args[:4]
    else:
        return False
    shapes = [n.meta["val"].shape for n in (order, base, numbers)]
    fits = all(len(s) == 1 and statically_known_true(s[0] == shapes[0][0]) for s in shapes)
    whole = fits and all(n.meta["val"].dtype in rules.INTEGERS for n in (node, numbers))
    if not whole or shown(scene, index, [order]) is None:
        return False
    return counts_up(scene.low.term(numbers), straight(numbers)[0])
