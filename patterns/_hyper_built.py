"""Terms built on the mixes of hyper-connections, and the nodes that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from dsv4fuse import maps
from dsv4fuse.contract import contraction
from dsv4fuse.fusion import Sizes
from dsv4fuse.maps import Index
from dsv4fuse.readers import is_tensor, readers
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Term

from ._hyper import F32, Mixes, Shape, places, regrouped, shape, whole


def column(scene: Scene, mixes: Mixes, lead: Shape, index: Index, which: int) -> Term:
    """Column ``index`` of the mixes, scaled and shifted, in a space with those leading axes."""
    low = scene.low
    rows = regrouped(lead, shape(mixes.node)[:-1])
    assert rows is not None
    m = low.read(mixes.node, (*rows, index))
    s, b = low.read(mixes.scale, (Index(which),)), low.read(mixes.base, (index,))
    s, b = (low.make("cast", (t,), F32) for t in (s, b))
    return low.make("add", (low.make("mul", (m, s), F32), b), F32)


def gate(scene: Scene, mixes: Mixes, lead: Shape, index: Index, eps: float) -> Term:
    """``pre``: sigmoid of a column, plus eps."""
    low = scene.low
    z = low.make("sigmoid", (column(scene, mixes, lead, index, 0),), F32)
    return low.make("add", (z, low.interner.const(eps)), F32)


def collapsed(scene: Scene, mixes: Mixes, lead: Shape, eps: float) -> fx.Node | None:
    """The node ``[.., D]`` that holds ``Σ_i pre_i · x_i``, rounded to the streams' dtype."""
    n, width = shape(mixes.streams)[-2:]
    for rows in mixes.leads(lead):
        lane = whole(len(rows), n)
        for held, m in places(scene, gate(scene, mixes, rows, lane, eps)):
            if m != (*(regrouped(rows, shape(held)[:-1]) or ()), lane):
                continue
            for node in _products(held):
                size = (*rows, width)
                if shape(node) == size and _collapses(scene, mixes, node, rows, eps):
                    return _rounded(scene, node, mixes.streams.meta["val"].dtype)
    return None


def _products(node: fx.Node) -> Iterator[fx.Node]:
    """What a value is multiplied into, and those products' sums, in any view."""
    for reader in readers(node)[0]:
        for near in (reader, *readers(reader)[0]):
            yield from (n for n in (near, *readers(near)[1]) if is_tensor(n))


def _collapses(
    scene: Scene, mixes: Mixes, node: fx.Node, lead: Shape, eps: float
) -> bool:
    found = contraction(scene, node)
    if found is None or found.product.meta["val"].dtype != F32:
        return False
    n, width = shape(mixes.streams)[-2:]
    stream = whole(found.summed, n)
    rows = regrouped(lead, shape(mixes.streams)[:-2])
    if rows is None:
        return False
    pre = gate(scene, mixes, lead, stream, eps)
    x = scene.low.read(mixes.streams, (*rows, stream, whole(len(lead), width)))
    x = scene.low.make("cast", (x,), F32)
    return {found.left.term, found.right.term} == {pre, x}


def _rounded(scene: Scene, node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    term = scene.low.make("cast", (scene.low.term(node),), dtype)
    return held_at(scene, term, shape(node))


def held_at(scene: Scene, term: Term, size: Shape) -> fx.Node | None:
    """The first node of that size that holds the term at its own coordinates."""
    found = [
        n
        for n, m in places(scene, term)
        if m == maps.identity(size) and shape(n) == size and n.op == "call_function"
    ]
    return min(found, key=scene.order.__getitem__, default=None)


def loosened(
    scene: Scene, outputs: Sequence[fx.Node], inputs: Sequence[fx.Node]
) -> frozenset[str]:
    """The rules up to rounding that reading the nodes between took."""
    region = set().union(*(scene.region(o, inputs) for o in outputs))
    terms = (scene.low.term(n) for n in region if is_tensor(n))
    return frozenset(n for t in terms if (n := scene.low.loose.get(t)))  # type: ignore[arg-type]


def hidden(sizes: Sizes) -> int:
    """The hidden size of the model with these sizes: Flash, Pro, or a small one."""
    return 7168 if sizes.inter == 3072 else 2 * sizes.inter
