"""What the ATen operations that move or join data mean: maps, casts, pieces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dsv4fuse import maps
from dsv4fuse.lower import Lowering, Opaque, broadcast, means
from dsv4fuse.maps import ZERO, Index, Map, Size
from dsv4fuse.terms import Complex, Term

aten, prims = torch.ops.aten, torch.ops.prims
Value = Term | Complex
# (start, size, step, reader of the piece through a map whose joined axis is the piece's own)
Piece = tuple[int, int, int, Callable[[Map], Value]]


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    return maps.sizes_of(node.meta["val"])


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def known(value: Any, default: Size) -> Size:
    """A slice bound as a size; a missing one is the default."""
    if value is None:
        return default
    if isinstance(value, fx.Node):
        return maps.as_size(value.meta["val"])
    return maps.as_size(value)


@means(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(low: Lowering, node: fx.Node, m: Map) -> Value:
    (base,) = node.all_input_nodes[:1]
    through = maps.reshape(m, shape_of(node), shape_of(base))
    if through is None:
        raise Opaque
    return low.read(base, through)


@means(aten.permute.default)
def _permute(low: Lowering, node: fx.Node, m: Map) -> Value:
    base, order = node.args
    through: list[Index] = [ZERO] * len(order)
    for axis, source in enumerate(order):
        through[source % len(order)] = m[axis]
    return low.read(base, tuple(through))


@means(aten.t.default)
def _t(low: Lowering, node: fx.Node, m: Map) -> Value:
    return low.read(node.args[0], m[::-1])


@means(aten.transpose.int)
def _transpose(low: Lowering, node: fx.Node, m: Map) -> Value:
    base, a, b = node.args
    through = list(m)
    through[a], through[b] = through[b], through[a]
    return low.read(base, tuple(through))


@means(aten.unsqueeze.default)
def _unsqueeze(low: Lowering, node: fx.Node, m: Map) -> Value:
    base, axis = node.args
    axis %= len(m)
    return low.read(base, m[:axis] + m[axis + 1 :])


@means(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(low: Lowering, node: fx.Node, m: Map) -> Value:
    base = node.args[0]
    shape = shape_of(base)
    axes = node.args[1] if len(node.args) > 1 else range(len(shape))
    axes = [axes] if isinstance(axes, int) else axes
    gone = {a % len(shape) for a in axes if shape[a % len(shape)] == 1}
    rest = iter(m)
    return low.read(base, tuple(ZERO if a in gone else next(rest) for a in range(len(shape))))


@means(aten.expand.default)
def _expand(low: Lowering, node: fx.Node, m: Map) -> Value:
    base = node.args[0]
    return low.read(base, broadcast(m, shape_of(base)))


@means(
    aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default,
    aten.lift_fresh_copy.default,
)  # fmt: skip
def _same(low: Lowering, node: fx.Node, m: Map) -> Value:
    return low.read(node.args[0], m)


@means(prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype)
def _cast(low: Lowering, node: fx.Node, m: Map) -> Value:
    dtype = node.meta["val"].dtype
    source = node.args[0]
    if dtype.is_complex or source.meta["val"].dtype.is_complex:
        raise Opaque
    if source.meta["val"].device != node.meta["val"].device:
        raise Opaque
    return low._spread(node, m, "cast", (source,))


@means(aten.copy.default)
def _copy(low: Lowering, node: fx.Node, m: Map) -> Value:
    """copy(target, source): the source, broadcast and cast to the target."""
    return low._spread(node, m, "cast", (node.args[1],))


@means(aten.pow.Tensor_Scalar)
def _pow(low: Lowering, node: fx.Node, m: Map) -> Value:
    base, exponent = node.args
    if exponent == 2:
        return low._spread(node, m, "mul", (base, base))
    if exponent == 0.5:
        return low._spread(node, m, "sqrt", (base,))
    if exponent == -0.5:
        return low._spread(node, m, "rsqrt", (base,))
    if exponent == 1:
        return low.read(base, m)
    raise Opaque


@means(aten.square.default)
def _square(low: Lowering, node: fx.Node, m: Map) -> Value:
    return low._spread(node, m, "mul", (node.args[0], node.args[0]))


@means(aten.relu.default)
def _relu(low: Lowering, node: fx.Node, m: Map) -> Value:
    return low._spread(node, m, "maximum", (node.args[0], 0.0))


@means(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(low: Lowering, node: fx.Node, m: Map) -> Value:
    value = node.args[1] if node.target is not aten.new_full.default else node.args[2]
    if not isinstance(value, int | float):
        raise Opaque
    return low.interner.const(value)


# ---- slices ------------------------------------------------------------------------------------


@means(aten.slice.Tensor)
def _slice(low: Lowering, node: fx.Node, m: Map) -> Value:
    base = node.args[0]
    axis = argument(node, 1, "dim", 0) % len(m)
    start, _, step = slice_range(node, 1, shape_of(base)[axis])
    return low.read(base, (*m[:axis], maps.affine(m[axis], start, step), *m[axis + 1 :]))


def slice_range(node: fx.Node, first: int, length: Size) -> tuple[Size, Size, int]:
    """(start, end, step) of a slice or slice_scatter, clipped as PyTorch clips it."""
    start = known(argument(node, first + 1, "start", None), 0)
    end = known(argument(node, first + 2, "end", None), length)
    step = argument(node, first + 3, "step", 1)
    if isinstance(end, int) and end >= 2**62:
        end = length

    def clip(v: Size) -> Size:
        if not isinstance(v, int):
            return v  # a symbol of the graph: torch has already guarded on its range
        if not isinstance(length, int):
            return v if v >= 0 else length + v
        return max(0, min(length, v if v >= 0 else length + v))

    return clip(start), clip(end), step


@means(aten.select.int)
def _select(low: Lowering, node: fx.Node, m: Map) -> Value:
    base, axis, i = node.args
    shape = shape_of(base)
    axis %= len(shape)
    at = known(i, 0)
    at = at + shape[axis] if isinstance(at, int) and at < 0 else at
    return low.read(base, (*m[:axis], Index(at), *m[axis:]))


@means(operator.getitem)
def _getitem(low: Lowering, node: fx.Node, m: Map) -> Value:
    """One output of a split, chunk or unbind is a slice."""
    source, k = node.args
    if source.target is aten.unbind.int:
        base, axis = source.args[0], argument(source, 1, "dim", 0)
        axis %= len(shape_of(base))
        return low.read(base, (*m[:axis], Index(k), *m[axis:]))
    if source.target not in (aten.split_with_sizes.default, aten.split.Tensor):
        raise Opaque
    base, sizes = source.args[:2]
    axis = argument(source, 2, "dim", 0) % len(m)
    if source.target is aten.split.Tensor:
        start: Size = known(sizes, 0) * k
    else:
        start = sum((known(s, 0) for s in sizes[:k]), 0)
    return low.read(base, (*m[:axis], maps.affine(m[axis], start), *m[axis + 1 :]))


# ---- pieces ------------------------------------------------------------------------------------


@means(aten.cat.default)
def _cat(low: Lowering, node: fx.Node, m: Map) -> Value:
    tensors, axis = node.args[0], argument(node, 1, "dim", 0) % len(m)
    pieces: list[Piece] = []
    start = 0
    for t in tensors:
        size = shape_of(t)[axis] if len(shape_of(t)) == len(m) else 0
        if not isinstance(size, int):
            raise Opaque
        if size:
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


def _join(low: Lowering, node: fx.Node, m: Map, axis: int, pieces: Sequence[Piece]) -> Value:
    """The node's value through m, for a value made of pieces along its last axis."""
    if axis != len(m) - 1:
        raise Opaque  # rows are joined: a new tensor as far as any fusion is concerned
    i = m[axis]
    for start, size, step, read in pieces:
        local = _inside(i, start, size, step)
        if local is not None:
            return read((*m[:axis], local))
    if len(i.terms) != 1 or i.terms[0][0] != 1 or i.offset != 0:
        raise Opaque
    digit = i.terms[0][1]
    if not isinstance(digit.extent, int):
        raise Opaque
    if all(p[2] == len(pieces) for p in pieces) and digit.whole:
        return low.lace(node, m, digit.coord, len(pieces), pieces[0][1])  # strided assignment
    if digit.div == 1 and not digit.whole and all(p[1] == 1 for p in pieces):
        return low.lace(node, m, digit.coord, len(pieces), digit.extent // len(pieces))  # stack
    if digit.div * digit.size != digit.extent:
        raise Opaque
    cuts = [(start * digit.div, size * digit.div) for start, size, _, _ in pieces]
    return low.cat(node, m, digit.coord, cuts)


def _inside(i: Index, start: int, size: int, step: int) -> Index | None:
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


# ---- complex values are pairs of real ones -----------------------------------------------------


@means(aten.view_as_complex.default)
def _view_as_complex(low: Lowering, node: fx.Node, m: Map) -> Value:
    parts = [low.read(node.args[0], (*m, Index(k))) for k in (0, 1)]
    if not all(isinstance(p, Term) for p in parts):
        raise Opaque
    return Complex(*parts)  # type: ignore[arg-type]


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


@means(aten._conj.default, aten._conj_physical.default, aten.conj_physical.default)
def _conj(low: Lowering, node: fx.Node, m: Map) -> Value:
    value = low.read(node.args[0], m)
    if not isinstance(value, Complex):
        return value
    return Complex(value.re, low.make("neg", (value.im,), value.im.dtype))
