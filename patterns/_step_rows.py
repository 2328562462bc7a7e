"""A decode step's raw rows: written to the rings that a compressor then reads its windows from.

One launch does both where no program can read a row that another one writes. So the graph must
say that the requests' pages differ: that the page of batch row b is b, in the writes and in the
reads. What a program writes itself it takes from the step's rows, wherever these go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dsv4fuse import maps
from dsv4fuse.layout import arrange
from dsv4fuse.maps import ZERO
from dsv4fuse.match import Bound
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex, Term
from dsv4fuse.writes import Place, Write

from ._sources import narrowed
from ._windows import BATCH, ENTRY, Gathered, Windows

aten = torch.ops.aten


@dataclass(frozen=True)
class StepRows:
    """``new_kv`` and ``new_gate`` (+ ``bias[place]``), ``[B, S, C]``, go to rows ``at`` of each
    request's page."""

    kv: Write
    gate: Write
    new_kv: fx.Node
    new_gate: fx.Node
    bias: fx.Node | None
    place: fx.Node | None

    @property
    def at(self) -> Place:
        return self.kv.places[1]

    def nodes(self) -> dict[str, fx.Node]:
        """The op's tensors by name, the rings as the graph is given them."""
        at = self.at.index
        out = {"kv": self.kv.cache, "gate": self.gate.cache, "new_kv": self.new_kv,
               "new_gate": self.new_gate, "at": at}  # fmt: skip
        more = {"step_bias": self.bias, "place": self.place}
        return out | {n: t for n, t in more.items() if t is not None}  # type: ignore[return-value]

    def places(self) -> dict[fx.Node, tuple[int | torch.SymInt, int | None]]:
        """For each index tensor how many places it may name, as ``Candidate.places``."""
        axes = self.at.axes
        along = axes.index(ENTRY) if ENTRY in axes else None
        out = {self.at.index: (self.kv.cache.meta["val"].shape[1], along)}
        if self.bias is not None:
            out[self.place] = (self.bias.meta["val"].shape[0], None)
        return out  # type: ignore[return-value]

    def shown(self, at: Tensor) -> Tensor:
        """The tensor of rows as ``[B, S]``."""
        found = arrange(at, Bound(self.at.index, self.at.axes, "", False), (BATCH, ENTRY))
        return found.squeeze(-1).expand(self.new_kv.meta["val"].shape[:2])


def step_rows(
    scene: Scene, windows: Windows, sizes: tuple[maps.Size, maps.Size], writes: Iterable[Write]
) -> StepRows | None:
    """The writes of the step's rows to the rings that windows are read from, one for each of
    ``sizes`` (batches, entries), if one launch may do them."""
    rows, gates = windows.now.kv, windows.now.gate
    if not isinstance(rows, Gathered) or not isinstance(gates, Gathered) or rows.page is None:
        return None
    by_node = {w.node: w for w in writes}
    both = [w and _seated(scene, w, sizes) for w in map(by_node.get, (rows.node, gates.node))]
    if None in both:
        return None
    (kv, new_kv), (gate, new_gate) = both  # type: ignore[misc]
    if len(kv.places) != 2 or not _alike(scene, kv.places, gate.places):
        return None
    page, at = kv.places
    counted = page.along == BATCH and page.start == 0
    if page.index is not None:
        counted = _counts(scene, page.index, page.axes, sizes[0])
    if not counted or at.index is None:
        return None
    if not _counts(scene, rows.page.node, rows.page.rows, sizes[0]):
        return None
    return StepRows(kv, gate, new_kv, *_biased(scene, new_gate))


def _seated(
    scene: Scene, write: Write, sizes: tuple[maps.Size, maps.Size]
) -> tuple[Write, fx.Node] | None:
    """(the write, its places' axes named batch and entry; the node ``[B, S, C]`` of its rows)."""
    shape = (*sizes, maps.sizes_of(write.value.meta["val"])[-1])
    for node, rows in scene.holders(write.value):
        if maps.sizes_of(node.meta["val"]) == shape and node.meta["val"].stride(-1) == 1:
            seat: dict[int | None, int | None] = {r: k for k, r in enumerate(rows)} | {None: None}
            if all(a in seat for p in write.places for a in (*p.axes, p.along)):
                named = (replace(p, axes=tuple(seat[a] for a in p.axes), along=seat[p.along])
                         for p in write.places)  # fmt: skip
                return replace(write, places=tuple(named)), node
    return None


def _counts(
    scene: Scene, node: fx.Node, axes: tuple[int | None, ...], batch: maps.Size
) -> bool:
    """Is an index tensor the number of the batch row, as an ``arange`` is?"""
    term = scene.low.term(node)
    if isinstance(term, Complex) or term.op not in ("coord", "const"):
        return False
    if term.op == "const":
        return batch == 1 and term.args[0] == 0
    index = term.args[0]
    coords = [axes[d.coord] if s == 1 and d.whole else None for s, d in index.terms]
    return index.offset == 0 and coords == ([] if batch == 1 else [BATCH])


def _alike(scene: Scene, one: tuple[Place, ...], other: tuple[Place, ...]) -> bool:
    return len(one) == len(other) and all(
        _same(scene, a, b) for a, b in zip(one, other, strict=True)
    )


def _same(scene: Scene, a: Place, b: Place) -> bool:
    if a.index is None or b.index is None:
        return a == b
    return scene.low.term(a.index) is scene.low.term(b.index) and a.axes == b.axes


def _biased(scene: Scene, value: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """(rows, table, places) of rows with ``table[places]`` added in fp32, or the rows alone."""
    term = scene.low.term(value)
    if not isinstance(term, Complex) and term.op == "add" and term.dtype == torch.float32:
        for rows, bias in (term.args, term.args[::-1]):
            table, source = _looked_up(narrowed(bias), value), _held(scene, narrowed(rows), value)
            if table is not None and source is not None:
                return source, *table
    return value, None, None


def _looked_up(term: Term, value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(table, places) of ``table[places]``, a row for each token."""
    if term.op != "load" or term.args[0].target is not aten.index.Tensor:
        return None
    node, m = term.args
    table, indices = node.args
    shape = maps.sizes_of(value.meta["val"])
    fits = len(indices) == 1 and table.meta["val"].dim() == 2 and _whole(m, shape)
    fits = fits and maps.sizes_of(indices[0].meta["val"]) == shape[:-1]
    return (table, indices[0]) if fits and maps.sizes_of(node.meta["val"]) == shape else None


def _held(scene: Scene, term: Term, value: fx.Node) -> fx.Node | None:
    """A node that holds a term as value's own axes."""
    shape = maps.sizes_of(value.meta["val"])
    found = (n for n, m in scene.places(term, shape)
             if _whole(m, shape) and maps.sizes_of(n.meta["val"]) == shape)  # fmt: skip
    return next((n for n in found if n.meta["val"].stride(-1) == 1), None)


def _whole(m: maps.Map, shape: tuple[maps.Size, ...]) -> bool:
    """Does a map read each axis of a value of that shape along the axis itself?"""
    return len(m) == len(shape) and all(
        i.whole() == k or n == 1 and i == ZERO
        for k, (i, n) in enumerate(zip(m, shape, strict=True))
    )
