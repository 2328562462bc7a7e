"""From a functional ATen graph to terms: what each ATen operation means.

``Lowering.read(node, map)`` is the term of a node's value seen through an index map. Views change
the map and go on to their base, elementwise operations become terms of their operands, anything
else is a load. Results are remembered per (node, map), so a graph costs time linear in its size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dsv4fuse import maps, rules
from dsv4fuse.maps import ZERO, Map, Size
from dsv4fuse.terms import Complex, Interner, Term, straight

aten, prims = torch.ops.aten, torch.ops.prims

COMPARE = frozenset({"eq", "ne", "gt", "ge", "lt", "le"})
UNARY = (
    "neg abs exp exp2 log log1p log2 ceil floor round trunc sqrt rsqrt reciprocal sigmoid cos sin "
    "sign bitwise_not logical_not"
)
# One name per elementwise operation, torch's own; the operands are positional.
ELEMENTWISE: dict[Any, str] = {
    getattr(getattr(aten, packet), overload): name
    for name, spellings in {
        **{name: f"{name}.default" for name in UNARY.split()},
        **{name: f"{name}.Scalar {name}.Tensor" for name in sorted(COMPARE)},
        "add": "add.Tensor add.Scalar",
        "sub": "sub.Tensor sub.Scalar",
        "mul": "mul.Tensor mul.Scalar",
        "div": "div.Tensor div.Scalar",
        "maximum": "maximum.default clamp_min.default clamp_min.Tensor",
        "minimum": "minimum.default clamp_max.default clamp_max.Tensor",
        "remainder": "remainder.Scalar remainder.Tensor",
        "copysign": "copysign.Tensor",
        "bitwise_and": "bitwise_and.Tensor",
        "bitwise_or": "bitwise_or.Tensor",
        "logical_and": "logical_and.default",
        "logical_or": "logical_or.default",
        "where": "where.self",
    }.items()
    for packet, overload in (s.split(".") for s in spellings.split())
}
FOLDS = {aten.mean.dim: "mean", aten.sum.dim_IntList: "sum", aten.amax.default: "amax"}


class Opaque(Exception):
    """An operation, or a map through it, that terms do not express: it becomes a load."""


class Lowering:
    """The terms of one graph."""

    def __init__(
        self, interner: Interner | None = None, leaves: frozenset[fx.Node] = frozenset()
    ) -> None:
        self.interner = interner or Interner()
        self.leaves = leaves  # nodes to read as they are, whatever computes them
        self.origins: dict[Term, list[tuple[fx.Node, Map]]] = defaultdict(list)
        self.parts: dict[Term, list[tuple[fx.Node, Map, str]]] = defaultdict(list)
        # The first node that holds the same: of what an opaque op writes, each reader has a view.
        self.same: dict[fx.Node, fx.Node] = {}
        self.loose: dict[Term, str] = {}  # terms that an ulp rule made, with its name
        self._known: dict[tuple[fx.Node, Map], Term | Complex] = {}
        self._own: dict[fx.Node, Term | Complex] = {}

    def term(self, node: fx.Node) -> Term | Complex:
        """The node's value in its own coordinates."""
        known = self._own.get(node)
        if known is None:
            known = self._own[node] = self.read(node, straight(node))
        return known

    def read(self, node: fx.Node, m: Map) -> Term | Complex:
        known = self._known.get((node, m))
        if known is None:
            try:
                known = self._read(node, m)
            except Opaque:
                known = self._load(node, m)
            self._known[(node, m)] = known
            if isinstance(known, Term):
                self.origins[known].append((node, m))
            elif known.im.op != "neg":  # a conjugated tensor cannot be viewed as real
                self.parts[known.re].append((node, m, "re"))
                self.parts[known.im].append((node, m, "im"))
        return known

    def make(self, op: str, args: tuple[Any, ...], dtype: torch.dtype | None) -> Term:
        """An elementwise term in normal form."""
        for rule in rules.RULES:
            if op in rule.ops:
                simpler = rule.apply(args, dtype, self.make)
                if simpler is not None:
                    if rule.kind == "ulp":
                        self.loose[simpler] = rule.name
                    return simpler
        return self.interner.make(op, args, dtype)

    def _load(self, node: fx.Node, m: Map) -> Term | Complex:
        leaf = self.interner.load(node, m)
        if node.meta["val"].dtype.is_complex:
            wide = node.meta["val"].real.dtype
            return Complex(
                self.interner.make("re", (leaf,), wide), self.interner.make("im", (leaf,), wide)
            )
        return leaf

    def _read(self, node: fx.Node, m: Map) -> Term | Complex:
        if node.op != "call_function" or node in self.leaves:
            raise Opaque
        target = node.target
        if target in ELEMENTWISE:
            if node.meta["val"].dtype.is_complex:
                return self._complex(node, m)
            arity = 3 if ELEMENTWISE[target] == "where" else 2
            if len(node.args) > arity or node.kwargs.get("alpha", 1) != 1:
                raise Opaque  # x + alpha·y
            return self._spread(node, m, ELEMENTWISE[target], node.args)
        if target in FOLDS:
            return self.fold(node, m, FOLDS[target])
        handler = HANDLERS.get(target)  # filled by views.py
        if handler is None:
            raise Opaque
        return handler(self, node, m)

    # ---- elementwise -----------------------------------------------------------------------

    def _spread(self, node: fx.Node, m: Map, op: str, operands: Any) -> Term:
        """op over operands broadcast to the node, distributed into any pieces among them."""
        dtype = node.meta["val"].dtype
        terms = [self._operand(x, node, m) for x in operands]
        pieces = next((t for t in terms if t.op in ("cat", "lace")), None)
        if pieces is not None:
            return self._distribute(node, m, pieces)
        compute = self._common(operands) if op in COMPARE else dtype
        cast = [
            t if t.op == "const" or (op == "where" and i == 0) else self.make("cast", (t,), compute)
            for i, t in enumerate(terms)
        ]
        return self.make(op, tuple(cast), dtype)

    def _operand(self, x: Any, node: fx.Node, m: Map) -> Term:
        if not isinstance(x, fx.Node):
            return self.interner.const(x)
        value = x.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise Opaque  # a SymInt as an operand
        term = self.read(x, broadcast(m, maps.sizes_of(value)))
        if isinstance(term, Complex):
            raise Opaque
        return term

    @staticmethod
    def _common(operands: Any) -> torch.dtype:
        values = [x.meta["val"] for x in operands if isinstance(x, fx.Node)]
        dtype = values[0].dtype
        for v in values[1:]:
            dtype = torch.promote_types(dtype, v.dtype)
        return dtype

    def _distribute(self, node: fx.Node, m: Map, pieces: Term) -> Term:
        """The node read piece by piece, as ``pieces`` (one of its operands) is laid out."""
        if pieces.op == "cat":
            coord, sizes = pieces.args[:2]
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            return self.cat(node, m, coord, list(zip(starts, sizes, strict=True)))
        coord, size, *branches = pieces.args
        return self.lace(node, m, coord, len(branches), size)

    def _part(self, node: fx.Node, m: Map, coord: int, start: int, size: int, step: int) -> Term:
        narrowed = [maps.restrict(i, coord, start, size, step) for i in m]
        if any(i is None for i in narrowed):
            raise Opaque
        term = self.read(node, tuple(narrowed))  # type: ignore[arg-type]
        if isinstance(term, Complex):
            raise Opaque
        return term

    def cat(self, node: fx.Node, m: Map, coord: int, parts: list[tuple[int, int]]) -> Term:
        terms: list[Term] = []
        sizes: list[int] = []
        for start, size in parts:
            t = self._part(node, m, coord, start, size, 1)
            flat = t.op == "cat" and t.args[0] == coord  # cat of cat on one coordinate
            sizes += t.args[1] if flat else (size,)
            terms += t.args[2:] if flat else (t,)
        return self.interner.make("cat", (coord, tuple(sizes), *terms), terms[0].dtype)

    def lace(self, node: fx.Node, m: Map, coord: int, ways: int, size: int) -> Term:
        terms = [self._part(node, m, coord, j, size, ways) for j in range(ways)]
        return self.interner.make("lace", (coord, size, *terms), terms[0].dtype)

    def _complex(self, node: fx.Node, m: Map) -> Complex:
        """Complex arithmetic written out; only what rotations use."""
        if node.target is not aten.mul.Tensor:
            raise Opaque
        a, b = (self._complex_operand(x, m) for x in node.args)
        d = a.re.dtype

        def mul(x: Term, y: Term) -> Term:
            return self.make("mul", (x, y), d)

        return Complex(
            self.make("sub", (mul(a.re, b.re), mul(a.im, b.im)), d),
            self.make("add", (mul(a.re, b.im), mul(a.im, b.re)), d),
        )

    def _complex_operand(self, x: Any, m: Map) -> Complex:
        if not isinstance(x, fx.Node):
            raise Opaque
        term = self.read(x, broadcast(m, maps.sizes_of(x.meta["val"])))
        if not isinstance(term, Complex):
            raise Opaque
        return term

    # ---- reductions ------------------------------------------------------------------------

    def fold(self, node: fx.Node, m: Map, how: str) -> Term:
        x = node.args[0]
        shape = maps.sizes_of(x.meta["val"])
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", [])
        axes = [axes] if isinstance(axes, int) else list(axes or [])
        reduced = tuple(sorted(a % len(shape) for a in axes)) or tuple(range(len(shape)))
        keep = bool(node.args[2]) if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        outer = iter(m)
        full = []
        for axis in range(len(shape)):
            if axis in reduced:
                full.append(ZERO)
                if keep:
                    next(outer)
            else:
                full.append(next(outer))
        dtype = x.meta["val"].dtype if how == "amax" else node.meta["val"].dtype
        if how == "sum" and len(reduced) == 1 and shape[reduced[0]] == 2:
            return self._sum_of_two(x, full, reduced[0], dtype)
        body = self.term(x)
        if isinstance(body, Complex):
            raise Opaque
        wide = node.kwargs.get("dtype")
        body = self.make("cast", (body,), wide) if wide is not None else body
        narrow = self._narrow(body) if how == "amax" else None
        if narrow is not None:
            inner = (how, narrow, reduced, shape, tuple(full))
            return self.make("cast", (self.interner.make("fold", inner, narrow.dtype),), dtype)
        return self.interner.make("fold", (how, body, reduced, shape, tuple(full)), dtype)

    def _narrow(self, t: Term) -> Term | None:
        """t without its widening, which commutes with choosing: of a cast, of |a cast|."""
        if t.op == "cast" and rules.widens(t.args[0].dtype, t.dtype):
            return t.args[0]
        inner = self._narrow(t.args[0]) if t.op == "abs" else None
        return None if inner is None else self.make("abs", (inner,), inner.dtype)

    def _sum_of_two(self, x: fx.Node, m: list[Any], axis: int, dtype: torch.dtype) -> Term:
        """A sum over an axis of two is one addition."""
        halves = []
        for k in (0, 1):
            term = self.read(x, (*m[:axis], maps.Index(k), *m[axis + 1 :]))
            if isinstance(term, Complex) or term.op in ("cat", "lace"):
                raise Opaque
            halves.append(term)
        return self.make("add", tuple(halves), dtype)


def broadcast(m: Map, shape: tuple[Size, ...]) -> Map:
    """m for an operand of a smaller or unit shape, aligned at the last axis."""
    tail = m[len(m) - len(shape) :]
    return tuple(ZERO if n == 1 else i for i, n in zip(tail, shape, strict=True))


Handler = Callable[[Lowering, fx.Node, Map], Term | Complex]
HANDLERS: dict[Any, Handler] = {}


def means(*targets: Any) -> Callable[[Handler], Handler]:
    """Register what an ATen operation means."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register
