"""One tensor's way through norm → rope → cache write, and which two of them share a launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, fx

from dsv4fuse import maps
from dsv4fuse.chains import Quantised
from dsv4fuse.layout import Order, arrange, head_order, through
from dsv4fuse.match import Bound
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.slots import Slots, ring, slots
from dsv4fuse.specs import FAKE_QUANT, RMS_NORM
from dsv4fuse.writes import Write

from ._bytes import Packing, packing
from ._parts import Parts, parts_of
from ._turns import Turn, rotated

NO_TURNS: Mapping[fx.Node, Turn] = MappingProxyType({})


@dataclass(frozen=True)
class Leg:
    """One tensor's way: [sum →] [norm →] rope [→ matrix] [→ fake quant] [→ write].

    Its axes are named by those of ``root``, the last node before the write.
    """

    root: fx.Node
    x: Bound
    cos: Bound
    sin: Bound
    rope: Hit
    norm: Hit | None
    quant: Hit | None
    order: Order  # the root's axes as (batch, sequence) or (batch, sequence, head)
    parts: Parts | None = None  # x is their sum
    slots: Slots | None = None  # where its rows are written
    packing: Packing | None = None  # as these bytes
    turn: Turn | None = None  # the product behind the rope

    @property
    def heads(self) -> bool:
        return len(self.order) == 3

    @property
    def hits(self) -> list[Hit]:
        codes = self.packing.quant.codes if self.packing else None
        return [h for h in (self.rope, self.norm, self.quant, codes) if h]

    @property
    def quant_words(self) -> str:
        fp4 = self.quant is not None and "fp4" in self.quant.arguments
        return "fp4 fake quant" if fp4 else "fake quant"

    @property
    def loose(self) -> frozenset[str]:
        sums = {"order of the sums"} if self.turn else set()
        return frozenset(sums).union(*(h.env.loose for h in self.hits))

    @property
    def nodes(self) -> dict[str, fx.Node]:
        """What the leg reads besides its tables."""
        weight = self.norm.env.holes.get("weight") if self.norm else None
        own = {"x": self.parts.node if self.parts else self.x.node}
        return own | ({"weight": weight.node} if weight else {})

    def rows(self, x: Tensor) -> Tensor:
        """``[batch, sequence[, heads], lanes]``, the axis of the parts in front."""
        if self.parts is None:
            return arrange(x, self.x, self.order)
        return self.parts.arranged(x, self.x, self.order)


@dataclass(frozen=True)
class Writes:
    """A graph's cache writes, and those that two make together."""

    single: list[Write]
    pairs: list[tuple[Write, Write]]


def leg_of(
    scene: Scene, rope: Hit, quants: Mapping[fx.Node, Hit],
    turned: Mapping[fx.Node, Turn] = NO_TURNS,
) -> Leg | None:  # fmt: skip
    """The leg that a rope is part of, without its write; None for axes no kernel takes."""
    norm = scene.hit(RMS_NORM, rope.x.node)
    x = through(norm.x, rope.x) if norm else rope.x
    turn = turned.get(rope.node)
    root = turn.node if turn else rope.node
    quant = quants.get(root)
    if turn and quant and "fp4" not in quant.arguments:  # the leading lanes of rotated rows
        quant = None
    cos, sin = rope.cos, rope.sin
    if quant is not None:
        root = quant.node
        x, cos, sin = (through(b, quant.x) for b in (x, cos, sin))
    order = head_order(x, cos)
    if order is not None and len(order) == 3 and quant is not None:  # only kv rows are quantised
        return leg_of(scene, rope, {}, turned)
    if order is None:
        return None
    parts = parts_of(x.node) if x.laned and not x.part else None
    return Leg(root, x, cos, sin, rope, norm, quant, order, parts, turn=turn)


def fp4_of(scene: Scene, rows: list[fx.Node]) -> dict[fx.Node, Hit]:
    """The quantisers to fp4 of whole rows, by those rows."""
    fakes = rotated(scene).outermost(FAKE_QUANT) if rows else []
    return {h.x.node: h for h in fakes if "fp4" in h.arguments and h.x.node in rows}


def with_write(scene: Scene, leg: Leg, writes: Writes, quants: list[Quantised]) -> Leg | None:
    """The leg with the write that takes its rows, as they are or as bytes, if there is one."""
    found = slots(scene, leg.root, leg.order, writes.single)
    if found is None:
        rings = (ring(scene, leg.root, leg.order, pair) for pair in writes.pairs)
        found = next((r for r in rings if r), None)
    if found is not None:
        return replace(leg, slots=found, order=found.order)
    ways = (packing(scene, leg.root, leg.order, w, quants) for w in writes.single)
    packed = None if leg.quant else next((p for p in ways if p), None)
    return packed and replace(leg, slots=packed.slots, order=packed.slots.order, packing=packed)


def seated_like(q: Leg, kv: Leg | None) -> Leg:
    """q with its only token axis called batch where kv's cache makes it that."""
    if kv is None or kv.order[1] is not None or q.order[0] is not None:
        return q
    return replace(q, order=(q.order[1], None, *q.order[2:]))


def together(scene: Scene, q: Leg, kv: Leg) -> bool:
    """May q and kv share a launch: one rotation table, read the same way, the same tokens."""

    def seats(leg: Leg, bound: Bound) -> tuple[object, ...]:
        return tuple(None if r is None else leg.order.index(r) for r in bound.rows)

    def extents(leg: Leg) -> list[object]:
        shape = maps.sizes_of(leg.root.meta["val"])
        return [1 if a is None else shape[a] for a in leg.order[:2]]

    same = all(
        (a.node, a.part, seats(q, a)) == (b.node, b.part, seats(kv, b))
        for a, b in ((q.cos, kv.cos), (q.sin, kv.sin))
    )
    one_rope = q.rope.arguments == kv.rope.arguments
    one_sum = len({leg.parts.dtype for leg in (q, kv) if leg.parts}) < 2
    inputs = [*q.nodes.values(), *kv.nodes.values(), q.cos.node, q.sin.node]
    inputs += kv.slots.nodes().values() if kv.slots else ()
    outputs = [q.root, kv.root, *([kv.slots.write.node] if kv.slots else [])]
    return (
        same and one_rope and one_sum and extents(q) == extents(kv)
        and scene.placeable(inputs, outputs)
    )  # fmt: skip


def steps(name: str, leg: Leg) -> str:
    """The leg in words, for the report."""
    found = [leg.parts and "sum of parts", leg.norm and f"norm ({leg.norm.arguments['rounding']})"]
    found += ["rope", leg.quant and leg.quant_words, leg.packing and "fp8 rows"]
    found += [leg.slots and "cache write"]
    return f"{name}: " + " → ".join(s for s in found if s)


def norm_arguments(name: str, leg: Leg | None) -> dict[str, object]:
    norm = leg.norm if leg else None
    return {
        f"{name}_norm": norm.arguments["rounding"] if norm else "none",
        f"{name}_eps": norm.scalar("eps") if norm else 0.0,
    }


def quant_arguments(kv: Leg | None) -> dict[str, object]:
    if kv is None or kv.quant is None:
        return {}
    a = kv.quant.arguments
    floor = kv.quant.env.scalars.get("floor", 0.0)
    fp4 = {"quant_fp4": a["fp4"]} if "fp4" in a else {}
    return {"quant_group": a["group"], "quant_floor": floor, "quant_scale": a["scale"],
            "via": a["via"], **fp4}  # fmt: skip


def sum_dtype(*legs: Leg | None) -> torch.dtype | None:
    """What the legs' parts add up to; the same for both."""
    return next((leg.parts.dtype for leg in legs if leg and leg.parts), None)
