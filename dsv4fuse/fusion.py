"""What a fusion is made of: atoms hit in a graph, chained into candidates.

A fusion's file in ``patterns/`` holds a ``FUSION`` whose ``find`` walks a ``Scene`` (one graph read
as terms) and yields candidates: which nodes it would replace, which tensors it needs, and a plain
function that computes the replacement from those tensors through the fused op. That one function
is run on random inputs to verify the site, and traced to rewrite the graph.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, fx

from dsv4fuse import maps, trace, views
from dsv4fuse.lower import Lowering
from dsv4fuse.match import Bound, Env, Hole, Miss, Pattern, Rows, Unifier
from dsv4fuse.terms import Complex, Term, straight

assert views.means  # importing views registers what they mean


@dataclass(frozen=True)
class Spec:
    """One way an atom may appear: hole shapes and dtypes, captured scalars, fixed arguments."""

    holes: tuple[tuple[Hole, torch.dtype], ...]
    scalars: tuple[str, ...] = ()
    arguments: tuple[tuple[str, object], ...] = ()


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


@dataclass(frozen=True)
class Candidate:
    """A place where a fusion applies.

    ``call(*inputs)`` gets one tensor per node of ``inputs`` and returns one tensor per node of
    ``outputs``, equal in shape, dtype and stride; it mutates, in place, each input in ``caches``
    whose new version is the node at the same position in ``updates``. ``places`` says of an
    index input how many places it may name and the axis along which they differ (None: all).
    """

    fusion: str
    root: fx.Node
    inputs: tuple[fx.Node, ...]
    call: Callable[..., tuple[Tensor, ...]]
    outputs: tuple[fx.Node, ...]
    caches: tuple[fx.Node, ...] = ()
    updates: tuple[fx.Node, ...] = ()
    places: Mapping[fx.Node, tuple[int | torch.SymInt, int | None]] = field(default_factory=dict)
    unsupported: str | None = None
    loose: frozenset[str] = frozenset()
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, as far as fusions depend on them (DeepSeek-V4-Flash by default)."""

    heads: int = 64
    head_dim: int = 512
    rope_dim: int = 64
    groups: int = 8
    inter: int = 2048
    window: int = 128


@dataclass(frozen=True)
class Example:
    """A plain sequence, inputs for it, and the bytes it cannot avoid to move."""

    fn: Callable[..., object]
    inputs: tuple[Tensor, ...]
    moved: int


@dataclass(frozen=True)
class Fusion:
    """A registered fusion; ``name`` is the stem of its files in patterns/ and kernels/.

    ``example(tokens, sizes, device)`` is the sequence as people write it, for the benchmark.
    """

    name: str
    find: Callable[[Scene, str], list[Candidate]]
    atoms: tuple[Atom, ...]
    example: Callable[[int, Sizes, str], Example]


class Scene:
    """One graph read as terms, with what atoms found in it."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.low = Lowering()
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.nodes = [
            n
            for n in graph.nodes
            if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)
        ]
        self._hits: dict[tuple[str, fx.Node], Hit | None] = {}
        self._operations: dict[Term, frozenset[str]] = {}
        self.misses: list[tuple[Atom, fx.Node, Pattern, Miss]] = []

    def hit(self, atom: Atom, node: fx.Node) -> Hit | None:
        """The atom at a node, in the first of its specs that fits."""
        key = (atom.name, node)
        if key not in self._hits:
            self._hits[key] = self._try(atom, node)
        return self._hits[key]

    def hits(self, atom: Atom) -> list[Hit]:
        found = (self.hit(atom, n) for n in self.nodes)
        return [h for h in found if h is not None]

    def _try(self, atom: Atom, node: fx.Node) -> Hit | None:
        root = self.low.term(node)
        if isinstance(root, Complex) or not atom.needs <= self.operations(root):
            return None
        for spec in atom.specs(node, root):
            pattern = trace.pattern(
                atom.name, atom.reference, spec.holes, spec.scalars, spec.arguments
            )
            attempt = Unifier(pattern, self.low, node)
            env = attempt.run()
            if env is not None:
                return Hit(atom, node, env, dict(spec.arguments))
            self.misses.append((atom, node, pattern, attempt.miss))
        return None

    def operations(self, term: Term) -> frozenset[str]:
        """The names of all operations in a term."""
        known = self._operations.get(term)
        if known is None:
            inner = (self.operations(a) for a in term.args if isinstance(a, Term))
            known = self._operations[term] = frozenset((term.op,)).union(*inner)
        return known

    def first(self, node: fx.Node) -> bool:
        """False for a node that only shows again what an earlier node holds."""
        return all(
            self.order[other] >= self.order[node] for other, _ in self.holders(node)
        )

    def reshaped(self, node: fx.Node, base: fx.Node) -> bool:
        """Does node hold base's elements in the same row-major order, as a reshape does?"""
        whole = maps.reshape(straight(node), *(maps.sizes_of(n.meta["val"]) for n in (node, base)))
        return whole is not None and self.low.read(base, whole) is self.low.term(node)

    def region(self, root: fx.Node, leaves: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes between leaves (left out) and root (included)."""
        stop, seen, stack = set(leaves), set(), [root]
        while stack:
            node = stack.pop()
            if node not in seen and node not in stop and node.op == "call_function":
                seen.add(node)
                stack += node.all_input_nodes
        return seen

    def outermost(self, atom: Atom) -> list[Hit]:
        """The atom's hits that no later hit of it contains, in the graph's order."""
        kept: list[Hit] = []
        inside: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node in inside or not self.first(node):
                continue
            hit = self.hit(atom, node)
            if hit is not None:
                kept.append(hit)
                leaves = (b.node for b in hit.env.holes.values())
                inside |= self.region(node, leaves) - {node}
        return kept[::-1]

    def placeable(self, inputs: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> bool:
        """Is there a place after all inputs and before every reader of the outputs?"""
        last = max((self.order[n] for n in inputs), default=-1)
        return all(self.order[user] > last for n in outputs for user in n.users)

    def live_without(self, node: fx.Node, writes: Iterable[fx.Node]) -> bool:
        """Would node still be needed if the given nodes were replaced by something else?"""
        done, stack = set(writes), list(node.users)
        while stack:
            user = stack.pop()
            if user.op == "output" or user.target is torch.ops.aten.copy_.default:
                return True
            if user not in done:
                done.add(user)
                stack += user.users
        return False

    def holders(self, node: fx.Node) -> Iterator[tuple[fx.Node, Rows]]:
        """Nodes with the same lanes as this one, and their leading axes in this one's."""
        term = self.low.term(node)
        if isinstance(term, Complex):
            return
        lane = len(node.meta["val"].shape) - 1
        for other, m in self.low.origins.get(term, []):
            if not m or m[-1].whole() != lane:
                continue
            rows = tuple(None if i == maps.ZERO else i.whole() for i in m[:-1])
            shape = maps.sizes_of(other.meta["val"])
            exact = all(
                n == 1 if r is None else i != maps.ZERO
                for n, r, i in zip(shape, rows, m, strict=False)
            )
            if exact:
                yield other, rows


Order = tuple[int | None, ...]


def arrange(t: Tensor, bound: Bound, order: Order) -> Tensor:
    """A bound tensor as ``[*order, lanes]``: axes permuted, unit axes added; no data moves.

    ``order`` names the root's axes; one that the tensor lacks becomes an axis of size one.
    """
    if bound.part:
        t = torch.view_as_real(t)[..., 0 if bound.part == "re" else 1]
    if not bound.laned:
        t = t.unsqueeze(-1)
    rows = list(bound.rows)
    for axis in reversed([a for a, r in enumerate(rows) if r is None]):
        t = t.squeeze(axis)
        del rows[axis]
    present = [r for r in order if r is not None and r in rows]
    t = _permuted(t, [rows.index(r) for r in present])
    for axis, r in enumerate(order):
        if r is None or r not in rows:
            t = t.unsqueeze(axis)
    return t


def restore(t: Tensor, order: Order, rank: int) -> Tensor:
    """``arrange`` undone: ``[*order, lanes]`` as the root's own ``rank`` axes."""
    for axis in reversed([a for a, r in enumerate(order) if r is None]):
        t = t.squeeze(axis)
    held = [r for r in order if r is not None]
    axes = sorted(held)
    t = _permuted(t, [held.index(a) for a in axes])
    for axis in range(rank - 1):
        if axis not in axes:
            t = t.unsqueeze(axis)
    return t


def _permuted(t: Tensor, rows: list[int]) -> Tensor:
    return t if rows == sorted(rows) else t.permute(*rows, len(rows))


def head_order(x: Bound, cos: Bound, lone: str = "batch") -> Order | None:
    """Which of the root's axes are (batch, sequence[, heads]): heads share a rotation.

    Where batches share it too, an axis in front of the sequence is the batch and the next the
    heads; ``lone`` says which a single one is. None when there are more axes than that.
    """
    turned = [r for r in cos.rows if r is not None]
    places = {r: i for i, r in enumerate(x.rows) if r is not None}
    shared = [r for r in places if r not in turned]
    if any(r not in places for r in turned):
        return None
    first = min((places[t] for t in turned), default=-1)
    batch = [r for r in shared if places[r] < first]
    heads = [r for r in shared if r not in batch]
    if len(batch) == 2 and not heads or len(batch) == 1 and not heads and lone == "heads":
        heads = [batch.pop()]
    tokens = [*batch, *turned]
    if len(tokens) > 2 or len(heads) > 1:
        return None
    lead: Order = (None,) * (2 - len(tokens)) + tuple(sorted(tokens, key=lambda r: places[r]))
    return (*lead, *heads)


def undecided(fusion: str, hit: Hit) -> Candidate:
    """A hit whose leading axes no kernel takes."""
    return Candidate(
        fusion,
        hit.node,
        tuple(b.node for b in hit.env.holes.values()),
        lambda *_: (),
        (hit.node,),
        unsupported="Its leading axes are more than a batch, a sequence and heads.",
    )


def through(inner: Bound, outer: Bound) -> Bound:
    """``inner``, found at the node of ``outer``, with its axes named by outer's root."""
    rows = tuple(None if r is None else outer.rows[r] for r in inner.rows)
    return Bound(inner.node, rows, inner.part, inner.laned)


@cache
def registry() -> Mapping[str, Fusion]:
    """Every fusion in patterns/, by name."""
    import dsv4fuse.patterns as home

    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(home.__path__)):
        if not module.startswith("_"):
            fusion = importlib.import_module(f"dsv4fuse.patterns.{module}").FUSION
            found[fusion.name] = fusion
    return found
