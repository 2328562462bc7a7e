"""Terms: what a graph computes, without how it was spelled.

Every value of a functional ATen graph is read as a function of its own coordinates. Views vanish
into the index maps of loads (``maps``), casts and promotions become explicit, a concatenation or a
stack becomes ``cat`` / ``lace`` at the top with elementwise work distributed into its branches.
Terms are interned: equal means identical. The graph itself is never touched, and each term knows
the nodes (and the map through which they were read) that hold it: an extra user of an
intermediate is no obstacle, and an outcome is named in the user's own lines.

========  ====================  =====================================================
op        args                  meaning
========  ====================  =====================================================
load      (node, map)           element ``map`` of a node's value: a leaf
const     (value,)              a Python scalar
coord     (index,)              the number that an index of the coordinates is
cat       (coord, sizes, *t)    pieces along a coordinate, each in its own local one
lace      (coord, size, *t)     interleaved lanes: c reads branch c % n at c // n < size
fold      (how, term, axes,     a reduction (mean, sum, amax) of a term over axes of
          shape, map)           its own space of that shape, read through map
<name>    terms                 an elementwise operation, rounding to ``dtype``
========  ====================  =====================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dsv4fuse import maps
from dsv4fuse.maps import Map

COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})


@dataclass(frozen=True, eq=False)
class Term:
    """One interned value. Compare with ``is``."""

    op: str
    args: tuple[Any, ...]
    dtype: torch.dtype | None
    number: int

    def __repr__(self) -> str:
        return show(self)


@dataclass(frozen=True)
class Complex:
    """A complex value: two real terms."""

    re: Term
    im: Term


def show(t: Term, depth: int = 3) -> str:
    """A short rendering for people: operations to a depth, loads by the node's name."""
    if t.op == "load":
        return str(t.args[0])
    if t.op == "const":
        return f"{t.args[0]:g}"
    name = f"to {short(t.dtype)}" if t.op == "cast" else t.op
    if depth == 0:
        return f"{name}(…)"
    inner = ", ".join(show(a, depth - 1) for a in t.args if isinstance(a, Term))
    return f"{name}({inner})"


def short(dtype: torch.dtype | None) -> str:
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "e4m3"}
    full = str(dtype).removeprefix("torch.")
    return names.get(full, full)


class Interner:
    """Hash-consing: one Term per (op, args, dtype)."""

    def __init__(self) -> None:
        self._table: dict[tuple[Any, ...], Term] = {}

    def make(self, op: str, args: tuple[Any, ...], dtype: torch.dtype | None) -> Term:
        if op in COMMUTATIVE:
            args = tuple(sorted(args, key=lambda t: t.number))
        # -0.0 == 0.0, but x + 0.0 is not x where x is -0.0: numbers are one by their text.
        key = (op, repr(args) if op == "const" else args, dtype)
        found = self._table.get(key)
        if found is None:
            found = self._table[key] = Term(op, args, dtype, len(self._table))
        return found

    def const(self, value: float | int | bool) -> Term:
        return self.make("const", (float(value),), None)

    def load(self, node: fx.Node, m: Map) -> Term:
        return self.make("load", (node, m), node.meta["val"].dtype)


def straight(node: fx.Node) -> Map:
    """The map that reads a node's value at its own coordinates."""
    return maps.identity(maps.sizes_of(node.meta["val"]))
