"""What the ATen operations that only move or retype data mean: a map, a cast, a pair."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dsv4fuse import compat, maps
from dsv4fuse.lower import Lowering, Opaque, broadcast, means
from dsv4fuse.maps import ZERO, Index, Map, Size
from dsv4fuse.terms import Complex, Term

aten, prims = torch.ops.aten, torch.ops.prims
Value = Term | Complex


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
    aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default
)  # fmt: skip
def _same(low: Lowering, node: fx.Node, m: Map) -> Value:
    return low.read(node.args[0], m)


@means(aten.lift_fresh_copy.default)
def _lifted(low: Lowering, node: fx.Node, m: Map) -> Value:
    """A constant of the traced program; a number, where it has no axes."""
    held = compat.constant(node.args[0]) if node.args[0].op == "get_attr" else None
    if held is None or held.dim() or held.is_complex():
        return low.read(node.args[0], m)
    with compat.outside_compilation():
        value = held.item()
    return _constant(low, value, held.dtype)


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
    return _constant(low, value, node.meta["val"].dtype)


@means(aten.scalar_tensor.default)
def _scalar_tensor(low: Lowering, node: fx.Node, m: Map) -> Value:
    return _constant(low, node.args[0], node.meta["val"].dtype)


def _constant(low: Lowering, value: Any, dtype: torch.dtype) -> Term:
    """A number as a tensor of that dtype holds it."""
    if not isinstance(value, int | float):
        raise Opaque
    return low.interner.const(torch.tensor(value, dtype=dtype).item())


@means(prims.iota.default)
def _iota(low: Lowering, node: fx.Node, m: Map) -> Value:
    start, step = (node.kwargs[name] for name in ("start", "step"))
    if not (isinstance(start, int) and isinstance(step, int)):
        raise Opaque
    return low.interner.make("coord", (maps.affine(m[0], start, step),), node.meta["val"].dtype)


@means(aten.pow.Scalar)
def _exp2(low: Lowering, node: fx.Node, m: Map) -> Value:
    """2 ** x; other functions of the maths library may differ in the last bit."""
    base, exponent = node.args
    if base != 2:
        raise Opaque
    power = low._spread(node, m, "exp2", (exponent,))
    low.loose[power] = "power of two"
    return power


VIEWS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten.permute.default, aten.t.default,
        aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.squeeze.default, aten.expand.default, aten.alias.default, aten.detach.default,
        aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.split.Tensor,
        aten.split_with_sizes.default, aten.as_strided.default, aten.diagonal.default,
        operator.getitem,
    }
)  # fmt: skip


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory this one shows."""
    while node.target in VIEWS:
        node = node.args[0]
    return node


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
            return at_least(v, length)
        if not isinstance(length, int):
            return v if v >= 0 else length + v
        return max(0, min(length, v if v >= 0 else length + v))

    return clip(start), clip(end), step


def at_least(v: Size, length: Size) -> Size:
    """A symbolic position counted from the front; one whose sign is unknown is opaque."""
    if isinstance(v, int) or v.is_nonnegative:
        return v
    if v.is_negative:
        return length + v
    raise Opaque


@means(aten.select.int)
def _select(low: Lowering, node: fx.Node, m: Map) -> Value:
    base, axis, i = node.args
    shape = shape_of(base)
    axis %= len(shape)
    at = known(i, 0)
    at = at + shape[axis] if isinstance(at, int) and at < 0 else at_least(at, shape[axis])
    return low.read(base, (*m[:axis], Index(at), *m[axis:]))


@means(operator.getitem)
def _getitem(low: Lowering, node: fx.Node, m: Map) -> Value:
    """One output of a split, chunk or unbind is a slice."""
    source, k = node.args
    if source.target is aten.max.dim and k == 0:
        return low.fold(source, m, "amax")
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


# ---- complex values are pairs of real ones -----------------------------------------------------


@means(aten.view_as_complex.default)
def _view_as_complex(low: Lowering, node: fx.Node, m: Map) -> Value:
    parts = [low.read(node.args[0], (*m, Index(k))) for k in (0, 1)]
    if not all(isinstance(p, Term) for p in parts):
        raise Opaque
    return Complex(*parts)  # type: ignore[arg-type]


@means(aten._conj.default, aten._conj_physical.default, aten.conj_physical.default)
def _conj(low: Lowering, node: fx.Node, m: Map) -> Value:
    value = low.read(node.args[0], m)
    if not isinstance(value, Complex):
        return value
    return Complex(value.re, low.make("neg", (value.im,), value.im.dtype))
