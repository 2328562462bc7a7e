"""RMSNorm → rope → cache write, for q and kv in one launch.

Scope: q ``[.., heads, D]`` and kv ``[.., D]`` in any order of leading axes (batch, sequence and
one head axis), D up to 1024, rope on the trailing interleaved pairs; each part alone too: q or kv
only, without a norm, without a cache. kv's leading lanes may pass through fp8 (fake quant). The
cache is ``[N, D]`` or ``[batch, N, D]``, written by index tensors (ring, slot mapping) or slices.
Seed: ATOM's ``fused_reduce_q_norm_qk_rope_swa_write``; DeepSeek's reference; transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from dsv4fuse import atoms, maps
from dsv4fuse.chains import divides_by_product
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes, undecided
from dsv4fuse.layout import Order, arrange, head_order, restore, through, token_count
from dsv4fuse.match import Bound
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.slots import Slots, slots
from dsv4fuse.specs import QUANT_LEAD, RMS_NORM, ROPE
from dsv4fuse.writes import Write, written

NAME = "norm_rope_cache"


@dataclass(frozen=True)
class Leg:
    """One tensor's way: [norm →] rope [→ fake quant] [→ write], its axes named by ``root``'s."""

    root: fx.Node
    x: Bound
    cos: Bound
    sin: Bound
    rope: Hit
    norm: Hit | None
    quant: Hit | None
    order: Order  # the root's axes as (batch, sequence) or (batch, sequence, head)
    slots: Slots | None = None  # where its rows are written

    @property
    def heads(self) -> bool:
        return len(self.order) == 3

    @property
    def loose(self) -> frozenset[str]:
        return frozenset().union(*(h.env.loose for h in (self.rope, self.norm, self.quant) if h))


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph, q and kv that share a rotation paired."""
    quants = {h.x.node: h for h in scene.outermost(QUANT_LEAD)}
    ropes = scene.outermost(ROPE)
    found = [_leg(scene, rope, quants) for rope in ropes]
    writes = list(written(scene.graph))
    legs = [leg if leg.heads else _written(scene, leg, writes) for leg in found if leg]
    candidates = [undecided(NAME, r) for r, leg in zip(ropes, found, strict=True) if leg is None]
    left = list(legs)
    for q in [leg for leg in legs if leg.heads]:
        rows = (k for k in left if not k.heads)
        kv = next((k for k in rows if _together(scene, _seated_like(q, k), k)), None)
        left = [leg for leg in left if leg is not q and leg is not kv]
        candidates.append(_candidate(scene, _seated_like(q, kv), kv, numerics))
    return candidates + [_candidate(scene, None, kv, numerics) for kv in left]


def _leg(scene: Scene, rope: Hit, quants: dict[fx.Node, Hit]) -> Leg | None:
    norm = scene.hit(RMS_NORM, rope.x.node)
    x = through(norm.x, rope.x) if norm else rope.x
    quant = quants.get(rope.node)
    root, cos, sin = rope.node, rope.cos, rope.sin
    if quant is not None:
        root = quant.node
        x, cos, sin = (through(b, quant.x) for b in (x, cos, sin))
    order = head_order(x, cos)
    if order is not None and len(order) == 3 and quant is not None:  # only kv rows are quantised
        return _leg(scene, rope, {})
    return None if order is None else Leg(root, x, cos, sin, rope, norm, quant, order)


def _written(scene: Scene, leg: Leg, writes: list[Write]) -> Leg:
    """The leg with the write that takes its rows, if there is one."""
    found = slots(scene, leg.root, leg.order, writes)
    return leg if found is None else replace(leg, slots=found, order=found.order)


def _seated_like(q: Leg, kv: Leg | None) -> Leg:
    """q with its only token axis called batch where kv's cache makes it that."""
    if kv is None or kv.order[1] is not None or q.order[0] is not None:
        return q
    return replace(q, order=(q.order[1], None, *q.order[2:]))


def _together(scene: Scene, q: Leg, kv: Leg) -> bool:
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
    inputs = [b.node for leg in (q, kv) for _, b in _bounds(leg)]
    inputs += [q.cos.node, q.sin.node, *(kv.slots.nodes().values() if kv.slots else ())]
    outputs = [q.root, kv.root, *([kv.slots.write.node] if kv.slots else [])]
    return (
        same and one_rope and extents(q) == extents(kv) and scene.placeable(inputs, outputs)
    )


def _candidate(scene: Scene, q: Leg | None, kv: Leg | None, numerics: str) -> Candidate:
    legs = [leg for leg in (q, kv) if leg is not None]
    place = kv.slots if kv else None
    write = place.write if place else None
    keep = kv is not None and (
        write is None or scene.live_without(kv.root, [write.node])
    )
    bounds = {f"{n}.{k}": b for n, leg in (("q", q), ("kv", kv)) if leg for k, b in _bounds(leg)}
    bounds |= {"cos": legs[0].cos, "sin": legs[0].sin}
    names = {name: bound.node for name, bound in bounds.items()}
    if place is not None:
        names |= {"cache": place.write.cache} | place.nodes()
    inputs = tuple(dict.fromkeys(names.values()))
    seat = {name: inputs.index(node) for name, node in names.items()}

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensors[i] for name, i in seat.items()}
        return _call(q, kv, given, numerics, keep)

    return Candidate(
        NAME,
        legs[0].root,
        inputs,
        call,
        tuple(leg.root for leg in legs if leg is not kv or keep),
        (write.cache,) if write else (),
        (write.node,) if write else (),
        place.extents() if place else {},
        variant=_variant(q, kv),
        tokens=token_count(legs[0].root, legs[0].order),
        unsupported=divides_by_product(kv.quant.arguments) if kv and kv.quant else None,
        loose=frozenset().union(*(leg.loose for leg in legs)),
        detail=_detail(q, kv),
    )


def _variant(q: Leg | None, kv: Leg | None) -> str:
    if kv is None:
        return "q" if q is not None and q.norm else "q rope"
    return ("kv" if q is None else "q+kv") + (" cache" if kv.slots else "")


def _bounds(leg: Leg) -> list[tuple[str, Bound]]:
    weight = leg.norm.env.holes.get("weight") if leg.norm else None
    return [("x", leg.x), *([("weight", weight)] if weight else [])]


def _detail(q: Leg | None, kv: Leg | None) -> dict[str, object]:
    parts = []
    for name, leg in (("q", q), ("kv", kv)):
        if leg is not None:
            steps = [leg.norm and f"norm ({leg.norm.arguments['rounding']})", "rope"]
            steps += [leg.quant and "fake quant", leg.slots and "cache write"]
            parts.append(f"{name}: " + " → ".join(s for s in steps if s))
    return {"parts": "; ".join(parts)}


def _call(
    q: Leg | None, kv: Leg | None, given: dict[str, Tensor], numerics: str, keep: bool
) -> tuple[Tensor, ...]:
    """The fused op on the bound tensors, and its results as the nodes replaced hold them."""
    first = q or kv
    assert first is not None
    tensors = {
        name: None if leg is None else arrange(given[f"{name}.x"], leg.x, leg.order)
        for name, leg in (("q", q), ("kv", kv))
    }
    tokens = next(t for t in tensors.values() if t is not None).shape[:2]
    cos, sin = (
        arrange(given[n], getattr(first, n), first.order[:2]).expand(*tokens, -1)
        for n in ("cos", "sin")
    )
    arguments: dict[str, object] = {
        "rope_rounding": first.rope.arguments["rounding"],
        "precise": numerics == "precise",
        "q_heads_first": q is not None and _heads_first(q),
        **_norm_arguments("q", q),
        **_norm_arguments("kv", kv),
        **_quant_arguments(kv),
    }
    positional = [tensors["q"], tensors["kv"], cos, sin, given.get("q.weight"),
                  given.get("kv.weight")]  # fmt: skip
    ops = torch.ops.dsv4fuse
    if kv is None or kv.slots is None:
        outs = ops.norm_rope(*positional, **arguments)
    else:
        place = kv.slots.arguments(given, tokens)
        outs = ops.norm_rope_cache(
            *positional, given["cache"], place.pop("slot"), place.pop("seq"),
            **place, **arguments, keep_kv=keep,
        )  # fmt: skip
    kept = [(leg, out) for leg, out in zip((q, kv), outs, strict=True) if leg is not None]
    return tuple(
        restore(out, leg.order, leg.root.meta["val"].dim())
        for leg, out in kept
        if leg is not kv or keep
    )


def _heads_first(q: Leg) -> bool:
    """Does the replaced q keep its heads in front of the sequence?"""
    batch, sequence, head = q.order
    return sequence is not None and head is not None and head < sequence


def _norm_arguments(name: str, leg: Leg | None) -> dict[str, object]:
    norm = leg.norm if leg else None
    return {
        f"{name}_norm": norm.arguments["rounding"] if norm else "none",
        f"{name}_eps": norm.scalar("eps") if norm else 0.0,
    }


def _quant_arguments(kv: Leg | None) -> dict[str, object]:
    if kv is None or kv.quant is None:
        return {}
    a = kv.quant.arguments
    floor = kv.quant.env.scalars.get("floor", 0.0)
    return {"quant_group": a["group"], "quant_floor": floor, "quant_scale": a["scale"],
            "via": a["via"]}  # fmt: skip


def example(
    tokens: int, sizes: Sizes, device: str, heads: bool, row: bool, norm: bool, write: bool
) -> Example:
    """q ``[T, H, D]``, kv ``[T, D]`` bf16, fp32 tables, a cache with a slot for each token."""

    def one(x: Tensor, w: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = atoms.rms_norm(x, w, eps=1e-6, rounding="once") if norm else x
        return atoms.rope(x, cos, sin, rounding="once")

    def fn(
        q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, w: Tensor, cache: Tensor, slot: Tensor
    ) -> list[Tensor]:
        outs = [one(q, None, cos.unsqueeze(1), sin.unsqueeze(1))] if heads else []
        if row:
            outs.append(one(kv, w, cos, sin))
        if write:
            cache[slot] = outs[-1]
        return outs

    bf16 = dict(device=device, dtype=torch.bfloat16)
    q = torch.randn(tokens, sizes.heads, sizes.head_dim, **bf16)
    kv = torch.randn(tokens, sizes.head_dim, **bf16)
    angle = torch.rand(tokens, sizes.rope_dim // 2, device=device)
    weight = torch.rand(sizes.head_dim, device=device)
    cache = torch.zeros(max(tokens, sizes.window), sizes.head_dim, **bf16)
    slot = torch.randperm(len(cache), device=device)[:tokens]
    moved = 2 * q.nbytes * heads + kv.nbytes * (2 * row + write) + 2 * angle.nbytes
    return Example(fn, (q, kv, angle.cos(), angle.sin(), weight, cache, slot), moved)


# Of each variant: is there q, kv, a norm, a cache write. A rope alone is also the indexer's q.
EXAMPLES = {
    "q+kv cache": partial(example, heads=True, row=True, norm=True, write=True),
    "q+kv": partial(example, heads=True, row=True, norm=True, write=False),
    "q": partial(example, heads=True, row=False, norm=True, write=False),
    "q rope": partial(example, heads=True, row=False, norm=False, write=False),
    "kv cache": partial(example, heads=False, row=True, norm=True, write=True),
    "kv": partial(example, heads=False, row=True, norm=True, write=False),
}
FUSION = Fusion(NAME, find, (QUANT_LEAD, ROPE, RMS_NORM), EXAMPLES)
