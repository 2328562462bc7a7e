"""Where the rows of a compressor's windows come from.

A pooled operand ``[.., N, W, D]`` is read box by box (``Grid.box``: some entries, some rows)
through whatever built it: views of a projection, assignments into halves, concatenations, gathers
by index tensors, masks, a position bias. What the boxes have in common becomes views of the nodes
behind it; an operand that cannot be taken apart is read as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from dsv4fuse.patterns._windows import (
    BATCH,
    CHANNEL,
    ENTRY,
    ROW,
    Gathered,
    Half,
    Seen,
    Windows,
)
from torch import fx

from dsv4fuse import maps, rules
from dsv4fuse.lower import broadcast
from dsv4fuse.maps import ZERO, Digit, Index, Map, Size
from dsv4fuse.match import Bound
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex, Term

aten = torch.ops.aten
MINUS_INFINITY = float("-inf")
Range = tuple[int, Size]  # start, size
Nodes = Collection[fx.Node]


@dataclass(frozen=True)
class Parts:
    """What a gate is in a box: rows, what is added to them and where they are masked."""

    rows: Term
    bias: Term | None = None
    narrow: bool = False
    mask: tuple[Term, ...] | None = None  # no weight where the first is less than the second


@dataclass(frozen=True)
class Grid:
    """Coordinates of the pooled rows: B batches, N entries, W rows, D channels."""

    scene: Scene
    sizes: tuple[Size, Size, int, int]
    seats: tuple[int | None, int | None]  # the pooled node's axes that are batch and entry
    upcast: bool  # a widening cast of kv may be folded into the kernel

    def box(self, bound: Bound, entries: Range, rows: Range) -> Term | None:
        """An operand in some entries and rows, in coordinates that count from their starts."""
        term = self.scene.low.read(bound.node, self.map(bound, entries, rows))
        return None if isinstance(term, Complex) else term

    def map(self, bound: Bound, entries: Range, rows: Range) -> Map:
        index: dict[int | None, Index] = {
            self.seats[1]: _along(ENTRY, *entries),
            self.seats[0]: _along(BATCH, 0, self.sizes[0]),
            None: ZERO,
        }
        lead = [index[r] for r in bound.rows]
        lanes = (_along(ROW, *rows), _along(CHANNEL, 0, self.sizes[3]))
        return (*lead, *lanes)

    def places(self, *terms: Term) -> Iterator[Seen]:
        """The nodes that hold a term, nearest the graph's inputs first; of two terms, those that
        hold the first in entry 0 and the second in the entries behind it."""
        origins = self.scene.low.origins
        if len(terms) == 1 or terms[0] is terms[1]:
            yield from (Seen(node, m) for node, m in origins.get(terms[0], []))
            return
        for node, first in origins.get(terms[0], []):
            for other, rest in origins.get(terms[1], []):
                whole = [self._joined(i, j) for i, j in zip(first, rest, strict=False)]
                if node is other and None not in whole:
                    yield Seen(node, tuple(whole))  # type: ignore[arg-type]

    def _joined(self, first: Index, rest: Index) -> Index | None:
        """The index over all entries that is ``first`` in entry 0 and ``rest`` in those behind."""
        steps = [s for s, d in rest.terms if d.coord == ENTRY]
        others = tuple((s, d) for s, d in rest.terms if d.coord != ENTRY)
        if not steps:  # one entry behind the first, or the same for all
            step = rest.offset - first.offset
        else:
            step = steps[0]
        if len(steps) > 1 or first.terms != others or first.offset + step != rest.offset:
            return None
        if step == 0:
            return first
        return maps.index(first.offset, [*others, (step, _digit(ENTRY, self.sizes[1]))])

    # ---- halves ------------------------------------------------------------------------------

    def half(
        self, kv: Sequence[Term], gates: Sequence[Parts], entries: Size, beside: Nodes
    ) -> Half | None:
        """kv and gate of some rows: in ``entries``, or in entry 0 and in those behind it; of the
        nodes that hold them, one of ``beside`` if it can be."""
        gate, bias = gates[0], None
        if any((p.bias, p.narrow, p.mask) != (gate.bias, gate.narrow, gate.mask) for p in gates):
            return None
        if gate.bias is not None:
            bias = next((s for s in self.places(gate.bias) if s.viewable), None)
            if bias is None:
                return None
        rows = [self._rows(beside, entries, *t) for t in (kv, [p.rows for p in gates])]
        if None in rows or type(rows[0]) is not type(rows[1]):
            return None
        if isinstance(rows[0], Seen):
            fits = gate.mask is None
        else:
            a, b = rows
            fits = (a.ends, a.page, a.first, a.ring) == (b.ends, b.page, b.first, b.ring)
            fits = fits and (gate.mask is None or self._negative(gate.mask, a)) and bias is None
        return Half(*rows, bias, gate.narrow, gate.mask is not None) if fits else None

    def _rows(self, beside: Nodes, entries: Size, *terms: Term) -> Seen | Gathered | None:
        if any(t.op == "const" for t in terms):  # a number has no place of its own
            return None
        gathered = self._gathered(terms[0]) if len(terms) == 1 else None
        if gathered is not None:
            return gathered
        extents = {BATCH: self.sizes[0], ENTRY: entries}
        fit = [s for s in self.places(*terms) if s.viewable and s.over(extents)]
        return min(fit, key=lambda s: s.node not in beside, default=None)

    def _gathered(self, term: Term) -> Gathered | None:
        """A load of ``cache[page, position]``."""
        if term.op != "load" or term.args[0].target is not aten.index.Tensor:
            return None
        node, (*at, channel) = term.args
        cache, indices = node.args
        if len(indices) != 2 or None in indices or cache.meta["val"].dim() != 3:
            return None
        if [(1, CHANNEL)] != [(s, d.coord) for s, d in channel.terms]:
            return None
        page, row = (
            self.scene.low.read(i, broadcast(tuple(at), maps.sizes_of(i.meta["val"])))
            for i in indices
        )
        ring = 0
        if row.op == "remainder" and rules.number(row.args[1]) is not None:
            ring = int(row.args[1].args[0])
        elif row.op != "maximum" or 0.0 not in map(rules.number, row.args):
            return None
        position = next(a for a in row.args if rules.number(a) is None)
        found, pages = self._position(position), self._tokens(page)
        if found is None or pages is None or ring < 0:
            return None
        ends, first = found
        return Gathered(cache, channel.offset, ends, pages, first, ring)

    def _position(self, term: Term) -> tuple[Bound, int] | None:
        """(ends, first) of ``ends + first + row``."""
        base, index = _sum(term)
        rows = [(s, d.coord) for s, d in index.terms]
        ends = None if base is None else self._tokens(base)
        return (ends, index.offset) if ends is not None and rows == [(1, ROW)] else None

    def _tokens(self, term: Term) -> Bound | None:
        """A node with a value for each batch and entry."""
        for seen in self.places(term):
            rows = tuple(None if i == ZERO else i.whole() for i in seen.map)
            known = all(r in (BATCH, ENTRY, None) for r in rows)
            broken = any(r is None and i != ZERO for r, i in zip(rows, seen.map, strict=True))
            shape = maps.sizes_of(seen.node.meta["val"])
            if known and not broken and maps.whole_axes(seen.map, shape):
                return Bound(seen.node, rows, "", False)
        return None

    def _negative(self, mask: tuple[Term, ...], rows: Gathered) -> bool:
        """Does a mask say that the positions of the rows are below 0?"""
        position, bound = mask
        zero = rules.number(bound) == 0.0
        return zero and self._position(position) == (rows.ends, rows.first)


def _digit(coord: int, size: Size) -> Digit:
    return Digit(coord, 1, size, size)


def _along(coord: int, start: int, size: Size) -> Index:
    return maps.index(start, [(1, _digit(coord, size))])


def _sum(term: Term) -> tuple[Term | None, Index]:
    """An integer as one term plus a number that the coordinates give."""
    value = rules.number(term)
    if value is not None:
        return None, Index(int(value))
    if term.op == "coord":
        return None, term.args[0]
    if term.op == "neg" and rules.number(term.args[0]) is not None:
        return None, Index(-int(term.args[0].args[0]))
    if term.op == "add":
        (a, i), (b, j) = (_sum(t) for t in term.args)
        if a is None or b is None:
            return a or b, maps.index(i.offset + j.offset, [*i.terms, *j.terms])
    return term, ZERO


# ---- what stands around the rows -----------------------------------------------------------------


def _narrowed(t: Term) -> Term:
    """t before a cast that keeps every value."""
    kept = t.op == "cast" and rules.widens(t.args[0].dtype, t.dtype)
    return t.args[0] if kept else t


def gate_parts(t: Term) -> Iterator[Parts]:
    """A gate taken apart: ``where(mask, -inf, rows + bias)``, each part or not.

    In a box of one entry either summand may be the bias.
    """
    mask = None
    if t.op == "where":
        test, yes, no = t.args
        if test.op == "lt" and rules.number(yes) == MINUS_INFINITY:
            mask, t = test.args, no
        elif test.op == "ge" and rules.number(no) == MINUS_INFINITY:
            mask, t = test.args, yes
    t = _narrowed(t)
    for rows, bias in (t.args, t.args[::-1]) if t.op == "add" else ():
        rows, bias = _narrowed(rows), _narrowed(bias)
        wide = t.dtype == torch.float32
        if _same_everywhere(bias) and (wide or rows.dtype == bias.dtype == t.dtype):
            yield Parts(rows, bias, not wide, mask)
    yield Parts(t, mask=mask)


def _same_everywhere(t: Term) -> bool:
    """Is it a node's value, the same for all batches and entries?"""
    coords = {d.coord for i in t.args[1] for _, d in i.terms} if t.op == "load" else {BATCH}
    return not coords & {BATCH, ENTRY}


# ---- the whole -----------------------------------------------------------------------------------


def windows(grid: Grid, kv: Bound, gate: Bound) -> Windows:
    """The rows of every window: in one piece, in halves, or as the operands hold them."""
    entries, width = grid.sizes[1:3]

    def half(rows: Range, *ranges: Range, beside: Nodes = ()) -> Half | None:
        rows_of = [grid.box(kv, r, rows) for r in ranges]
        gates = [grid.box(gate, r, rows) for r in ranges]
        if None in rows_of or None in gates:
            return None
        values = [_narrowed(t) if grid.upcast else t for t in rows_of]
        ways = itertools.product(*map(gate_parts, gates))
        size = entries if len(ranges) > 1 else ranges[0][1]
        return next((h for way in ways if (h := grid.half(values, way, size, beside))), None)

    whole = half((0, width), (0, entries))
    if whole is not None and not whole.masked:
        return Windows(whole)
    if width % 2 == 0:
        size = width // 2
        split = ((0, 1), (1, entries - 1))
        before = half((0, size), (0, entries))
        first = [grid.box(b, (0, 1), (0, size)) for b in (kv, gate)]
        shifted = before is None and [t and rules.number(t) for t in first] == [0.0, MINUS_INFINITY]
        if shifted and entries != 1:
            before = half((0, size), (1, entries - 1))
        # Views of one tensor as two inputs would be random numbers of their own in the check.
        one = (before.kv.node, before.gate.node) if before is not None else ()
        entire = half((size, size), (0, entries), beside=one)
        now = entire or half((size, size), *split, beside=one)
        if now is not None and not now.masked:
            if before is not None and _together(now, before, size):
                return Windows(now, before, shifted)
            if shifted and entries == 1:
                return Windows(now)
    as_is = (Seen(b.node, grid.map(b, (0, entries), (0, width))) for b in (kv, gate))
    return Windows(Half(*as_is))


def _together(now: Half, before: Half, size: int) -> bool:
    """May one launch pool both halves?"""
    alike = now.narrow == before.narrow and (now.bias is None) == (before.bias is None)
    for a, b in ((now.kv, before.kv), (now.gate, before.gate)):
        if isinstance(a, Gathered) and isinstance(b, Gathered):
            same = (a.ends, a.page, a.ring, a.first) == (b.ends, b.page, b.ring, b.first + size)
            alike = alike and same and a.node is b.node
        else:
            alike = alike and isinstance(a, Seen) and isinstance(b, Seen)
    return alike
