"""One graph read as terms, and what atoms are found in it.

An atom is a small reference (``atoms``) in the ways in which it may appear (``specs``). Fusions
walk a ``Scene`` and chain the hits of their atoms.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from dsv4fuse import joins, maps, tables, trace, views
from dsv4fuse.lower import Lowering
from dsv4fuse.maps import Map, Size
from dsv4fuse.match import Bound, Env, Hole, Miss, Pattern, Rows, Unifier
from dsv4fuse.readers import is_tensor, needed, readers
from dsv4fuse.terms import Complex, Term, straight

assert views and joins and tables  # importing them registers what ATen operations mean


Found = TypeVar("Found")
NEAREST = 2  # of an atom's ways to appear at a node, how many are kept to explain a near miss


@dataclass(frozen=True)
class Spec:
    """One way an atom may appear: hole shapes and dtypes, captured scalars, fixed arguments."""

    holes: tuple[tuple[Hole, torch.dtype], ...]
    scalars: tuple[str, ...] = ()
    arguments: tuple[tuple[str, object], ...] = ()
    round_scalars: bool = True  # the captured scalars are numbers that bf16 holds


@dataclass(frozen=True)
class Atom:
    """A reference, the ways in which it may appear at a node, and operations it cannot lack."""

    name: str
    reference: Callable[..., Tensor]
    specs: Callable[[fx.Node, Term], Iterator[Spec]]
    needs: frozenset[str]


@dataclass(frozen=True)
class Hit:
    """An atom found at a node."""

    atom: Atom
    node: fx.Node
    env: Env
    arguments: Mapping[str, object]

    def __getattr__(self, name: str) -> Bound:
        try:
            return self.env.holes[name]
        except KeyError:
            raise AttributeError(name) from None

    def scalar(self, name: str) -> float:
        return self.env.scalars[name]


def once(find: Callable[[Scene], Found]) -> Callable[[Scene], Found]:
    """What several fusions look for in a scene is looked for once."""
    seen: WeakKeyDictionary[Scene, Found] = WeakKeyDictionary()

    @functools.wraps(find)
    def found(scene: Scene) -> Found:
        if scene not in seen:
            seen[scene] = find(scene)
        return seen[scene]

    return found


def _laid(t: Tensor) -> str:
    """Shape and strides, but for those of axes of one, which nothing reads."""
    pairs = zip(t.shape, t.stride(), strict=True)
    return str([(n, None if maps.as_size(n) == 1 else s) for n, s in pairs])


class Scene:
    """One graph read as terms, with what atoms found in it.

    ``leaves`` are read as tensors of their own: what is done to a value made of pieces is then one
    term, not the same steps on each piece.
    """

    def __init__(self, graph: fx.Graph, leaves: Iterable[fx.Node] = ()) -> None:
        self.graph = graph
        self.low = Lowering(leaves=frozenset(leaves))
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.nodes = [
            n
            for n in graph.nodes
            if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)
        ]
        self._hits: dict[tuple[str, fx.Node], Hit | None] = {}
        self._contents: dict[Term, frozenset[str | torch.dtype]] = {}
        self._able: dict[frozenset[str], list[fx.Node]] = {}
        self._outermost: dict[str, tuple[Hit, ...]] = {}
        self.misses: list[tuple[Atom, fx.Node, Pattern, Miss]] = []
        # In the graph's order no read goes deeper than one node: residual streams chain all layers.
        self._shown: dict[Term, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            term = self.low.term(node)
            if isinstance(term, Term):
                self.contents(term)
                self._shown[term].append(node)
                earlier = next(self.alike(node), node)
                self.low.same[node] = self.low.same.get(earlier, node)

    def hit(self, atom: Atom, node: fx.Node) -> Hit | None:
        """The atom at a node, in the first of its specs that fits."""
        key = (atom.name, node)
        if key not in self._hits:
            self._hits[key] = self._try(atom, node)
        return self._hits[key]

    def hits(self, atom: Atom) -> list[Hit]:
        found = (self.hit(atom, n) for n in self.able(atom))
        return [h for h in found if h is not None]

    def able(self, atom: Atom) -> list[fx.Node]:
        """The nodes whose values hold every operation that the atom cannot lack."""
        found = self._able.get(atom.needs)
        if found is None:
            terms = ((n, self.low.term(n)) for n in self.nodes)
            found = self._able[atom.needs] = [
                n for n, t in terms if isinstance(t, Term) and atom.needs <= self.contents(t)
            ]
        return found

    def _try(self, atom: Atom, node: fx.Node) -> Hit | None:
        root = self.low.term(node)
        if isinstance(root, Complex) or not atom.needs <= self.contents(root):
            return None
        missed: list[tuple[Atom, fx.Node, Pattern, Miss]] = []
        for spec in atom.specs(node, root):
            if not {dtype for _, dtype in spec.holes} <= self.contents(root):
                continue  # nothing in there could fill the hole, and each try costs a trace
            pattern = trace.pattern(
                atom.name, atom.reference, spec.holes, spec.scalars, spec.arguments,
                spec.round_scalars,
            )  # fmt: skip
            attempt = Unifier(pattern, self.low, node)
            env = attempt.run()
            if env is not None:
                return Hit(atom, node, env, dict(spec.arguments))
            missed.append((atom, node, pattern, attempt.miss))
        self.misses += sorted(missed, key=lambda m: -m[3].score)[:NEAREST]
        return None

    def contents(self, term: Term) -> frozenset[str | torch.dtype]:
        """The names of all operations in a term, and all dtypes."""
        known = self._contents.get(term)
        if known is None:
            inner = (self.contents(a) for a in term.args if isinstance(a, Term))
            known = self._contents[term] = frozenset((term.op, term.dtype)).union(*inner)
        return known

    def first(self, node: fx.Node) -> bool:
        """False for a node that only shows again what an earlier node holds."""
        return all(
            self.order[other] >= self.order[node] for other, _ in self.holders(node)
        )

    def alike(self, node: fx.Node) -> Iterator[fx.Node]:
        """Other nodes that hold the same value with the same strides."""
        term, value = self.low.term(node) if is_tensor(node) else None, node.meta.get("val")
        for other in self._shown.get(term, ()):  # type: ignore[arg-type]
            seen = other.meta["val"]
            if other is not node and seen.dtype == value.dtype and _laid(seen) == _laid(value):
                yield other

    def twins(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that compute this one's value once more, and do not leave the graph: there
        each is a tensor of its own."""
        return [
            twin
            for twin in self.alike(node)
            if twin not in self.region(node, ()) and node not in self.region(twin, ())
            if not any(u.op == "output" for n in (twin, *readers(twin)[1]) for u in n.users)
        ]

    def reshaped(self, node: fx.Node, base: fx.Node) -> bool:
        """Does node hold base's elements in the same row-major order, as a reshape does?"""
        whole = maps.reshape(straight(node), *(maps.sizes_of(n.meta["val"]) for n in (node, base)))
        return whole is not None and self.low.read(base, whole) is self.low.term(node)

    def reshapes(self, node: fx.Node) -> Iterator[fx.Node]:
        """The node, and those of which it is a reshape."""
        yield node
        mine = maps.sizes_of(node.meta["val"])
        for other, m in list(self.low.origins.get(self.low.term(node), [])):  # type: ignore[arg-type]
            whole = maps.sizes_of(other.meta["val"])
            if other is not node and m == maps.reshape(straight(node), mine, whole):
                yield other

    def region(self, root: fx.Node, leaves: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes between leaves (left out) and root (included) that its value is made of."""
        stop, seen, stack = set(leaves), set(), [root]
        while stack:
            node = stack.pop()
            if node not in seen and node not in stop and node.op == "call_function":
                seen.add(node)
                stack += joins.sources(node)
        return seen

    def outermost(self, atom: Atom) -> tuple[Hit, ...]:
        """The atom's hits that no later hit of it contains, in the graph's order."""
        if atom.name not in self._outermost:
            self._outermost[atom.name] = self._not_inside(atom)
        return self._outermost[atom.name]

    def _not_inside(self, atom: Atom) -> tuple[Hit, ...]:
        kept: list[Hit] = []
        inside: set[fx.Node] = set()
        for node in reversed(self.able(atom)):
            if node in inside or not self.first(node):
                continue
            hit = self.hit(atom, node)
            if hit is not None:
                kept.append(hit)
                # Its inputs may be read through nodes that hold the same: other views of a base.
                leaves = {b.node for b in hit.env.holes.values()}
                leaves.update(*(self.alike(n) for n in leaves))
                inside |= self.region(node, leaves - {node}) - {node}
        return tuple(kept[::-1])

    def placeable(self, inputs: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> bool:
        """Is there a place after all inputs, none of them made of an output, and before every
        reader of the outputs that stays?"""
        given, replaced = tuple(inputs), tuple(outputs)
        last = max((self.order[n] for n in given), default=-1)
        return not self._made_of(given, replaced) and all(
            self.order[user] > last or not needed(user, replaced)
            for n in replaced
            for user in readers(n)[0]
        )

    def _made_of(self, nodes: Iterable[fx.Node], sources: Collection[fx.Node]) -> bool:
        """Is one of the nodes a source, or computed from one?"""
        first = min(self.order[n] for n in sources)
        seen, stack = set[fx.Node](), list(nodes)
        while stack:
            node = stack.pop()
            if node in sources:
                return True
            if node not in seen and self.order[node] > first:
                seen.add(node)
                stack += node.all_input_nodes
        return False

    def live_without(self, node: fx.Node, writes: Iterable[fx.Node]) -> bool:
        """Would node still be needed if the given nodes were replaced by something else?"""
        without = tuple(writes)
        return any(needed(user, without) for user in joins.dependents(node))

    def places(self, term: Term, space: Sequence[Size]) -> tuple[tuple[fx.Node, Map], ...]:
        """The nodes that hold a term of a space whose axes are so long, and where; nearest to the
        graph's inputs first.

        What does not vary along an axis is held in other spaces too, which have another length of
        that axis, or none.
        """
        origins = self.low.origins.get(term, ())
        return tuple((node, m) for node, m in origins if maps.within(m, space))

    def holders(self, node: fx.Node) -> Iterator[tuple[fx.Node, Rows]]:
        """Nodes with the same lanes as this one, and their leading axes in this one's."""
        term, space = self.low.term(node), maps.sizes_of(node.meta["val"])
        if isinstance(term, Complex):
            return
        lane = len(space) - 1
        for other, m in self.places(term, space):
            if not m or m[-1].whole() != lane:
                continue
            lead = m[:-1]
            plain = all(i == maps.ZERO or i.whole() is not None for i in lead)
            if plain and maps.whole_axes(m, maps.sizes_of(other.meta["val"])):
                yield other, tuple(i.whole() for i in lead)
