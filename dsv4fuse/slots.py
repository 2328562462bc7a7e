"""Where a kernel writes a row of each token: a cache write seen from the value's producer.

Kernels address a cache ``[N, D]`` by ``slot`` and ``[P, N, D]`` (which may have an axis for its one
head behind P) by ``seq`` and ``slot``, each an index tensor ``[batch, sequence]`` or a start from
which it counts along the sequence (slot) or the batch (seq).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dsv4fuse import maps
from dsv4fuse.layout import Order, arrange
from dsv4fuse.maps import ZERO, Index, Size
from dsv4fuse.match import Bound
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex
from dsv4fuse.writes import Place, Write, rows_of

NAMES = ("slot", "seq")  # of a cache's leading axes, from the last to the first


@dataclass(frozen=True)
class Slots:
    """A write of a node's rows; ``places`` and ``order`` name the axes of that node."""

    write: Write
    places: tuple[Place, ...]
    order: Order
    spans: tuple[tuple[int, int], ...] = ()  # (first row, its slot) of each run of rows written

    @property
    def flat(self) -> bool:
        """Do the slots count through the cache's pages?"""
        return len(self.places) < len(rows_of(self.write.cache)) - 1

    def nodes(self) -> dict[str, fx.Node]:
        """The graph's nodes that say where: index tensors, symbolic starts."""
        out = {}
        for name, place in zip(NAMES, reversed(self.places), strict=False):
            if place.index is not None:
                out[name] = place.index
            elif isinstance(place.start, fx.Node):
                out[f"{name}_start"] = place.start
        return out

    def extents(self) -> dict[fx.Node, tuple[int | torch.SymInt, int | None]]:
        """For each index tensor: how many places it may name, and its axis along which they
        differ (None: all of its elements do)."""
        out = {}
        shape = rows_of(self.write.cache)
        if self.flat:
            shape = (shape[0] * shape[1], shape[2])
        for depth, place in enumerate(reversed(self.places)):
            if place.index is not None:
                own = self.order[1 - depth]
                counted = len(self.places) == 2 and own is not None and own in place.axes
                axis = place.axes.index(own) if counted else None
                out[place.index] = (shape[-2 - depth], axis)
        return out

    def arguments(self, given: dict[str, Tensor], tokens: torch.Size) -> dict[str, object]:
        """slot, seq and their starts as the fused ops take them; ``given`` holds ``nodes``."""
        out: dict[str, object] = {"slot": None, "seq": None, "wrap": True, "flat_slot": self.flat}
        for name, place in zip(NAMES, reversed(self.places), strict=False):
            if name == "slot" and self.spans:
                out |= {"slot": self._ring(given["cache"], tokens), "wrap": False}
            elif place.index is not None:
                bound = Bound(place.index, place.axes, "", False)
                index = arrange(given[name], bound, self.order)
                out[name] = index.squeeze(-1).expand(*tokens)
            else:
                out[f"{name}_start"] = given.get(f"{name}_start", place.start)
        return out


    def _ring(self, cache: Tensor, tokens: torch.Size) -> Tensor:
        """The slot of each row: consecutive within a span, none in front of the first."""
        row = torch.arange(tokens[1], device=cache.device)
        slot = torch.full_like(row, -1)
        for first, start in self.spans:
            slot = torch.where(row >= first, row + (start - first), slot)
        return slot.expand(*tokens)


def slots(scene: Scene, root: fx.Node, order: Order, writes: list[Write]) -> Slots | None:
    """The write that takes root's rows, ``order`` being its (batch, sequence), if rows say it."""
    for write in writes:
        rows = dict(scene.holders(write.value)).get(root)
        if rows is None or write.value.meta["val"].dtype != write.cache.meta["val"].dtype:
            continue
        own = {v: axis for axis, v in enumerate(rows) if v is not None}
        extents = maps.sizes_of(write.value.meta["val"])
        places = tuple(p for w in write.places if (p := _named(w, own, extents)))
        whole = len(places) == len(write.places) and len(places) in (1, 2)
        own_order = seated(order, places) if whole else None
        if own_order is not None:
            return Slots(write, places, own_order)
    return None


def ring(
    scene: Scene, root: fx.Node, order: Order, writes: tuple[Write, Write]
) -> Slots | None:
    """Two writes of root's last rows to two spans, as a prefill fills a ring."""
    batch, sequence = order
    length = None if sequence is None else root.meta["val"].shape[sequence]
    found = (_span(scene, root, sequence, w) for w in writes if isinstance(length, int))
    spans = sorted((s for s in found if s is not None), key=lambda s: s[:3])
    if len(spans) < 2:
        return None
    (at, start, n, place), (next_at, next_start, m, other) = spans
    apart = start + n <= next_start or next_start + m <= start
    whole = at + n == next_at and next_at + m == length
    seats = {p.along for p in (place, other) if p is not None}
    if place != other or not (apart and whole) or not seats <= {batch}:
        return None
    places = (*((place,) if place else ()), Place(start=start))
    return Slots(writes[1], places, order, ((at, start), (next_at, next_start)))


def _span(
    scene: Scene, root: fx.Node, sequence: int | None, write: Write
) -> tuple[int, int, int, Place | None] | None:
    """(first row, its slot, rows, the place along the batch) of a write of some of root's rows."""
    term, extents = scene.low.term(write.value), maps.sizes_of(write.value.meta["val"])
    held = () if isinstance(term, Complex) else scene.places(term, extents)
    m = next((m for node, m in held if node is root), None)
    if m is None or sequence is None or not 1 <= len(write.places) <= 2:
        return None
    *lead, place = write.places
    run, axes = m[sequence], [i.whole() for i in m]
    named = [_named(p, {v: k for k, v in enumerate(axes) if v is not None}, extents) for p in lead]
    rows = 1 if place.along is None else extents[place.along]
    moved = Index(0, run.terms).whole()
    fixed = [p for p in write.places if p.index is None and isinstance(p.start, int)]
    numbers = isinstance(run.offset, int) and isinstance(rows, int)
    shape = maps.sizes_of(root.meta["val"])
    rest = [k for k in range(len(m)) if k != sequence]
    broken = any(axes[k] is None and m[k] != ZERO for k in rest)
    if broken or not maps.whole_axes(tuple(m[k] for k in rest), tuple(shape[k] for k in rest)):
        return None
    follows = moved == place.along if run.terms else rows == 1
    if None in named or not follows or len(fixed) < len(write.places):
        return None
    if write.value.meta["val"].dtype != write.cache.meta["val"].dtype or not numbers:
        return None
    return run.offset, place.start, rows, named[0] if named else None


def _named(place: Place, axes: Mapping[int, int], extents: tuple[Size, ...]) -> Place | None:
    """A place with the written value's axes named by the root's; None where the root lacks one.
    Along an axis of one it is one row, whether the root has that axis or not."""
    one = {k for k, n in enumerate(extents) if n == 1}
    place = replace(place, along=None) if place.along in one else place
    place = replace(place, axes=tuple(None if a in one else a for a in place.axes))
    if not {place.along, *place.axes} <= {None, *axes}:
        return None  # the write repeats a row of the root
    rows = tuple(None if a is None else axes[a] for a in place.axes)
    return replace(place, axes=rows, along=None if place.along is None else axes[place.along])


def seated(order: Order, places: tuple[Place, ...]) -> Order | None:
    """The order in which a span along the cache's first axis is the batch, along its last the
    sequence; None when there is no such order."""
    batch, sequence = order
    spans = [p.along if p.index is None else None for p in places]
    if len(places) == 2 and spans[0] is not None and spans[0] == sequence and batch is None:
        batch, sequence = sequence, None
    fits = spans[-1] in (None, sequence) and (len(places) == 1 or spans[0] in (None, batch))
    seats = (batch, sequence)[-len(places) :]
    repeated = any(
        p.index is None and p.along is None and seat is not None
        for p, seat in zip(places, seats, strict=True)
    )
    return (batch, sequence) if fits and not repeated else None
