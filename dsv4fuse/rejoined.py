"""Parts of one tensor that are joined again: the tensor itself, whatever they were cut by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dsv4fuse import maps
from dsv4fuse.lower import Lowering
from dsv4fuse.maps import ZERO, Digit, Index, Map, Size
from dsv4fuse.terms import Term
from dsv4fuse.views import base_of, shape_of


def rejoined(tensors: Sequence[fx.Node], axis: int) -> tuple[fx.Node, Map] | None:
    """The tensor that is cut into these neighbouring parts, and the map of the joined whole."""
    base = base_of(tensors[0])
    if len(tensors) < 2 or any(base_of(t) is not base for t in tensors):
        return None
    views = Lowering(leaves=frozenset({base}))
    terms = [views.term(t) for t in tensors]
    sizes = [shape_of(t)[axis] if len(shape_of(t)) > axis else 0 for t in tensors]
    if not all(isinstance(t, Term) and t.op == "load" and t.args[0] is base for t in terms):
        return None
    if any(n == 0 for n in sizes):
        return None
    whole = joined([t.args[1] for t in terms], axis, sizes)  # type: ignore[union-attr]
    return None if whole is None else (base, whole)


def joined(parts: Sequence[Map], axis: int, sizes: Sequence[Size]) -> Map | None:
    """The map that reads in one what these read side by side along an axis.

    None for no neighbours: the whole, cut again, must be the parts.
    """
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    for way in (_run_on, _stacked):
        pairs = zip(*parts[:2], strict=True)
        whole = tuple(way(a, b, axis, sizes[0], sum(sizes)) for a, b in pairs)
        if None not in whole and all(
            tuple(maps.restrict(i, axis, start, size) for i in whole) == part  # type: ignore[arg-type]
            for part, start, size in zip(parts, starts, sizes, strict=True)
        ):
            return whole  # type: ignore[return-value]
    return None


def _run_on(a: Index, b: Index, axis: int, size: Size, extent: Size) -> Index | None:
    """a, where it runs on to ``extent`` and has reached b after ``size``."""
    if not all(isinstance(n, int) for n in (a.offset, b.offset, size)):
        return None
    step, left = divmod(b.offset - a.offset, size)
    if left or step < 0:
        return None
    rest = [t for t in a.terms if t[1].coord != axis]
    return maps.index(a.offset, [*rest, (step, Digit(axis, 1, extent, extent))] if step else rest)


def _stacked(a: Index, b: Index, axis: int, size: Size, extent: Size) -> Index | None:
    """a, and from there to b one step for each ``size``."""
    if not (isinstance(a.offset, int) and isinstance(b.offset, int)) or b.offset < a.offset:
        return None
    if not maps.divides(size, extent):
        return None
    terms = [
        (s, Digit(d.coord, d.div, d.size, extent if d.coord == axis else d.extent))
        for s, d in a.terms
    ]
    step = (b.offset - a.offset, Digit(axis, size, maps.quotient(extent, size), extent))
    return maps.index(a.offset, [*terms, step] if step[0] else terms)


def composed(outer: Map, inner: Map) -> Map | None:
    """``outer`` read through a map of its coordinates; None where a digit does not fall apart."""
    found: list[Index] = []
    for i in outer:
        offset, terms = i.offset, list[tuple[Size, Digit]]()
        for stride, d in i.terms:
            part = _digit_of(inner[d.coord], d)
            if part is None:
                return None
            offset += stride * part.offset
            terms += [(stride * s, e) for s, e in part.terms]
        found.append(maps.index(offset, terms))
    return tuple(found)


def _digit_of(i: Index, d: Digit) -> Index | None:
    inside = (ZERO, i) if d.div * d.size == d.extent else maps.split(i, d.div * d.size)
    parts = inside and maps.split(inside[1], d.div)
    return parts and parts[0]
