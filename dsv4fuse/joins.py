"""What the ATen operations that join tensors mean: pieces along the last axis.

``cat``, ``stack``, an assignment into a slice, a complex value seen as real: each is pieces in a
row or lanes interleaved, and reads of it go on to the piece they fall into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from dsv4fuse import maps
from dsv4fuse.lower import Lowering, Opaque, means
from dsv4fuse.maps import ZERO, Index, Map, Size
from dsv4fuse.rejoined import composed, rejoined
from dsv4fuse.terms import Complex
from dsv4fuse.views import Value, argument, shape_of, slice_range

aten = torch.ops.aten
# (start, size, step, reader of the piece through a map whose joined axis is the piece's own)
Piece = tuple[Size, Size, int, Callable[[Map], Value]]


@means(aten.cat.default)
def _cat(low: Lowering, node: fx.Node, m: Map) -> Value:
    tensors, axis = node.args[0], argument(node, 1, "dim", 0) % len(m)
    whole = rejoined(tensors, axis)
    through = whole and composed(whole[1], m)
    if whole is not None and through is not None:
        return low.read(whole[0], through)
    pieces: list[Piece] = []
    start: Size = 0
    for t in tensors:
        size = shape_of(t)[axis] if len(shape_of(t)) == len(m) else 0
        if size != 0:
            pieces.append((start, size, 1, lambda lm, t=t: low.read(t, lm)))  # type: ignore[misc]
        start += size
    return _join(low, node, m, axis, pieces)


@means(aten.slice_scatter.default)
def _slice_scatter(low: Lowering, node: fx.Node, m: Map) -> Value:
    base, source = node.args[:2]
    axis = argument(node, 2, "dim", 0) % len(m)
    length = shape_of(base)[axis]
    start, end, step = slice_range(node, 2, length)
    if (start, end, step) == (0, length, 1):
        return low.read(source, m)
    if not all(isinstance(v, int) for v in (length, start, end)):
        raise Opaque

    def under(offset: int, stride: int) -> Callable[[Map], Value]:
        return lambda lm: low.read(
            base, (*lm[:axis], maps.affine(lm[axis], offset, stride), *lm[axis + 1 :])
        )

    def over(lm: Map) -> Value:
        return low.read(source, lm)

    if step == 1:
        pieces = [(0, start, 1, under(0, 1)), (start, end - start, 1, over)]
        pieces.append((end, length - end, 1, under(end, 1)))
        return _join(low, node, m, axis, [p for p in pieces if p[1]])
    if length % step or start >= step or end + step <= length:
        raise Opaque
    ways = [over if j == start else under(j, step) for j in range(step)]
    return _join(low, node, m, axis, [(j, length // step, step, w) for j, w in enumerate(ways)])


@means(aten.select_scatter.default)
def _select_scatter(low: Lowering, node: fx.Node, m: Map) -> Value:
    base, source, axis, at = node.args
    axis %= len(m)
    length = shape_of(base)[axis]
    if not (isinstance(length, int) and isinstance(at, int)):
        raise Opaque
    at %= length

    def under(offset: int) -> Callable[[Map], Value]:
        return lambda lm: low.read(
            base, (*lm[:axis], maps.affine(lm[axis], offset), *lm[axis + 1 :])
        )

    pieces = [(0, at, 1, under(0))]
    pieces.append((at, 1, 1, lambda lm: low.read(source, lm[:axis] + lm[axis + 1 :])))
    pieces.append((at + 1, length - at - 1, 1, under(at + 1)))
    return _join(low, node, m, axis, [p for p in pieces if p[1]])


@means(aten.index_put.default)
def _masked(low: Lowering, node: fx.Node, m: Map) -> Value:
    """An assignment of one value where a mask over the first axes says so."""
    base, indices, value = node.args[:3]
    masks = [i for i in indices if i is not None and i.meta["val"].dtype == torch.bool]
    one = all(n == 1 for n in shape_of(value))
    if len(indices) != 1 or not masks or not one or argument(node, 3, "accumulate", False):
        raise Opaque
    test = low.read(masks[0], m[: len(shape_of(masks[0]))])
    parts = (test, low.read(value, (ZERO,) * len(shape_of(value))), low.read(base, m))
    if any(isinstance(t, Complex) or t.op in ("cat", "lace") for t in parts):
        raise Opaque
    return low.make("where", parts, node.meta["val"].dtype)


def sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values this one's value depends on: not one that it overwrites whole, of
    which only the shape, the dtype and the strides stay."""
    if not _overwrites(node):
        return node.all_input_nodes
    target, source = node.args[:2]
    return [n for n in node.all_input_nodes if n is not target or n is source]


def dependents(node: fx.Node) -> Iterator[fx.Node]:
    """The users whose values depend on this one's."""
    return (user for user in node.users if node in sources(user))


def _overwrites(node: fx.Node) -> bool:
    if node.target is aten.copy.default:
        return True
    if node.target is aten.slice_scatter.default:
        length = shape_of(node.args[0])[argument(node, 2, "dim", 0)]
        return slice_range(node, 2, length) == (0, length, 1)
    return (
        node.target is aten.select_scatter.default and shape_of(node.args[0])[node.args[2]] == 1
    )


def _join(low: Lowering, node: fx.Node, m: Map, axis: int, pieces: Sequence[Piece]) -> Value:
    """The node's value through m, for a value made of pieces along an axis."""
    i = m[axis]
    for start, size, step, read in pieces:
        local = _inside(i, start, size, step)
        if local is not None:
            return read((*m[:axis], local, *m[axis + 1 :]))
    if axis != len(m) - 1:
        raise Opaque  # joined rows: a new tensor as far as any fusion is concerned
    if len(i.terms) != 1 or i.terms[0][0] != 1 or i.offset != 0:
        raise Opaque
    digit = i.terms[0][1]
    strided = all(p[2] == len(pieces) for p in pieces) and digit.whole  # an assignment
    stacked = all(p[1] == 1 for p in pieces) and digit.div == 1 and not digit.whole
    if isinstance(digit.extent, int) and (strided or stacked):
        ways = len(pieces) if strided else digit.size
        if digit.extent % ways:
            raise Opaque  # of some pieces more is read than of others
        return low.lace(node, m, digit.coord, ways, digit.extent // ways)
    if any(step != 1 for _, _, step, _ in pieces) or digit.div * digit.size != digit.extent:
        raise Opaque
    parts = _first(pieces, digit.size)
    return low.cat(node, m, digit.coord, [(start * digit.div, n * digit.div) for start, n in parts])


def _first(pieces: Sequence[Piece], count: Size) -> list[tuple[Size, Size]]:
    """(start, size) of what the first rows of the joined axis read of each piece."""
    if sum(size for _, size, _, _ in pieces) == count:
        return [(start, size) for start, size, _, _ in pieces]
    if not all(isinstance(n, int) for n in (count, *(n for p in pieces for n in p[:2]))):
        raise Opaque
    return [(start, min(size, count - start)) for start, size, _, _ in pieces if start < count]


def _inside(i: Index, start: Size, size: Size, step: int) -> Index | None:
    """i as an index of one piece, or None when it does not stay in the piece."""
    if step == 1:
        low, high = maps.bounds(i)
        if maps.at_least_zero(low - start) and maps.at_least_zero(start + size - 1 - high):
            return maps.affine(i, -start)
        return None
    parts = maps.split(i, step)
    if parts is None or parts[1] != Index(start):
        return None
    return parts[0]


@means(aten.view_as_real.default)
def _view_as_real(low: Lowering, node: fx.Node, m: Map) -> Value:
    def part(name: str) -> Callable[[Map], Value]:
        def read(lm: Map) -> Value:
            value = low.read(node.args[0], lm[:-1])
            if not isinstance(value, Complex):
                raise Opaque
            return getattr(value, name)

        return read

    return _join(low, node, m, len(m) - 1, [(0, 1, 1, part("re")), (1, 1, 1, part("im"))])
