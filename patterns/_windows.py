"""The rows that a compressor pools, as the fused op is given them: views or gathers of nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dsv4fuse import maps
from dsv4fuse.layout import arrange
from dsv4fuse.maps import Index, Map, Size
from dsv4fuse.match import Bound

aten = torch.ops.aten
BATCH, ENTRY, ROW, CHANNEL = range(4)  # the coordinates of boxes
JOINS = frozenset({aten.cat.default, aten.slice_scatter.default, aten.select_scatter.default})


@dataclass(frozen=True)
class Seen:
    """Values ``[B, N, W, D]`` read from a node: per axis of it an index of those coordinates."""

    node: fx.Node
    map: Map

    def shown(self, t: Tensor) -> Tensor:
        """The node's tensor as ``[B, N, W, D]``, axes of one where it does not have them."""
        held: list[int] = []
        axis = 0
        for index in self.map:
            if index.whole() is None and index.terms:
                digits = sorted(index.terms, key=lambda sd: -sd[0])
                sizes = [d.size for _, d in digits]
                t = t.narrow(axis, index.offset, math.prod(sizes)).unflatten(axis, sizes)
                held += [d.coord for _, d in digits]
                axis += len(sizes)
            elif index.terms:
                t = t.narrow(axis, 0, index.terms[0][1].size) if _counted(index) else t
                held.append(index.whole())
                axis += 1
            else:
                t = t.select(axis, index.offset)
        t = t.permute([held.index(c) for c in sorted(held)])
        for coord in range(4):
            t = t if coord in held else t.unsqueeze(coord)
        return t

    def part(self, t: Tensor, dim: int) -> Tensor:
        """What the op is given of the node's tensor, for entries of ``dim`` channels."""
        return self.shown(t)

    def over(self, extents: Mapping[int, Size]) -> bool:
        """Do the coordinates run through these extents, where it has them?"""
        digits = (d for i in self.map for _, d in i.terms)
        return all(d.extent == extents.get(d.coord, d.extent) for d in digits)

    @property
    def viewable(self) -> bool:
        """Do narrow, unflatten and permute express it, the channels in the last axis?"""
        if not self.map or self.node.target in JOINS:
            return False
        last = self.map[-1]
        dense = [(1, CHANNEL)] == [(stride, d.coord) for stride, d in last.terms]
        shape = maps.sizes_of(self.node.meta["val"])
        return dense and all(
            _counted(i) or (i.whole() is not None and i.terms[0][1].extent == n)
            for i, n in zip(self.map, shape, strict=True)
        )


def _counted(i: Index) -> bool:
    """Do whole digits count through a range, with no gap?"""
    fixed = all(isinstance(n, int) for stride, d in i.terms for n in (stride, d.size))
    if not fixed or not isinstance(i.offset, int):
        return False
    step = 1
    for stride, d in sorted(i.terms, key=lambda sd: sd[0]):
        if stride != step or not d.whole:
            return False
        step = stride * d.size
    return True


@dataclass(frozen=True)
class Gathered:
    """Rows of a cache ``[P, S, C]``: of position ``ends + first + row``, modulo ring if that is
    not 0, else not below 0."""

    node: fx.Node
    channel: int
    ends: Bound
    page: Bound | None
    first: int
    ring: int

    def part(self, t: Tensor, dim: int) -> Tensor:
        return t.narrow(-1, self.channel, dim)


@dataclass(frozen=True)
class Half:
    """The rows of each window that lie together; ``masked``: those of negative positions have no
    weight; ``narrow``: gate + bias is rounded to the gate's dtype."""

    kv: Seen | Gathered
    gate: Seen | Gathered
    bias: Seen | None = None
    narrow: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Windows:
    """What the op is given: ``before`` the rows in front, for ``shifted`` those of the entry
    before."""

    now: Half
    before: Half | None = None
    shifted: bool = False


def gathering(
    half: Half, given: Mapping[str, Tensor], width: int
) -> tuple[Tensor | None, Tensor | None, torch.Size | None]:
    """(ends, page, the two sizes ends have) of windows that are gathered."""
    rows = half.kv
    if not isinstance(rows, Gathered):
        return None, None, None
    last = rows.first + width - 1
    ends = _tokens(given["ends"], rows.ends)
    page = _tokens(given["page"], rows.page) if rows.page else None
    shape = ends.shape if page is None else torch.broadcast_shapes(ends.shape, page.shape)
    return (ends + last if last else ends), page, shape


def _tokens(t: Tensor, bound: Bound) -> Tensor:
    """A tensor ``[batch, entries]``, one where it has no such axis."""
    return arrange(t, bound, (0, 1)).squeeze(-1)
