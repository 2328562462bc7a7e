"""Matrix products seen through whatever views stand around them.

A product is a leaf of terms: its two operands are other values. ``contraction`` reads both in the
coordinates of the product's *output* (any view of an ``mm`` or ``bmm``, so einsum, matmul, linear
and products on transposed, merged or expanded views are one case) and of one more coordinate,
number ``rank(output)``, that is summed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from dsv4fuse import maps, rules
from dsv4fuse.maps import ZERO, Digit, Index, Map, Size
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex, Term

aten = torch.ops.aten
Axes = tuple[int | None, ...]
Space = tuple[Size, ...]  # the lengths of the coordinates


@dataclass(frozen=True)
class Operand:
    """One factor of a product.

    ``places`` are the nodes that hold it, nearest the graph's inputs first, each with its map: the
    index along each of its axes, made of the output's coordinates and the summed one.
    """

    term: Term
    places: tuple[tuple[fx.Node, Map], ...]

    def whole(self) -> Iterator[tuple[fx.Node, Axes]]:
        """The nodes of which each axis is one coordinate, unbroken (None for an axis of one)."""
        for node, m in self.places:
            axes = tuple(None if i == ZERO else i.whole() for i in m)
            broken = any(i != ZERO and a is None for i, a in zip(m, axes, strict=True))
            if not broken and maps.whole_axes(m, maps.sizes_of(node.meta["val"])):
                yield node, axes

    def at(self, node: fx.Node) -> Map | None:
        """The map through which the factor reads this node, if it does."""
        return next((m for n, m in self.places if n is node), None)


@dataclass(frozen=True)
class Contraction:
    """``output[c] = Σ_k left[c, k] · right[c, k]`` for the coordinates c of ``output``.

    ``product`` is the mm, bmm or sum behind the output; ``rounded`` says that each single product
    was rounded to its dtype before the sum, as ``(a * b).sum(-1)`` does and a matmul does not.
    """

    output: fx.Node
    product: fx.Node
    left: Operand
    right: Operand
    size: Size
    rounded: bool = False

    @property
    def summed(self) -> int:
        """The number of the summed coordinate."""
        return self.output.meta["val"].dim()

    @property
    def space(self) -> Space:
        """How long the coordinates are that the factors are read in."""
        return (*maps.sizes_of(self.output.meta["val"]), self.size)


def contraction(
    scene: Scene, output: fx.Node, term: Term | None = None, *, narrowed: bool = False
) -> Contraction | None:
    """The product that a node shows, whole or through views; None for anything else.

    ``term``: the product as a part of the output's own term, in the output's coordinates.
    ``narrowed``: also one whose sums are then rounded to the output's narrower dtype.
    """
    own = scene.low.term(output) if term is None else term
    if isinstance(own, Complex):
        return None
    if narrowed and own.op == "cast" and rules.widens(own.dtype, own.args[0].dtype):
        own = own.args[0]
    space = maps.sizes_of(output.meta["val"])
    if own.op == "fold":
        return _sum_of_products(scene, output, own, space)
    return product(scene, own, space, output)


def product(scene: Scene, term: Term, space: Space, output: fx.Node) -> Contraction | None:
    """The matrix product that a term of these coordinates reads, whatever node holds it."""
    if term.op != "load" or term.args[0].target not in (aten.mm.default, aten.bmm.default):
        return None
    node, (*batch, row, column) = term.args[0], term.args[1]
    left, right = node.args
    size = maps.sizes_of(left.meta["val"])[-1]
    k, space = _running(len(space), size), (*space, size)
    rows = _operand(scene, left, (*batch, row, k), space)
    columns = _operand(scene, right, (*batch, k, column), space)
    if rows is None or columns is None:
        return None
    return Contraction(output, node, rows, columns, size)


def _running(coordinate: int, size: Size) -> Index:
    return ZERO if size == 1 else Index(0, ((1, Digit(coordinate, 1, size, size)),))


def _operand(scene: Scene, node: fx.Node, m: Map, space: Space) -> Operand | None:
    term = scene.low.read(node, m)
    if isinstance(term, Complex):
        return None
    return Operand(term, scene.places(term, space))


def _sum_of_products(
    scene: Scene, output: fx.Node, fold: Term, space: Space
) -> Contraction | None:
    """``(a * b).sum(axis)``: the factors renamed from the sum's own space to the output's."""
    how, body, axes, shape, m = fold.args
    if how != "sum" or body.op != "mul" or len(axes) != 1:
        return None
    (axis,) = axes
    renamed: dict[int, Index] = dict(enumerate(m)) | {axis: _running(len(space), shape[axis])}
    operands = []
    for factor in body.args:
        term = _renamed(scene, factor, shape, renamed)
        if factor.op == "const" or term is None:
            return None
        operands.append(Operand(term, scene.places(term, (*space, shape[axis]))))
    products = next(iter(scene.low.origins[fold]))[0]
    left, right = operands
    return Contraction(output, products, left, right, shape[axis], True)


def _renamed(scene: Scene, t: Term, space: Space, renamed: dict[int, Index]) -> Term | None:
    """A term in other coordinates: a node that holds it read anew, or its operands renamed."""
    for node, own in scene.places(t, space):
        m = [_substitute(i, renamed) for i in own]
        read = None if None in m else scene.low.read(node, tuple(m))  # type: ignore[arg-type]
        if isinstance(read, Term):
            return read
    if t.op in ("load", "const", "fold", "cat", "lace"):
        return t if t.op == "const" else None
    args = [_renamed(scene, a, space, renamed) for a in t.args]  # a promotion that no node shows
    return None if None in args else scene.low.make(t.op, tuple(args), t.dtype)


def _substitute(i: Index, renamed: dict[int, Index]) -> Index | None:
    """An index with its coordinates renamed; None where one is no longer whole."""
    terms = []
    for stride, digit in i.terms:
        new = renamed[digit.coord]
        whole = new.whole()
        if new != ZERO and (whole is None or new.terms[0][1].extent != digit.extent):
            return None
        if whole is not None:
            terms.append((stride, Digit(whole, digit.div, digit.size, digit.extent)))
    return maps.index(i.offset, terms)
