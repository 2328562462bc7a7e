"""A grouped product read as rows of heads against weights: which axis is what, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsv4fuse import maps
from dsv4fuse.atoms import FP8
from dsv4fuse.contract import Contraction
from dsv4fuse.layout import Order
from dsv4fuse.maps import ZERO, Digit, Index, Map, Size
from dsv4fuse.rules import widens
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Term

F32 = torch.float32
Places = Iterable[tuple[fx.Node, Map]]


def _index(*terms: tuple[Size, int, Size, Size, Size]) -> Index:
    """Σ stride · digit, each (stride, coordinate, div, size, extent)."""
    return maps.index(0, [(stride, Digit(*digit)) for stride, *digit in terms])


@dataclass(frozen=True)
class Rows:
    """The turned heads ``[.., H, D]`` as rows of a product's output.

    ``lead`` are the output's axes for batch and sequence (one for both where they are merged,
    none where they are one token), ``group`` and ``column`` its other axes, which may be one.
    ``apart``: the sum runs through the heads of a lane, not through the lanes of a head (an einsum
    over two axes).
    """

    output: fx.Node
    lead: tuple[int, ...]
    group: int | None
    column: int
    groups: int
    per: int
    dim: int
    apart: bool = False

    @property
    def extent(self) -> Size:
        return maps.sizes_of(self.output.meta["val"])[self.column]

    @property
    def columns(self) -> Size:
        return self.extent // self.groups if self.group == self.column else self.extent

    @property
    def summed(self) -> int:
        return self.output.meta["val"].dim()

    @property
    def size(self) -> int:
        return self.per * self.dim

    def _groups(self, stride: Size) -> list[tuple[Size, int, Size, Size, Size]]:
        """The group's number, as a term of an index."""
        if self.group is None:
            return []
        merged = self.group == self.column
        div, extent = (self.columns, self.extent) if merged else (1, self.groups)
        return [(stride, self.group, div, self.groups, extent)]

    def head(self) -> Index:
        heads = 1 if self.apart else self.dim
        return _index(*self._groups(self.per), (1, self.summed, heads, self.per, self.size))

    def lanes(self, block: int = 1) -> Index:
        block_of = self.per * block if self.apart else block
        return _index((1, self.summed, block_of, self.dim // block, self.size))

    def _row(self, block: int) -> Index:
        """The place in a weight's row of K, in blocks."""
        if not self.apart:
            return _index((1, self.summed, block, self.size // block, self.size))
        return _index(
            (self.dim // block, self.summed, 1, self.per, self.size),
            (1, self.summed, self.per * block, self.dim // block, self.size),
        )

    def weight(self, rows: int = 1, lanes: int = 1) -> dict[str, tuple[Index, Size]]:
        """The axes of a tensor ``[G, N/rows, K/lanes]`` or ``[G·N/rows, ..]``, and extents."""
        n, k = self.columns, self.size
        column = (1, self.column, rows, n // rows, self.extent)
        return {
            "g": (_index(*self._groups(1)), self.groups),
            "n": (_index(column), n // rows),
            "k": (self._row(lanes), k // lanes),
            "gn": (_index(*self._groups(n // rows), column), self.groups * (n // rows)),
        }

    def shaped(self, out: Tensor, batch: int, length: int) -> Tensor:
        """``[T,G,N]`` with the output's own axes."""
        if len(self.lead) == 2:
            out = out.unflatten(0, (batch, length))
        elif not self.lead:
            out = out.squeeze(0)
        if self.group in (None, self.column):
            out = out.flatten(-2)
        axes = [a for a in dict.fromkeys((*self.lead, self.group, self.column)) if a is not None]
        out = out.permute([axes.index(a) for a in sorted(axes)])
        for axis in range(self.summed):
            if axis not in axes:
                out = out.unsqueeze(axis)
        return out

    def token_major(self, batch: int, length: int) -> bool | None:
        """Is the output dense as ``[T,G,N]`` (True), as ``[G,T,N]`` (False), or neither?"""
        val, tokens = self.output.meta["val"], batch * length
        dense = val.new_empty((tokens, self.groups, self.columns))
        grouped = val.new_empty((self.groups, tokens, self.columns)).transpose(0, 1)
        for answer, made in ((True, dense), (False, grouped)):
            strides = self.shaped(made, batch, length).stride()
            if all(
                statically_known_true(n == 1) or statically_known_true(a == b)
                for n, a, b in zip(val.shape, val.stride(), strides, strict=True)
            ):
                return answer
        return None


def rows_of(
    product: Contraction, m: Map, shape: tuple[Size, ...], order: Order, block: int = 1
) -> Rows | None:
    """How a product reads ``[.., H, D/block]`` through m; None where it is no row of groups."""
    batch, sequence, heads = order
    val, k = product.output.meta["val"], product.size
    dim = shape[-1] * block
    if heads is None or not all(isinstance(v, int) for v in (shape[heads], dim, k)) or k % dim:
        return None
    per = k // dim
    lead = _lead(m, [a for a in (batch, sequence) if a is not None], shape, val)
    if lead is None or shape[heads] % per:
        return None
    groups = shape[heads] // per
    rest = [a for a, n in enumerate(maps.sizes_of(val)) if a not in lead and n != 1]
    column = rest[-1] if rest else -1
    group = rest[0] if groups > 1 and rest else None
    if not rest or rest != sorted({a for a in (group, column) if a is not None}):
        return None
    if group == column and not maps.divides(groups, val.shape[column]):
        return None
    ways = (Rows(product.output, lead, group, column, groups, per, dim, apart)
            for apart in (False, True))  # fmt: skip
    return next((r for r in ways if (m[heads], m[-1]) == (r.head(), r.lanes(block))), None)


def _lead(m: Map, axes: list[int], shape: tuple[Size, ...], val: Tensor) -> tuple[int, ...] | None:
    """The output's axes behind the token axes of a value."""
    held = [a for a in axes if m[a] != ZERO]
    if not maps.whole_axes(tuple(m[a] for a in held), tuple(shape[a] for a in held)):
        merged = {t[1].coord for a in held for t in m[a].terms}
        if len(held) != 2 or len(merged) != 1:
            return None
        (c,) = merged
        b, s = (shape[a] for a in held)
        wanted = [_index((1, c, s, b, b * s)), _index((1, c, 1, s, b * s))]
        return (c,) if [m[a] for a in held] == wanted else None
    whole = tuple(m[a].whole() for a in held)
    return None if None in whole or len(set(whole)) != len(whole) else whole  # type: ignore


@dataclass(frozen=True)
class Seat:
    """A node that holds a weight (or its scales), and what each of its axes is."""

    node: fx.Node
    names: tuple[str, ...]  # "" for an axis of one

    def arrange(self, t: Tensor, groups: int) -> Tensor:
        """``[G, N, K]``."""
        for axis in reversed([a for a, name in enumerate(self.names) if not name]):
            t = t.squeeze(axis)
        names = [n for n in self.names if n]
        order = [n for n in ("g", "gn", "n", "k") if n in names]
        t = t.permute([names.index(n) for n in order])
        if "gn" in names:
            return t.unflatten(0, (groups, -1))
        return t if "g" in names else t.unsqueeze(0)


def seats(places: Places, wanted: Mapping[str, tuple[Index, Size]]) -> Iterator[Seat]:
    """The nodes whose axes are the wanted ones, each whole."""
    for node, m in places:
        names = []
        for i, extent in zip(m, maps.sizes_of(node.meta["val"]), strict=True):
            fits = (n for n, (index, size) in wanted.items() if i == index and extent == size)
            names.append("" if i == ZERO and extent == 1 else next(fits, "?"))
        held = {n for n in names if n}
        if len(held) == len([n for n in names if n]) and held in (
            {"g", "n", "k"}, {"gn", "k"}, {"n", "k"} if wanted["g"][0] == ZERO else {"gn", "k"}
        ):  # fmt: skip
            yield Seat(node, tuple(names))


@dataclass(frozen=True)
class Weight:
    """The other factor: wide, or e4m3 codes with the scales of their blocks.

    ``scaled``: code · scale stays fp32; otherwise the module rounds it to the activation's dtype.
    """

    values: Seat
    scales: Seat | None = None
    scaled: bool = False


def weights(scene: Scene, term: Term, rows: Rows, dtype: torch.dtype) -> Iterator[Weight]:
    """The ways to read a factor as weights of ``rows``: as e4m3 if it is that, as it stands."""
    wide = term.args[0] if term.op == "cast" and widens(dtype, term.dtype) else term
    rounded = term.op == "cast" and term.dtype == dtype and term.args[0].op == "mul"
    yield from _dequantised(scene, term.args[0] if rounded else term, rows, not rounded)
    if wide.dtype == dtype:
        yield from (Weight(s) for s in seats(scene.low.origins[wide], rows.weight()))


def _dequantised(scene: Scene, term: Term, rows: Rows, scaled: bool) -> Iterator[Weight]:
    if term.op != "mul" or term.dtype != F32:
        return
    for codes, scale in (term.args, term.args[::-1]):
        if codes.op != "cast" or codes.args[0].dtype != FP8 or scale.dtype != F32:
            continue
        values = next(seats(scene.low.origins[codes.args[0]], rows.weight()), None)
        if values is None:
            continue
        found = (
            seat
            for node, m in scene.low.origins[scale]
            for n, k in _blocks(node, rows)
            for seat in seats([(node, m)], rows.weight(n, k))
        )
        scales = next(found, None)
        if scales is not None:
            yield Weight(values, scales, scaled)


def _blocks(node: fx.Node, rows: Rows) -> Iterator[tuple[int, int]]:
    """The sizes that a scale's blocks may have, by its own: columns and lanes of a weight."""
    counts = {e for e in maps.sizes_of(node.meta["val"]) if isinstance(e, int) and e}
    columns = {rows.columns * g // e for e in counts for g in (1, rows.groups)}
    for n in sorted(c for c in columns if c and rows.columns % c == 0):
        for k in sorted(rows.size // e for e in counts):
            fits = k >= 16 and k & (k - 1) == 0  # what the kernels take
            if fits and rows.size % k == 0 and not (rows.apart and rows.dim % k):
                yield n, k
