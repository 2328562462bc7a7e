"""Cache writes of a functional graph: ``new = write(cache, region, value)``.

At the hook a write to a buffer is a chain of ``index_put``, ``index_copy``, ``slice_scatter``,
``select_scatter`` over the buffer (or over views of it) whose result an epilogue ``copy_`` brings
home. Each is read here as one ``Write``: per leading axis of the cache an index tensor or a span,
and the value's axes that run along it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from dsv4fuse import maps, rules
from dsv4fuse.lower import Opaque
from dsv4fuse.views import argument, shape_of, slice_range

aten = torch.ops.aten
SHAPES = (aten.view.default, aten.reshape.default)
Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class Place:
    """Where a write goes along one axis of the cache.

    ``index``: a tensor of rows, its axes named by the value's; else ``start`` + the value's axis
    ``along`` (None: the one row ``start``).
    """

    index: fx.Node | None = None
    axes: Axes = ()
    start: int | fx.Node = 0
    along: int | None = None


@dataclass(frozen=True)
class Write:
    """``node`` is ``cache`` with the rows at ``places`` replaced by ``value``."""

    node: fx.Node
    cache: fx.Node
    places: tuple[Place, ...]  # the cache's axes in front of the lanes; one for its rows in all
    value: fx.Node
    home: fx.Node  # the copy_ that brings the final version home


def written(graph: fx.Graph) -> Iterator[Write]:
    """The writes whose base is a graph input and whose result goes home at once."""
    for home in graph.nodes:
        if home.op == "call_function" and home.target is aten.copy_.default:
            cache, node = home.args[:2]
            if isinstance(node, fx.Node) and cache.op in ("placeholder", "get_attr"):
                found = _write(node, cache, home)
                if found is not None:
                    yield found


def written_twice(graph: fx.Graph) -> Iterator[tuple[Write, Write]]:
    """Pairs of writes to slices, one on top of the other, that go home together."""
    for home in graph.nodes:
        if home.op != "call_function" or home.target is not aten.copy_.default:
            continue
        cache, node = home.args[:2]
        before = node.args[0] if isinstance(node, fx.Node) and node.args else None
        if cache.op not in ("placeholder", "get_attr") or not isinstance(before, fx.Node):
            continue
        if {node.target, before.target} != {aten.slice_scatter.default}:
            continue
        first, second = _write(before, cache, home), _write(node, before, home)
        if first is not None and second is not None:
            yield first, replace(second, cache=cache)


def _write(node: fx.Node, cache: fx.Node, home: fx.Node) -> Write | None:
    """The write that made this version of the cache, if it is one that rows describe."""
    made, base = (node, cache) if node.target not in SHAPES else (node.args[0], _flat(node, cache))
    if base is None:
        return None
    whole = tuple(Place(along=k) for k in range(len(shape_of(base)) - 1))
    try:
        read = _read(made, base, whole)
    except Opaque:
        return None
    if read is None:
        return None
    places, value = read
    if len(shape_of(value)) < 1 or shape_of(value)[-1] != shape_of(cache)[-1]:
        return None
    if len(places) == 3 and shape_of(cache)[1] == 1 and places[1].index is None:
        places = (places[0], places[2])  # the one head of [P, 1, N, D]
    return Write(node, cache, places, value, home)


def rows_of(cache: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """``[N, D]`` or ``[P, N, D]``: the shape of a cache, without an axis for its one head."""
    lead, *rest = cache.meta["val"].shape
    return (lead, *rest[1:]) if len(rest) == 3 and shape_of(cache)[1] == 1 else (lead, *rest)


def _flat(node: fx.Node, cache: fx.Node) -> fx.Node | None:
    """The ``[P · N, D]`` view of a ``[P, N, D]`` cache whose new version ``node`` shows."""
    base = node.args[0].args[0] if node.args[0].args else None
    if not isinstance(base, fx.Node) or base.target not in SHAPES or base.args[0] is not cache:
        return None
    (*lead, lanes), found = shape_of(cache), shape_of(base)
    return base if len(lead) == 2 and found == (maps.product(lead), lanes) else None


def _read(node: fx.Node, base: fx.Node, whole: tuple[Place, ...]) -> tuple | None:
    """(places, value) of a node that is ``base`` with some rows replaced."""
    if node.target is aten.index_put.default or node.target is aten._unsafe_index_put.default:
        return _index_put(node, base)
    if node.target is aten.index_copy.default:
        target, axis, index, value = node.args
        axis %= len(whole) + 1
        if not _alike(target, base) or axis == len(whole):
            return None
        places = list(whole)
        places[axis] = Place(index=index, axes=(axis,))
        return tuple(places), value
    if node.target is aten.scatter.src:
        return _scatter(node, base, whole)
    if node.target is aten.copy.default and _alike(node.args[0], base):
        return whole, node.args[1]
    if node.target is aten.slice_scatter.default:
        return _slice(node, base, whole)
    if node.target is aten.select_scatter.default:
        return _select(node, base, whole)
    return None


def _index_put(node: fx.Node, base: fx.Node) -> tuple | None:
    target, indices, value = node.args[:3]
    accumulate = argument(node, 3, "accumulate", False)
    if not _alike(target, base) or accumulate or len(indices) > len(shape_of(base)) - 1:
        return None
    indices = [*indices, *[None] * (len(shape_of(base)) - 1 - len(indices))]
    held = [k for k, i in enumerate(indices) if i is not None]
    if not held or held[-1] - held[0] + 1 != len(held):
        return None
    tensors = [indices[k] for k in held]
    if any(t.meta["val"].dtype not in rules.INTEGERS for t in tensors):
        return None
    rank = max(len(shape_of(t)) for t in tensors)
    first = held[0]
    places = []
    for k, i in enumerate(indices):
        if i is not None:
            own = len(shape_of(i))
            axes = tuple(
                None if n == 1 else first + rank - own + j for j, n in enumerate(shape_of(i))
            )
            places.append(Place(index=i, axes=axes))
        elif shape_of(base)[k] == 1:  # an assignment drops the value's leading axes of one
            places.append(Place())
        else:
            places.append(Place(along=k if k < first else k - len(held) + rank))
    # A value of lower rank is broadcast; along axes of one place that is no repetition.
    missing = len(indices) - len(held) + rank + 1 - len(shape_of(value))
    named = [a for p in places for a in (*p.axes, p.along) if a is not None]
    if missing < 0 or any(a < missing for a in named):
        return None
    return tuple(_shifted(p, missing) for p in places), value


def _scatter(node: fx.Node, base: fx.Node, whole: tuple[Place, ...]) -> tuple | None:
    """A scatter of whole rows: its index is one number per row, expanded over the lanes."""
    target, axis, index, value = node.args
    axis %= len(whole) + 1
    rows = index.args[0] if index.target is aten.expand.default else None
    if not _alike(target, base) or axis == len(whole) or rows is None:
        return None
    shape = shape_of(rows)
    if shape[-1] != 1 or shape_of(index) != shape_of(value) or len(shape) != len(whole) + 1:
        return None
    axes = tuple(None if n == 1 else k for k, n in enumerate(shape))
    places = list(whole)
    places[axis] = Place(index=rows, axes=axes)
    return tuple(places), value


def _shifted(place: Place, by: int) -> Place:
    axes = tuple(None if a is None else a - by for a in place.axes)
    return replace(place, axes=axes, along=None if place.along is None else place.along - by)


def _slice(node: fx.Node, base: fx.Node, whole: tuple[Place, ...]) -> tuple | None:
    target, source = node.args[:2]
    axis = argument(node, 2, "dim", 0) % (len(whole) + 1)
    given, step = argument(node, 3, "start", None), argument(node, 5, "step", 1)
    fixed = not isinstance(given, fx.Node)
    start = slice_range(node, 2, shape_of(base)[axis])[0] if fixed else given
    if not _alike(target, base) or step != 1 or axis == len(whole):
        return None
    inner = _viewed(source, base, aten.slice.Tensor)
    places, value = (inner and _read(source, inner, whole)) or (whole, source)
    place = places[axis]
    if place.index is not None or place.start != 0:
        return (places, value) if fixed and start == 0 else None
    moved = replace(place, start=start)
    return (*places[:axis], moved, *places[axis + 1 :]), value


def _select(node: fx.Node, base: fx.Node, whole: tuple[Place, ...]) -> tuple | None:
    target, source, axis, at = node.args
    axis %= len(whole) + 1
    if not _alike(target, base) or axis == len(whole):
        return None
    length = shape_of(base)[axis]
    if isinstance(at, int) and at < 0 and isinstance(length, int):
        at += length
    fewer = tuple(Place(along=k) for k in range(len(whole) - 1))
    inner = _viewed(source, base, aten.select.int)
    places, value = (inner and _read(source, inner, fewer)) or (fewer, source)
    return (*places[:axis], Place(start=at), *places[axis:]), value


def _viewed(source: fx.Node, base: fx.Node, view: object) -> fx.Node | None:
    """The view of base that source is a new version of."""
    inner = source.args[0] if source.args and isinstance(source.args[0], fx.Node) else None
    if inner is not None and inner.target is view and _alike(inner.args[0], base):
        return inner
    return None


def _alike(a: object, b: object) -> bool:
    """The same node, or two nodes that view the same in the same way."""
    if a is b:
        return True
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a.op != "call_function":
        return False
    same = a.target is b.target and len(a.args) == len(b.args) and a.kwargs == b.kwargs
    return same and all(
        _alike(x, y) if isinstance(x, fx.Node) else x == y
        for x, y in zip(a.args, b.args, strict=True)
    )
