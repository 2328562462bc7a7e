"""What the hyper-connection fusions share: the mixes of the streams, and what is built on them.

``Mixes`` is found from a value that depends on it; terms are interned, so that everything further
along is not searched for: the wanted term is built, and the nodes that hold it are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dsv4fuse import maps, rules
from dsv4fuse.contract import Operand, contraction
from dsv4fuse.maps import ZERO, Digit, Index, Map, Size
from dsv4fuse.readers import is_tensor
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex, Term, straight

F32 = torch.float32
SLACK = 3e-5  # of fp32 sums of tens of thousands of products in two orders, through the exponential
Shape = tuple[Size, ...]


def shape(node: fx.Node) -> Shape:
    return maps.sizes_of(node.meta["val"])


def places(scene: Scene, term: Term) -> Iterator[tuple[fx.Node, Map]]:
    """The nodes that hold a term, and where; nearest to the graph's inputs first."""
    yield from ((n, m) for n, m in list(scene.low.origins.get(term, ())) if is_tensor(n))


def whole(coordinate: int, size: Size) -> Index:
    return ZERO if size == 1 else Index(0, ((1, Digit(coordinate, 1, size, size)),))


def unwidened(term: Term) -> Term:
    """term without an exact cast to a wider dtype."""
    if term.op == "cast" and rules.widens(term.args[0].dtype, term.dtype):
        return term.args[0]
    return term


def holding(scene: Scene, term: Term, m: Map, size: Shape) -> fx.Node | None:
    """A node of that size that holds, at m, the term or what was widened to it."""
    for inner in dict.fromkeys((unwidened(term), term)):
        for node, own in places(scene, inner):
            if own == m and shape(node) == size:
                return node
    return None


def regrouped(lead: Shape, other: Shape) -> Map | None:
    """The coordinates of ``lead`` as an index into axes ``other`` of the same elements."""
    return maps.reshape(maps.identity(lead), lead, other)


@dataclass(frozen=True)
class Mixes:
    """``F.linear(x / rms(x), fn)`` over flattened streams x ``[.., n, D]``: ``node [.., m]``.

    ``before``: the streams are scaled, not the product. ``scale`` and ``base`` follow it.
    """

    node: fx.Node
    streams: fx.Node
    fn: fx.Node
    eps: float
    before: bool
    scale: fx.Node
    base: fx.Node

    @property
    def count(self) -> int:
        """How many streams there are."""
        return int(self.streams.meta["val"].shape[-2])

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        return (self.streams, self.fn, self.scale, self.base)

    @property
    def tokens(self) -> int | torch.SymInt:
        return math.prod(self.streams.meta["val"].shape[:-2])

    def spread(self) -> dict[fx.Node, float]:
        """Random values whose mixes are about one, as a model's are."""
        return {self.fn: float(self.fn.meta["val"].numel() / shape(self.base)[0]) ** -0.5}

    def tensors(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The op's arguments from what ``inputs`` hold."""
        x, fn, scale, base = given
        x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
        return x, fn if fn.shape[0] == base.shape[0] else fn.t(), scale, base

    def shaped(self, t: Tensor, streams: Tensor, node: fx.Node) -> Tensor:
        """A result ``[T, ...]`` with the leading axes that the node has, those of size one too."""
        lead = shape(node)[: node.meta["val"].dim() - t.dim() + 1]
        axes = [a for a, n in enumerate(shape(self.streams)[:-2]) if n != 1]
        held = iter([streams.shape[a] for a in axes] if len(_plain(lead)) > 1 else [t.shape[0]])
        return t.view(*(1 if n == 1 else next(held) for n in lead), *t.shape[1:])

    def fits(self, node: fx.Node, lanes: int) -> bool:
        """Are the node's leading axes those of the streams, or all of them as one?"""
        lead = _plain(shape(node)[: len(shape(node)) - lanes])
        return len(lead) < 2 or lead == _plain(shape(self.streams)[:-2])

    def leads(self, lead: Shape) -> Iterator[Shape]:
        """The leading axes that what is made of the mixes may have, where a part has these."""
        own = (lead, shape(self.node)[:-1], shape(self.streams)[:-2])
        yield from dict.fromkeys((*own, *map(_plain, own)))


def _plain(lead: Shape) -> Shape:
    """Axes without those of size one."""
    return tuple(n for n in lead if n != 1)


# ---- finding the mixes ---------------------------------------------------------------------------


def affine(
    scene: Scene, z: Term, lead: Shape, index: Index, scales: int, which: int
) -> Mixes | None:
    """The mixes whose column ``index``, times ``scale[which]``, plus its base, is z."""
    for product, b in _orders(z, "add"):
        for m, s in _orders(product, "mul"):
            for node, width in _columns(scene, m, lead, index):
                scale = holding(scene, s, (Index(which),), (scales,))
                base = holding(scene, b, (index,), (width,))
                if scale is not None and base is not None:
                    found = _mixes(scene, node)
                    if found is not None:
                        return replace(found, scale=scale, base=base)
    return None


def _orders(t: Term, op: str) -> Iterator[tuple[Term, Term]]:
    if t.op == op:
        yield t.args
        yield t.args[::-1]


def _columns(
    scene: Scene, term: Term, lead: Shape, index: Index
) -> Iterator[tuple[fx.Node, Size]]:
    for node, m in places(scene, term):
        if m and m[-1] == index and m[:-1] == regrouped(lead, shape(node)[:-1]):
            yield node, shape(node)[-1]


def _mixes(scene: Scene, node: fx.Node) -> Mixes | None:
    """The mixes at a node ``[.., m]``, scale and base still unknown."""
    term = scene.low.term(node)
    if isinstance(term, Complex) or term.dtype != F32:
        return None
    lead = shape(node)[:-1]
    for product, factor in ((term, None), *_orders(term, "mul")):
        shown = holding(scene, product, straight(node), shape(node))
        found = contraction(scene, shown) if shown is not None else None
        if found is None or found.rounded:
            continue
        k = Index(0, ((1, Digit(found.summed, 1, found.size, found.size)),))
        column = whole(found.summed - 1, shape(node)[-1])
        for left, right in ((found.left, found.right), (found.right, found.left)):
            fn = _matrix(scene, right, column, k)
            streams = _normalised(scene, left, lead, k, factor) if fn is not None else None
            if streams is not None:
                x, eps = streams
                return Mixes(node, x, fn, eps, factor is None, fn, fn)  # type: ignore[arg-type]
    return None


def _matrix(scene: Scene, operand: Operand, column: Index, k: Index) -> fx.Node | None:
    """The node ``[m, K]`` or ``[K, m]`` behind a factor."""
    held = places(scene, unwidened(operand.term))
    return next((n for n, m in held if m in ((column, k), (k, column))), None)


def _normalised(
    scene: Scene, operand: Operand, lead: Shape, k: Index, factor: Term | None
) -> tuple[fx.Node, float] | None:
    """(streams, eps) of a factor that is the streams over their RMS; or whose ``factor`` is."""
    for node, m in places(scene, operand.term):
        size = shape(node)
        if not m or m[-1] != k or m[:-1] != regrouped(lead, size[:-1]):
            continue
        term = scene.low.term(node)
        for x, r in ((term, factor),) if factor is not None else tuple(_orders(term, "mul")):
            own = lead if factor is not None else size[:-1]
            root = _rstd(scene, r, own)
            if root is not None and root[0] in _streams(scene, x, size):
                return root
    return None


def _rstd(scene: Scene, term: Term, lead: Shape) -> tuple[fx.Node, float] | None:
    """(streams, eps) of ``rsqrt(mean(x · x) + eps)`` in a space whose leading axes are given."""
    if term.op != "rsqrt" or term.args[0].op != "add":
        return None
    mean, eps = sorted(term.args[0].args, key=lambda t: t.op == "const")
    if mean.op != "fold" or mean.args[0] != "mean" or eps.op != "const":
        return None
    _, body, axes, size, m = mean.args
    first = axes[0]
    if axes != tuple(range(first, len(size))) or m[:first] != regrouped(lead, size[:first]):
        return None
    if body.op != "mul" or body.args[0] is not body.args[1] or body.dtype != F32:
        return None
    found = _streams(scene, body.args[0], size)
    width = maps.product(size[first:])
    fitting = (n for n in found if maps.product(shape(n)[-2:]) == width)
    streams = next(fitting, None)
    return None if streams is None else (streams, eps.args[0])


def _streams(scene: Scene, term: Term, size: Shape) -> list[fx.Node]:
    """The nodes ``[.., n, D]`` of which a term of that size is a reshape, widened to fp32."""
    if term.dtype != F32:
        return []
    found = []
    for node, m in places(scene, unwidened(term)):
        own = shape(node)
        if len(own) > 1 and isinstance(own[-2], int) and own[-2] > 1:
            if maps.product(own) == maps.product(size) and m == regrouped(size, own):
                found.append(node)
    return found
