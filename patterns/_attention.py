"""What both attention fusions match: weights of a softmax with a sink, between two products.

The weights are an atom (``_sink_weights``); from the first product to the logits (scale, mask)
and from the weights to the output the chain is read here. Axes are named by the output's: batch,
sequence, heads, in any order, then D; keys lie along the coordinate that the second product sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dsv4fuse import maps, rules
from dsv4fuse.contract import Axes, Operand, Space, contraction
from dsv4fuse.scene import Hit, Scene, once
from dsv4fuse.terms import Complex, Term
from dsv4fuse.views import VIEWS

from ._sink_weights import F32, NARROW, WEIGHTS

aten, prims = torch.ops.aten, torch.ops.prims
CASTS = (prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype)
COPIES = (aten.clone.default, aten.contiguous.default)
SHOWS = VIEWS | {*CASTS, *COPIES, aten._unsafe_view.default}


# ---- from the products to the logits -----------------------------------------------------------
@dataclass(frozen=True)
class Named:
    """A node whose axes are the output's coordinates (None: of size one)."""

    node: fx.Node
    axes: Axes


@dataclass(frozen=True)
class Logits:
    """``mask(scale · left · right)`` in the coordinates of ``node``, and its roundings.

    ``mask``: kind, its places, the fill of a hidden key."""

    node: fx.Node
    left: Operand
    right: Operand
    scale: float = 1.0
    rounded: str = ""
    mask: tuple[str, Operand, float] | None = None


def logits(scene: Scene, node: fx.Node, t: Term, outer: str = "m") -> Logits | None:
    """What a term in the coordinates of a node is; ``outer``: what may be next, "m", "s" or ""."""
    if t.op == "cast":
        return logits(scene, node, t.args[0], outer) if _widens(t) else None
    found = contraction(scene, node, t)
    if found is not None:
        if found.rounded:
            return None
        left, right = (_narrow(scene, o.term, found.space) for o in (found.left, found.right))
        return Logits(node, left, right, rounded="p" * (t.dtype in NARROW))
    if t.op in ("mul", "div") and outer:
        for x, by in (t.args, t.args[::-1])[: 2 if t.op == "mul" else 1]:
            inner = logits(scene, node, x, "") if by.op == "const" and x.op != "const" else None
            if inner is not None:
                by = by.args[0] if t.op == "mul" else 1 / by.args[0]
                return replace(inner, scale=by, rounded=inner.rounded + "s" * (t.dtype in NARROW))
    if outer == "m" and t.op in ("add", "where"):
        return _masked(scene, node, t)
    return None


def _masked(scene: Scene, node: fx.Node, t: Term) -> Logits | None:
    if t.op == "add":
        a, b = t.args
        options = ((a, b, "add", 0.0), (b, a, "add", 0.0))
    else:
        seen, yes, no = t.args
        fills = [math.nan if x.op != "const" else x.args[0] for x in (yes, no)]
        options = ((no, seen, "hidden", fills[0]), (yes, seen, "allowed", fills[1]))
    for scores, mask, kind, fill in options:
        hides = kind == "add" or fill <= -1e4
        inner = logits(scene, node, scores, "s") if hides and scores.op != "const" else None
        if inner is not None and mask.op != "const":
            places = _narrow(scene, mask, maps.sizes_of(node.meta["val"]))
            rounded = inner.rounded + "m" * (kind == "add" and t.dtype in NARROW)
            return replace(inner, rounded=rounded, mask=(kind, places, fill))
    return None


def _widens(t: Term) -> bool:
    return t.op == "cast" and rules.widens(t.args[0].dtype, t.dtype)


def _narrow(scene: Scene, factor: Term, space: Space) -> Operand:
    """A factor of these coordinates without its exact widening."""
    inner = factor.args[0] if _widens(factor) else factor
    return Operand(inner, scene.places(inner, space))


# ---- a whole site ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Site:
    """One attention, every tensor named by the output's coordinates; keys by ``keys``."""

    weights: Hit
    root: fx.Node
    logits: Logits
    q: tuple[Named, ...]
    kv: tuple[Named, ...]
    held: tuple[Named, ...]  # every node that holds the keys or the values
    sink: Named
    mask: tuple[Named, ...]
    wide: bool

    @property
    def lane(self) -> int:
        return self.root.meta["val"].dim() - 1

    @property
    def keys(self) -> int:
        return self.lane + 1


@once
def sites(scene: Scene) -> tuple[Scene, list[Site]]:
    """Every attention with a sink in a graph, at the last node that is its output as it lies.

    Read anew with every cat but a sink's as a leaf: a mask that is one would take the scores, and
    all that is made of them, to pieces. The sites hold in the scene that is returned."""
    joined = (n for n in scene.nodes if n.target is aten.cat.default and not _adds_one(n))
    view = Scene(scene.graph, joined)
    found = _sites(view)
    scene.misses += view.misses
    return view, found


def _adds_one(cat: fx.Node) -> bool:
    """Does it put one more column behind others, of which a maximum is taken?"""
    last = cat.args[0][-1].meta["val"].shape  # type: ignore[union-attr, index]
    readers = [*cat.users, *(u for c in cat.users if c.target in CASTS for u in c.users)]
    maxima = (aten.amax.default, aten.max.dim)
    return bool(len(last)) and str(last[-1]) == "1" and any(u.target in maxima for u in readers)


def _sites(scene: Scene) -> list[Site]:
    found = []
    for hit in scene.outermost(WEIGHTS):
        term = scene.low.term(hit.s.node)
        read = None if isinstance(term, Complex) else logits(scene, hit.s.node, term)
        if read is None:
            continue
        options = (_site(scene, hit, read, root) for root in _roots(hit.node))
        site = next((s for s in options if s is not None), None)
        if site is not None:
            found.append(site)
    return found


def _roots(weights: fx.Node) -> Iterator[fx.Node]:
    """Nodes that show the product of the weights: the last copy of it first, then its views."""
    for product in _products(weights):
        chain = [product]
        while len(chain[-1].users) == 1:
            (user,) = chain[-1].users
            if user.target not in SHOWS or not isinstance(user.meta["val"], Tensor) or (
                user.target in CASTS and chain[-1].meta["val"].dtype != F32
            ):  # not the same value, or a second rounding
                break
            chain.append(user)
        copies = [n for n in chain if n.target in (*CASTS, *COPIES)]
        yield from copies[::-1]
        yield from (n for n in chain if n not in copies)


def _products(weights: fx.Node) -> Iterator[fx.Node]:
    seen, stack = set[fx.Node](), list(weights.users)
    while stack:
        user = stack.pop()
        if user.target in (aten.bmm.default, aten.mm.default):
            yield user
        elif user not in seen and user.target in SHOWS:
            seen.add(user)
            stack += user.users


def _site(scene: Scene, hit: Hit, read: Logits, root: fx.Node) -> Site | None:
    """The site with its output at root; None where an axis is not one of root's, unbroken."""
    term = scene.low.term(root)
    if isinstance(term, Complex):
        return None
    found = contraction(scene, root, term.args[0] if term.op == "cast" else term)
    if found is None or found.rounded:
        return None
    for side, other in ((found.left, found.right), (found.right, found.left)):
        side = side if side.at(hit.node) else _narrow(scene, side.term, found.space)
        named = next((axes for node, axes in side.whole() if node is hit.node), None)
        if named is None or named[-1] != found.summed:
            continue
        values = _narrow(scene, other.term, found.space).whole()
        site = _joined(scene, hit, read, root, named, tuple(Named(n, a) for n, a in values))
        if site is not None:
            return site
    return None


def _joined(
    scene: Scene, hit: Hit, read: Logits, root: fx.Node, named: Axes, values: tuple[Named, ...],
) -> Site | None:  # fmt: skip
    """``named``: the root's coordinate behind each axis of the weights."""
    keys, lane = root.meta["val"].dim(), root.meta["val"].dim() - 1
    inward = [*(None if r is None else named[r] for r in hit.s.rows), keys, lane]

    def outside(o: Operand) -> tuple[Named, ...]:
        return tuple(
            Named(n, tuple(None if a is None else inward[a] for a in axes)) for n, axes in o.whole()
        )

    q, k = outside(read.left), outside(read.right)
    q, k = (k, q) if any(keys in n.axes for n in q) else (q, k)
    same = {(n.axes, scene.low.term(n.node)) for n in k}  # perhaps two slices of one cache
    both = (v for v in values if (v.axes, scene.low.term(v.node)) in same)
    kv = tuple(v for v in both if {lane, keys} <= set(v.axes))
    q = tuple(n for n in q if lane in n.axes and keys not in n.axes)
    mask = () if read.mask is None else outside(read.mask[1])
    rows = (*hit.sink.rows, None) if hit.sink.laned else hit.sink.rows
    sink = Named(hit.sink.node, tuple(None if r is None else named[r] for r in rows))
    if not kv or not q or (read.mask is not None and not mask):
        return None
    wide = hit.node.meta["val"].dtype == F32
    return Site(hit, root, read, q, kv, (*values, *k), sink, mask, wide)


def unmasked(site: Site) -> Site:
    """The site without its mask; what adding it rounds is rounded already."""
    bare = replace(site.logits, mask=None, rounded=site.logits.rounded.replace("m", ""))
    return replace(site, mask=(), logits=bare)


@dataclass(frozen=True)
class Roles:
    """The output's coordinates (None: it has no such axis)."""

    batch: int | None
    sequence: int | None
    head: int | None

    @property
    def order(self) -> Axes:
        return (self.batch, self.sequence, self.head)


def roles(site: Site, kv_axes: Axes) -> Roles | None:
    """The sink differs by head, keys by batch (and by query, where each has its own)."""
    held = [a for a in site.sink.axes if a is not None]
    shape = site.root.meta["val"].shape[:-1]
    if len(held) > 1:
        return None
    head = held[0] if held else None
    others = [i for i, n in enumerate(shape) if i != head and not (isinstance(n, int) and n == 1)]
    by_key = [a for a in others if a in kv_axes]
    rest = [a for a in others if a not in by_key]
    if (head is not None and head in kv_axes) or len(others) > 2:
        return None
    if len(others) == 2 and len(by_key) == 1:
        return Roles(by_key[0], rest[0], head)
    if len(others) == 2:
        return Roles(others[0], others[1], head)
    return Roles(*(by_key or [None])[:1], *(rest or [None])[:1], head)


def seat(t: Tensor, axes: Axes, wanted: Axes) -> Tensor:
    """t with its axes (named by coordinates) in the wanted order; absent ones have size one."""
    for i in reversed([i for i, a in enumerate(axes) if a is None]):
        t = t.squeeze(i)
    held = [a for a in axes if a is not None]
    present = [a for a in wanted if a is not None and a in held]
    order = [held.index(a) for a in present]
    t = t if order == sorted(order) else t.permute(order)
    for i, a in enumerate(wanted):
        if a is None or a not in held:
            t = t.unsqueeze(i)
    return t


def seated(options: tuple[Named, ...], wanted: Axes) -> Named | None:
    """The first node that has no axis but the wanted ones."""
    return next((n for n in options if {a for a in n.axes if a is not None} <= set(wanted)), None)


def heads_first(root: fx.Node, order: Roles) -> bool:
    """Do heads lie outside the sequence in the root's memory?"""
    stride = root.meta["val"].stride()
    width = root.meta["val"].shape[-1]
    if order.head is None or order.sequence is None:
        return False
    return bool(stride[order.head] != width) and bool(stride[order.sequence] == width)
