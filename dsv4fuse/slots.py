"""Where a kernel writes a row of each token: a cache write seen from the value's producer.

Kernels address a cache ``[N, D]`` by ``slot`` and ``[P, N, D]`` by ``seq`` and ``slot``, each an
index tensor ``[batch, sequence]`` or a start from which it counts along the sequence (slot) or the
batch (seq).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dsv4fuse.layout import Order, arrange
from dsv4fuse.match import Bound
from dsv4fuse.scene import Scene
from dsv4fuse.writes import Place, Write

NAMES = ("slot", "seq")  # of a cache's leading axes, from the last to the first


@dataclass(frozen=True)
class Slots:
    """A write of a node's rows; ``places`` and ``order`` name the axes of that node."""

    write: Write
    places: tuple[Place, ...]
    order: Order

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
        shape = self.write.cache.meta["val"].shape
        for depth, place in enumerate(reversed(self.places)):
            if place.index is not None:
                own = self.order[1 - depth]
                counted = len(self.places) == 2 and own is not None and own in place.axes
                axis = place.axes.index(own) if counted else None
                out[place.index] = (shape[-2 - depth], axis)
        return out

    def arguments(self, given: dict[str, Tensor], tokens: torch.Size) -> dict[str, object]:
        """slot, seq and their starts as the fused ops take them; ``given`` holds ``nodes``."""
        out: dict[str, object] = {"slot": None, "seq": None, "wrap": True}
        for name, place in zip(NAMES, reversed(self.places), strict=False):
            if place.index is not None:
                bound = Bound(place.index, place.axes, "", False)
                index = arrange(given[name], bound, self.order)
                out[name] = index.squeeze(-1).expand(*tokens)
            else:
                out[f"{name}_start"] = given.get(f"{name}_start", place.start)
        return out


def slots(scene: Scene, root: fx.Node, order: Order, writes: list[Write]) -> Slots | None:
    """The write that takes root's rows, ``order`` being its (batch, sequence), if rows say it."""
    for write in writes:
        rows = dict(scene.holders(write.value)).get(root)
        if rows is None or write.value.meta["val"].dtype != write.cache.meta["val"].dtype:
            continue
        own = {v: axis for axis, v in enumerate(rows) if v is not None}
        places = tuple(_renamed(p, own) for p in write.places)
        seated = _seated(order, places) if len(places) in (1, 2) else None
        if seated is not None:
            return Slots(write, places, seated)
    return None


def _renamed(place: Place, own: dict[int, int]) -> Place:
    """A place with its axes named by the root instead of the written value."""
    axes = tuple(None if a is None else own.get(a) for a in place.axes)
    along = None if place.along is None else own.get(place.along, place.along)
    return replace(place, axes=axes, along=along)


def _seated(order: Order, places: tuple[Place, ...]) -> Order | None:
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
