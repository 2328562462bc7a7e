"""Unification of a reference's term with a graph's terms.

A pattern is a traced reference (``trace.py``) whose placeholders are *holes* and whose sentinel
constants are scalars to capture. Its axes are (rows, lanes): everything in front of the last axis
of a graph's value counts as rows. A hole binds to a node that holds the wanted values: its lanes
must be read exactly as the reference reads them, its leading axes must each be one of the root's
leading coordinates or have size one. Those become strides and broadcasts of the kernel's
arguments, so views and transposes of the rows never stand in the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx

from dsv4fuse import maps, rules
from dsv4fuse.lower import Lowering
from dsv4fuse.maps import ZERO, Index, Map, Size
from dsv4fuse.terms import COMMUTATIVE, Complex, Term, short, show

Rows = tuple[int | None, ...]


@dataclass(frozen=True)
class Bound:
    """What a hole stands for: a node's value, its leading axes named by the root's coordinates."""

    node: fx.Node
    rows: Rows  # per leading axis of the node: the root's axis, None for an axis of size one
    part: str = ""  # "re" or "im" of a complex node
    laned: bool = True  # the last axis of the node (of a hole [rows, W, lanes] two) holds lanes

    @property
    def straight(self) -> bool:
        """Are its leading axes the root's, each in its place?"""
        return all(r in (None, axis) for axis, r in enumerate(self.rows))


@dataclass(frozen=True)
class Hole:
    """A placeholder of a reference: ``[rows, (W,) lanes]``, ``[rows, 1]`` or ``[lanes]``.

    ``wide`` holes (weights, cos, sin) may bind behind an exact widening cast.
    """

    name: str
    shape: tuple[Size, ...]
    wide: bool = False


@dataclass(frozen=True)
class Pattern:
    """A traced reference."""

    name: str
    root: Term
    lowering: Lowering
    holes: Mapping[fx.Node, Hole]
    scalars: Mapping[float, str]
    lanes: int  # how many trailing axes of the root are lanes
    sizes: tuple[tuple[Size, Size], ...] = ()  # symbols of its terms, and what they are here

    def size(self, n: Size) -> Size:
        """A size of the reference as one of the graph."""
        return n if isinstance(n, int) else n.subs(self.sizes)


@dataclass(frozen=True)
class Env:
    """What is bound on the way; extended, never changed."""

    holes: Mapping[str, Bound] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    score: int = 0
    loose: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Miss:
    """The longest partial match of a pattern at a root, and what stopped it."""

    score: int
    path: str
    wanted: str
    found: str
    node: fx.Node | None


@dataclass(frozen=True)
class Space:
    """Where coordinates lie: the graph's axis for each lane axis of the reference, and the root's
    axis for each leading axis of the graph's value, whose axes have these lengths."""

    lanes: Mapping[int, int]
    rows: Mapping[int, int | None]
    lengths: tuple[Size, ...]


class Unifier:
    """One attempt of one pattern at one node."""

    def __init__(self, pattern: Pattern, low: Lowering, node: fx.Node) -> None:
        self.pattern, self.low, self.node = pattern, low, node
        self.miss = Miss(-1, "", "", "", node)

    def run(self) -> Env | None:
        root = self.low.term(self.node)
        lengths = maps.sizes_of(self.node.meta["val"])
        lead = len(lengths) - self.pattern.lanes
        if isinstance(root, Complex) or lead < 0:
            return None
        lanes = {1 + i: lead + i for i in range(self.pattern.lanes)}
        space = Space(lanes, {k: k for k in range(lead)}, lengths)
        return next(self._unify(self.pattern.root, root, space, Env(), "", self.node), None)

    # ---- terms -----------------------------------------------------------------------------

    def _unify(
        self, p: Term, g: Term, space: Space, env: Env, path: str, near: fx.Node
    ) -> Iterator[Env]:
        origins = self.low.origins.get(g)
        near = origins[0][0] if origins else near
        if p.op == "load":
            yield from self._bind(p, g, space, env, path, near)
            return
        if p.op == "const":
            yield from self._scalar(p, g, env, path, near)
            return
        if p.op != g.op or p.dtype != g.dtype:
            self._missed(env, path, p, g, near)
            return
        env = self._step(env, g)
        path = f"{path}/{p.op}"
        if p.op == "fold":
            yield from self._fold(p, g, space, env, path, near)
            return
        if p.op in ("cat", "lace"):
            along = space.lanes.get(p.args[0])
            sizes = tuple(map(self.pattern.size, p.args[1])) if p.op == "cat" else p.args[1]
            if sizes != g.args[1] or len(p.args) != len(g.args) or g.args[0] != along:
                self._missed(env, path, p, g, near)
                return
            p_args, g_args = p.args[2:], g.args[2:]
        else:
            p_args, g_args = p.args, g.args
        orders = [g_args]
        if p.op in COMMUTATIVE and g_args[0] is not g_args[1]:
            orders.append(g_args[::-1])
        for order in orders:
            yield from self._all(p_args, order, space, env, path, near)

    def _all(
        self, ps: tuple[Term, ...], gs: tuple[Term, ...], space: Space, env: Env, path: str,
        near: fx.Node,
    ) -> Iterator[Env]:  # fmt: skip
        if len(ps) != len(gs):
            return
        if not ps:
            yield env
            return
        for first in self._unify(ps[0], gs[0], space, env, path, near):
            yield from self._all(ps[1:], gs[1:], space, first, path, near)

    def _step(self, env: Env, g: Term) -> Env:
        loose = self.low.loose.get(g)
        names = env.loose | {loose} if loose else env.loose
        return Env(env.holes, env.scalars, env.score + 1, names)

    def _fold(
        self, p: Term, g: Term, space: Space, env: Env, path: str, near: fx.Node
    ) -> Iterator[Env]:
        """A reduction over lanes; the other axes of its operand are read through its map."""
        how, p_body, p_axes, p_shape, p_map = p.args
        g_how, g_body, g_axes, g_shape, g_map = g.args
        lead = len(g_map) - len(p_map) + 1
        rows = {k: self._row(i, space) for k, i in enumerate(g_map[: max(lead, 0)])}
        fits = (
            how == g_how
            and lead >= 0
            and tuple(a - 1 + lead for a in p_axes) == g_axes
            and tuple(map(self.pattern.size, p_shape[1:])) == g_shape[lead:]
            and -1 not in rows.values()
            and all(
                self._same_lanes(i, j, space)
                for i, j in zip(p_map[1:], g_map[lead:], strict=True)
            )
        )
        if not fits:
            self._missed(env, path, p, g, near)
            return
        lanes = {k: k - 1 + lead for k in range(1, len(p_map))}
        yield from self._unify(p_body, g_body, Space(lanes, rows, g_shape), env, path, near)

    @staticmethod
    def _row(i: Index, space: Space) -> int | None:
        """The root's axis behind a leading index; None for a unit axis, -1 for anything else."""
        if i == ZERO:
            return None
        whole = i.whole() if maps.within((i,), space.lengths) else None
        return -1 if whole is None else space.rows.get(whole, -1)

    # ---- leaves ----------------------------------------------------------------------------

    def _scalar(self, p: Term, g: Term, env: Env, path: str, near: fx.Node) -> Iterator[Env]:
        if g.op != "const":
            self._missed(env, path, p, g, near)
            return
        value, wanted = g.args[0], p.args[0]
        name = self.pattern.scalars.get(abs(wanted))
        if name is None:
            if value == wanted:
                yield env
            else:
                self._missed(env, path, p, g, near)
            return
        value = value if wanted > 0 else -value
        if env.scalars.get(name, value) != value:
            self._missed(env, path, p, g, near)
            return
        yield Env(env.holes, {**env.scalars, name: value}, env.score + 1, env.loose)

    def _bind(
        self, p: Term, g: Term, space: Space, env: Env, path: str, near: fx.Node
    ) -> Iterator[Env]:
        hole = self.pattern.holes[p.args[0]]
        options = list(self._options(hole, p.args[1], g, space)) if self._typed(p, g, hole) else []
        seen = env.holes.get(hole.name)
        if seen is not None:
            options = [seen] if seen in options else []
        if not options:
            self._missed(env, f"{path}/{hole.name}", p, g, near)
        for bound in options:
            holes = {**env.holes, hole.name: bound}
            yield Env(holes, env.scalars, env.score + 1, env.loose)

    @staticmethod
    def _typed(p: Term, g: Term, hole: Hole) -> bool:
        return p.dtype == g.dtype or (hole.wide and rules.widens(g.dtype, p.dtype))

    def _options(self, hole: Hole, wanted: Map, g: Term, space: Space) -> Iterator[Bound]:
        """The nodes that hold g as the hole wants to read it, nearest to the inputs first."""
        if hole.wide and g.op == "cast" and rules.widens(g.args[0].dtype, g.dtype):
            yield from self._options(hole, wanted, g.args[0], space)
        for node, m, part in self.low.parts.get(g, []):
            bound = self._bound(hole, wanted, node, m, space, part)
            if bound:
                yield bound
        for node, m in self.low.origins.get(g, []):
            bound = self._bound(hole, wanted, node, m, space, "")
            if bound:
                yield bound

    def _bound(
        self, hole: Hole, wanted: Map, node: fx.Node, m: Map, space: Space, part: str
    ) -> Bound | None:
        shape = maps.sizes_of(node.meta["val"])
        count = max(len(hole.shape) - 1, 1)  # of lane axes
        if hole.shape[-1] == 1:  # one value a row: any axis may be the last
            laned = bool(shape) and shape[-1] == 1
            lead = m[:-1] if laned else m
        else:
            laned, lead = True, m[:-count]
            if shape[-count:] != hole.shape[-count:] or not all(
                self._same_lanes(i, j, space)
                for i, j in zip(wanted[-count:], m[-count:], strict=True)
            ):
                return None
        rows = tuple(self._row(i, space) for i in lead)
        if -1 in rows or not maps.whole_axes(lead, shape):
            return None
        if len(hole.shape) == 1 and any(r is not None for r in rows):
            return None
        return Bound(self.low.same.get(node, node), rows, part, laned)

    def _same_lanes(self, wanted: Index, found: Index, space: Space) -> bool:
        """A lane index of the reference, read at the graph's axes."""
        own = {a: a for a in space.lanes.values()}
        return maps.moved(wanted, space.lanes, self.pattern.size) == maps.moved(found, own)

    # ---- near misses -----------------------------------------------------------------------

    def _missed(self, env: Env, path: str, p: Term, g: Term, near: fx.Node) -> None:
        if env.score > self.miss.score:
            self.miss = Miss(env.score, path or "/", self._wanted(p), _found(p, g), near)

    def _wanted(self, p: Term) -> str:
        if p.op == "load":
            hole = self.pattern.holes[p.args[0]]
            return f"the same {hole.name} as before" if hole.name else "a tensor"
        if p.op == "const":
            return self.pattern.scalars.get(abs(p.args[0]), f"{p.args[0]:g}")
        return f"{p.op} in {short(p.dtype)}"


def _found(p: Term, g: Term) -> str:
    if g.op in ("load", "const"):
        return show(g)
    return f"{g.op} in {short(g.dtype)}" if p.op != g.op or p.dtype != g.dtype else show(g, 1)
