"""The input norms of a multi-token-prediction layer: embedding and streams in one launch.

Scope: an RMSNorm of the next token's embedding ``[.., D]``, whose row may be zeroed at position 0
(where, masked_fill, an assignment by a mask), and one of the hidden state ``[.., D]`` or of its
streams ``[.., n, D]``, that meet in one sum of projections or in one joined input of a projection.
No rope, no quantisation: those norms are other fusions'. Sources: DeepSeek's MTP; vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from dsv4fuse import atoms, maps, rules
from dsv4fuse.contract import Operand, Space
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.specs import RMS_NORM
from dsv4fuse.terms import Complex, Term
from dsv4fuse.views import VIEWS

from ._hyper_built import hidden as hidden_size
from ._seats import CASTS, Seat, placed, seats

aten = torch.ops.aten
NAME = "mtp_norms"
THROUGH = VIEWS | {*CASTS, aten.clone.default, aten._unsafe_view.default}
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default)
# position OP n, where it hides a row or shows it: what the kernel calls that
HIDES = {("eq", 0): "eq", ("le", 0): "le", ("lt", 1): "le"}
SHOWS = {("ne", 0): "eq", ("gt", 0): "le", ("ge", 1): "le"}
TURNED = {"lt": "gt", "le": "ge", "ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}


@dataclass(frozen=True)
class Embedded:
    """What is normed beside the streams: a node, and the positions that hide rows of it."""

    node: fx.Node
    positions: Seat | None = None
    hidden: str = "none"


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    norms = [h for h in scene.outermost(RMS_NORM) if _in_order(h)]
    meeting: dict[tuple[fx.Node, bool], list[Hit]] = {}
    for norm in norms:
        for place in dict.fromkeys(_meetings(norm.node)):
            meeting.setdefault(place, []).append(norm)
    pairs = {}
    for both in meeting.values():
        if len(both) == 2:
            e, h = sorted(both, key=lambda n: n.node.meta["val"].dim())
            if _beside(scene, e, h):
                pairs[e.node, h.node] = _candidate(scene, e, h, numerics)
    return list(pairs.values())


def _in_order(norm: Hit) -> bool:
    """Does the norm read its rows in its own order, no axis of them broadcast?"""
    own, read = (maps.sizes_of(n.meta["val"]) for n in (norm.node, norm.x.node))
    return own == read and norm.x.straight


def _meetings(norm: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Sums that a projection of the norm goes into, and joins of it that are projected (True)."""
    seen, stack = set[tuple[fx.Node, bool]](), [(norm, False)]
    while stack:
        node, projected = stack.pop()
        for user in node.users:
            if (user, projected) in seen:
                continue
            seen.add((user, projected))
            if user.target in THROUGH:
                stack.append((user, projected))
            elif user.target in PRODUCTS and not projected:
                stack.append((user, True))
            elif user.target is aten.add.Tensor and projected:
                yield user, False
            elif user.target is aten.cat.default and not projected and _projected(user):
                yield user, True


def _projected(node: fx.Node) -> bool:
    return any(
        user.target in PRODUCTS or (user.target in THROUGH and _projected(user))
        for user in node.users
    )


def _beside(scene: Scene, e: Hit, h: Hit) -> bool:
    """A token's embedding and its streams, and a place in the graph for both norms."""
    a, b = (maps.sizes_of(n.node.meta["val"]) for n in (e, h))
    inputs = [bound.node for n in (e, h) for bound in n.env.holes.values()]
    alike = a[-1] == b[-1] and a[:-1] in (b[:-1], b[:-2])
    return alike and scene.placeable(inputs, (e.node, h.node))


def _embedded(scene: Scene, norm: Hit) -> Embedded:
    """The value in front of the zeroing, if there is one that the kernel does."""
    node = norm.x.node
    term = scene.low.term(node)
    if not isinstance(term, Complex) and term.op == "where":
        test, yes, no = term.args
        for zero, value, names in ((yes, no, HIDES), (no, yes, SHOWS)):
            places = _positions(scene, test, names, _size(node))
            if rules.number(zero) != 0.0 or places is None:
                continue
            held = seats(Operand(value, scene.places(value, _size(node))))
            whole = (s for s in held if maps.sizes_of(s.node.meta["val"]) == _size(node))
            seat = next((s for s in whole if _straight(s)), None)
            if seat is not None and seat.node.meta["val"].dtype == node.meta["val"].dtype:
                return Embedded(seat.node, *places)
    return Embedded(node)


def _size(node: fx.Node) -> Space:
    return maps.sizes_of(node.meta["val"])


def _straight(seat: Seat) -> bool:
    return all(a in (None, axis) for axis, a in enumerate(seat.axes))


def _positions(
    scene: Scene, test: Term, names: dict[tuple[str, int], str], space: Space
) -> tuple[Seat, str] | None:
    """(positions, which of them are hidden) of a comparison with a number."""
    if test.op not in TURNED:
        return None
    for (at, n), op in ((test.args, test.op), (test.args[::-1], TURNED[test.op])):
        name = names.get((op, rules.number(n)))  # type: ignore[arg-type]
        if name is None or at.dtype not in rules.INTEGERS:
            continue
        held = seats(Operand(at, scene.places(at, space)))
        seat = next((s for s in held if len(space) - 1 not in s.axes), None)
        if seat is not None:
            return seat, name
    return None


def _candidate(scene: Scene, e: Hit, h: Hit, numerics: str) -> Candidate:
    found = _embedded(scene, e)
    weights = [n.env.holes.get("weight") for n in (e, h)]
    nodes = {"e": found.node, "h": h.x.node}
    nodes |= {"positions": found.positions.node} if found.positions else {}
    nodes |= {f"w{i}": w.node for i, w in enumerate(weights) if w is not None}
    inputs = tuple(dict.fromkeys(nodes.values()))
    lead = e.node.meta["val"].dim() - 1

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensors[inputs.index(node)] for name, node in nodes.items()}
        rows, streams = _flat(given["e"], lead), _flat(given["h"], lead)
        positions = None
        if found.positions is not None:
            positions = placed(given["positions"], found.positions.axes, tuple(range(lead)))
            positions = positions.expand(given["e"].shape[:-1]).reshape(-1)
        a, b = torch.ops.dsv4fuse.mtp_norms(
            rows, given.get("w0"), positions,
            streams.unsqueeze(1) if streams.dim() == 2 else streams, given.get("w1"),
            e_eps=e.scalar("eps"), e_norm=e.arguments["rounding"], h_eps=h.scalar("eps"),
            h_norm=h.arguments["rounding"], hidden=found.hidden, precise=numerics == "precise",
        )  # fmt: skip
        return a.view(given["e"].shape), b.view(given["h"].shape)

    zeroed = "" if found.positions is None else "zeroed at position 0, "
    return Candidate(
        NAME, e.node, inputs, call, (e.node, h.node),
        variant="zeroed" if found.positions else "plain",
        tokens=math.prod(e.node.meta["val"].shape[:-1]),
        reads={found.positions.node: 3} if found.positions else {},  # every third row is hidden
        loose=e.env.loose | h.env.loose,
        detail={"parts": f"embedding: {zeroed}norm ({e.arguments['rounding']}); "
                         f"streams: norm ({h.arguments['rounding']})"},
    )  # fmt: skip


def _flat(t: Tensor, lead: int) -> Tensor:
    """``[.., (n,) D]`` with its leading axes as one."""
    return t.unsqueeze(0) if lead == 0 else t.flatten(0, lead - 1)


def example(tokens: int, sizes: Sizes, device: str, zeroed: bool) -> Example:
    """bf16 streams of the hidden size and their projections' sum; fp32 weights of the norms."""
    d = hidden_size(sizes)
    norm = partial(atoms.rms_norm, eps=1e-6, rounding="once")

    def fn(
        e: Tensor, h: Tensor, at: Tensor, e_w: Tensor, h_w: Tensor, p: Tensor, q: Tensor
    ) -> Tensor:
        e = torch.where(at.unsqueeze(-1) == 0, 0, e) if zeroed else e
        return (norm(e, e_w) @ p).unsqueeze(1) + norm(h, h_w) @ q

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    e, h, weights = make(tokens, d), make(tokens, 4, d), torch.rand(2, d, device=device)
    narrow = [make(d, 16) for _ in range(2)]  # a projection of full width would be all that counts
    at = torch.arange(tokens, device=device)
    return Example(fn, (e, h, at, *weights, *narrow), 2 * (e.nbytes + h.nbytes))


EXAMPLES = {"zeroed": partial(example, zeroed=True), "plain": partial(example, zeroed=False)}
FUSION = Fusion(NAME, find, (), EXAMPLES)
