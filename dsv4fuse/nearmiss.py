"""Why something that looks like a fusion is not one: the first operation that differs, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from dsv4fuse.match import Pattern
from dsv4fuse.scene import Atom, Scene
from dsv4fuse.terms import COMMUTATIVE, Complex, Term, short, show
from dsv4fuse.views import base_of

ALIKE = 0.6  # the part of a reference's operations that must be there to speak of a near miss


@dataclass(frozen=True)
class Difference:
    """Where a graph's term leaves a reference's."""

    path: str
    wanted: str
    found: str
    node: fx.Node


@dataclass(frozen=True)
class NearMiss:
    """An atom that a node almost is; ``alike`` is the share of operations that are there."""

    atom: Atom
    node: fx.Node
    alike: float
    difference: Difference

    @property
    def sentence(self) -> str:
        d = self.difference
        return (
            f"This is almost {self.atom.name} ({self.alike:.0%} of its operations): at {d.path} "
            f"it wants {d.wanted} and finds {d.found}."
        )


class _Alignment:
    """A tolerant walk of a reference's term beside a graph's."""

    def __init__(self, pattern: Pattern, scene: Scene) -> None:
        self.pattern, self.scene = pattern, scene
        self._known: dict[tuple[Term, Term], int] = {}

    def alike(self, p: Term, g: Term) -> int:
        """How many operations of p are at the same place in g."""
        key = (p, g)
        if key not in self._known:
            self._known[key] = 0  # terms are acyclic; this only marks the entry
            self._known[key] = self._alike(p, g)
        return self._known[key]

    def _alike(self, p: Term, g: Term) -> int:
        if p.op == "load":
            return 1
        if p.op == "const":
            captured = abs(p.args[0]) in self.pattern.scalars
            return int(g.op == "const" and (captured or g.args[0] == p.args[0]))
        if p.op != g.op:
            return 0
        return int(p.dtype == g.dtype) + sum(self.alike(a, b) for a, b in self.pairs(p, g))

    def pairs(self, p: Term, g: Term) -> list[tuple[Term, Term]]:
        ps, gs = ([a for a in t.args if isinstance(a, Term)] for t in (p, g))
        pairs = list(zip(ps, gs, strict=False))
        if p.op in COMMUTATIVE and len(gs) == 2:
            other = list(zip(ps, gs[::-1], strict=False))
            pairs = max(pairs, other, key=lambda ab: sum(self.alike(*x) for x in ab))
        return pairs

    def first(self, p: Term, g: Term, path: str, near: fx.Node) -> Difference | None:
        origins = self.scene.low.origins.get(g)
        if origins and origins[0][0].op == "call_function":
            near = origins[0][0]
        here = f"{path}/{p.op}" if p.op not in ("load", "const") else path or "/"
        if p.op == "load":
            return None
        if self._alike(p, g) == 0 or (p.op != "const" and p.dtype != g.dtype):
            return Difference(here, self._word(p, g), self._word(g, p), near)
        for a, b in self.pairs(p, g):
            found = self.first(a, b, here, near)
            if found is not None:
                return found
        return None

    def _word(self, t: Term, other: Term) -> str:
        if t.op == "const":
            name = self.pattern.scalars.get(abs(t.args[0]))
            return f"the scalar {name}" if name else show(t)
        if t.op == "load":
            return f"the tensor {show(t)}"
        return f"{t.op} in {short(t.dtype)}" if t.op == other.op else show(t, 1)

    def nodes(self, p: Term, g: Term) -> Iterable[fx.Node]:
        for node, _ in self.scene.low.origins.get(g, []):
            yield node
        if p.op == g.op:
            for a, b in self.pairs(p, g):
                yield from self.nodes(a, b)


def _called(node: fx.Node | None) -> fx.Node | None:
    """A node that a line of the user's stands behind, not a graph input."""
    return node if node is not None and node.op == "call_function" else None


def size(p: Term) -> int:
    """How many operations a reference has, counted as ``alike`` counts them."""
    return 1 + sum(size(a) for a in p.args if isinstance(a, Term))


def near_misses(scene: Scene, covered: set[fx.Node]) -> list[NearMiss]:
    """The places that resemble an atom most, outside of what the hits already explain."""
    found: list[tuple[NearMiss, set[fx.Node]]] = []
    hit = {node for (_, node), h in scene._hits.items() if h is not None}
    for atom, node, pattern, miss in scene.misses:
        root = scene.low.term(node)
        if node in covered or {node, base_of(node)} & hit or isinstance(root, Complex):
            continue
        alignment = _Alignment(pattern, scene)
        alike = alignment.alike(pattern.root, root) / size(pattern.root)
        if alike < ALIKE or not scene.first(node):
            continue
        where = alignment.first(pattern.root, root, "", node) or Difference(
            miss.path, miss.wanted, miss.found, _called(miss.node) or node
        )
        near = NearMiss(atom, node, alike, where)
        found.append((near, set(alignment.nodes(pattern.root, root))))
    kept: list[NearMiss] = []
    claimed: set[fx.Node] = set(covered)
    for near, nodes in sorted(found, key=lambda f: (-f[0].alike, -len(f[1]))):
        own = {n for n in nodes if n.op == "call_function"}
        if not own & claimed:
            kept.append(near)
            claimed |= own
    return sorted(kept, key=lambda n: scene.order[n.node])
