"""The KV compressor: softmax over a window → sum → RMSNorm → rope [→ matrix] [→ quant] [→ write].

Scope: entries ``[.., D]`` pooled per channel from windows of 2^k rows (up to 8, or up to 128), the
softmax in fp32; then a norm or none, rope on the trailing pairs, a product with a square matrix
that the graph holds (a Hadamard rotation, as for ``indexer_q``), fake quant (to fp8 of the leading
lanes where nothing rotates them, to fp4 of all), a write like ``norm_rope_cache``'s. Windows are
read where their rows lie: in a projection, with or without the window before (overlap), or in a
ring that a position indexes; others from what the module made of them. Raw rows are written to
their ring by Inductor. Seed: ATOM #704 item 4; DeepSeek's reference; transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from dsv4fuse.patterns._compress_examples import ROWS as EXAMPLE_ROWS
from dsv4fuse.patterns._compress_examples import decode, prefill
from dsv4fuse.patterns._legs import (
    Leg,
    Writes,
    fp4_of,
    leg_of,
    quant_arguments,
    with_write,
)
from dsv4fuse.patterns._softmax_pool import POOL
from dsv4fuse.patterns._sources import Grid, windows
from dsv4fuse.patterns._turns import Turn, turns
from dsv4fuse.patterns._windows import Gathered, Windows, gathering
from torch import Tensor, fx

from dsv4fuse import maps
from dsv4fuse.chains import divides_by_product
from dsv4fuse.fusion import Candidate, Fusion
from dsv4fuse.layout import arrange, restore, token_count
from dsv4fuse.rules import number
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.specs import QUANT_LEAD, ROPE, code_distance
from dsv4fuse.terms import Complex
from dsv4fuse.writes import written, written_twice

NAME = "compress_kv"


@dataclass(frozen=True)
class Site:
    """A pooled value, what follows it, and where its rows lie."""

    pool: Hit
    leg: Leg
    windows: Windows
    spare: bool  # entries that go to the cache's last row are not wanted

    def nodes(self) -> dict[str, fx.Node]:
        """The op's tensors by name."""
        leg = self.leg
        out = {"cos": leg.cos.node, "sin": leg.sin.node}
        if leg.norm and "weight" in leg.norm.env.holes:
            out["weight"] = leg.norm.weight.node
        if leg.turn:
            out["matrix"] = leg.turn.matrix.node
        for suffix, half in (("", self.windows.now), ("_before", self.windows.before)):
            if half is not None:
                out |= {f"kv{suffix}": half.kv.node, f"gate{suffix}": half.gate.node}
                out |= {f"bias{suffix}": half.bias.node} if half.bias else {}
        rows = self.windows.now.kv
        if isinstance(rows, Gathered):
            out |= {"ends": rows.ends.node}
            out |= {"page": rows.page.node} if rows.page else {}
        if leg.slots:
            out |= {"cache": leg.slots.write.cache} | leg.slots.nodes()
        return out

    def places(self) -> Mapping[fx.Node, tuple[int | torch.SymInt, int | None]]:
        """For each index tensor how many places it may name, for the check on random inputs."""
        out = dict(self.leg.slots.extents()) if self.leg.slots else {}
        rows = self.windows.now.kv
        if isinstance(rows, Gathered):
            pages, length = rows.node.meta["val"].shape[:2]
            out.setdefault(rows.ends.node, (rows.ring or length, None))
            if rows.page is not None:
                out.setdefault(rows.page.node, (pages, None))
        return out


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph, longest first: with its write, with what follows the
    rope, and (should those fail) without."""
    pools = {}
    for rope in scene.outermost(ROPE):
        leg = leg_of(scene, rope, {})
        pool = scene.hit(POOL, leg.x.node) if leg and not leg.heads else None
        pools |= {rope.node: (rope, pool)} if pool else {}
    turned = turns(scene) if pools else {}
    rows = [turned[n].node if n in turned else n for n in pools]
    quants = {h.x.node: h for h in scene.outermost(QUANT_LEAD)} | fp4_of(scene, rows)
    writes = Writes(list(written(scene.graph)), list(written_twice(scene.graph)))
    found = []
    for rope, pool in pools.values():
        for leg in _ways(scene, rope, quants, turned):
            stored = with_write(scene, leg, writes, [])
            sites = [_site(scene, pool, way) for way in (stored, leg) if way]
            found += [_candidate(scene, s, numerics) for s in sites if s]
    return found


def _ways(
    scene: Scene, rope: Hit, quants: Mapping[fx.Node, Hit], turned: Mapping[fx.Node, Turn]
) -> list[Leg]:
    """The leg with its rotation and quantiser, without the latter, and without either; not those
    that would leave a value inside of them to be computed once more, for others that read it."""
    legs = (leg_of(scene, rope, *given) for given in ((quants, turned), ({}, turned), ({},)))
    ways = list({leg.root: leg for leg in legs if leg and not leg.heads}.values())
    while any(scene.live_without(inner.root, [ways[0].root]) for inner in ways[1:]):
        ways = ways[1:]
    return ways


def _site(scene: Scene, pool: Hit, leg: Leg) -> Site | None:
    axes = {r: axis for axis, r in enumerate(leg.x.rows) if r is not None}
    seats = tuple(axes.get(r) if r is not None else None for r in leg.order)
    shape = maps.sizes_of(pool.node.meta["val"])
    batch, entries = (1 if a is None else shape[a] for a in seats)
    bounds = pool.kv, pool.gate
    if any(r not in seats for b in bounds for r in b.rows if r is not None):
        return None
    width = pool.kv.node.meta["val"].shape[-2]
    upcast = pool.arguments["rounding"] == "once"
    grid = Grid(scene, (batch, entries, int(width), int(shape[-1])), seats, upcast)
    return Site(pool, leg, windows(grid, *bounds), _spare(scene, leg))


def _spare(scene: Scene, leg: Leg) -> bool:
    """Does a condition send entries to the cache's last row, which nobody reads?"""
    if leg.slots is None or leg.slots.places[-1].index is None or leg.slots.flat:
        return False
    write = leg.slots.write
    term = scene.low.term(leg.slots.places[-1].index)
    last = write.cache.meta["val"].shape[-2] - 1
    if isinstance(term, Complex) or term.op != "where" or last not in map(number, term.args[1:]):
        return False
    return not scene.live_without(leg.root, [write.node]) and all(
        user is write.home or _leaves_out(user, last) for user in write.node.users
    )


def _leaves_out(user: fx.Node, last: int | torch.SymInt) -> bool:
    """Is a reader a slice of the rows in front of the last one?"""
    if user.target is not torch.ops.aten.slice.Tensor or len(user.args) < 4:
        return False
    source, axis, start, end = user.args[:4]
    rank = source.meta["val"].dim()
    fixed = isinstance(end, int) and isinstance(start, int) and isinstance(last, int)
    return fixed and axis % rank == rank - 2 and start >= 0 and (end == -1 or 0 <= end <= last)


def _candidate(scene: Scene, site: Site, numerics: str) -> Candidate:
    leg = site.leg
    write = leg.slots.write if leg.slots else None
    keep = write is None or scene.live_without(leg.root, [write.node])
    names = site.nodes()
    inputs = tuple(dict.fromkeys(names.values()))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensors[inputs.index(node)] for name, node in names.items()}
        out = _call(site, given, numerics, keep)
        return (restore(out, leg.order, leg.root.meta["val"].dim()),) if keep else ()

    outputs = (leg.root,) if keep else ()
    updates = (write.node,) if write else ()
    apart = code_distance(leg.quant.arguments) if leg.quant else 0.0
    return Candidate(
        NAME,
        leg.root,
        inputs,
        call,
        outputs,
        (write.cache,) if write else (),
        updates,
        site.places(),
        variant=_variant(site),
        judged="eager" if leg.quant else "exact",  # a sum over a window, in another order
        code=dict.fromkeys((*outputs, *updates), apart),
        tokens=token_count(leg.root, leg.order),
        unsupported=_unsupported(site),
        loose=leg.loose | site.pool.env.loose,
        detail=_detail(site),
    )


def _unsupported(site: Site) -> str | None:
    names = site.nodes()
    cache = names.pop("cache", None)
    if cache is not None and cache in names.values():
        return "The rows that are pooled lie in the cache that the entries are written to."
    return divides_by_product(site.leg.quant.arguments) if site.leg.quant else None


def _variant(site: Site) -> str:
    rows = int(site.pool.kv.node.meta["val"].shape[-2])
    wide = "wide" if rows > 8 else "narrow"
    wide += " turned" * (site.leg.turn is not None)
    wide += " fp4" * bool(site.leg.quant and "fp4" in site.leg.quant.arguments)
    return f"{wide} {'ring' if isinstance(site.windows.now.kv, Gathered) else 'rows'}"


def _detail(site: Site) -> dict[str, object]:
    leg, found = site.leg, site.windows
    before = " with the window before" * (found.before is not None)
    steps = ["gather" * isinstance(found.now.kv, Gathered)]
    steps += [f"pool{before} ({site.pool.arguments['rounding']})"]
    steps += [leg.norm and f"norm ({leg.norm.arguments['rounding']})", "rope"]
    steps += ["matrix" * (leg.turn is not None)]
    steps += [leg.quant and leg.quant_words, leg.slots and "cache write"]
    spare = "; entries for the cache's spare last row are not computed" * site.spare
    return {"parts": " → ".join(s for s in steps if s) + spare}


def _call(site: Site, given: dict[str, Tensor], numerics: str, keep: bool) -> Tensor:
    """The fused op on the bound tensors."""
    leg, found = site.leg, site.windows
    dim = leg.root.meta["val"].shape[-1]
    cos, sin = (arrange(given[n], getattr(leg, n), leg.order) for n in ("cos", "sin"))
    arguments = _arguments(site, numerics)
    matrix = leg.turn.shown(given["matrix"]) if leg.turn else None
    ends, page, own = gathering(found.now, given, arguments["width"])
    tensors: dict[str, Tensor | None] = dict.fromkeys(("bias", "bias_before"))
    for suffix, half in (("", found.now), ("_before", found.before)):
        for name in ("kv", "gate"):
            rows = getattr(half, name, None)
            tensors[name + suffix] = rows and rows.part(given[name + suffix], dim)
        if half is not None and half.bias is not None:
            tensors["bias" + suffix] = half.bias.shown(given["bias" + suffix]).flatten(0, 2)
    tokens = torch.broadcast_shapes(own or tensors["kv"].shape[:2], cos.shape[:2], sin.shape[:2])
    cos, sin = (t.expand(*tokens, -1) for t in (cos, sin))
    ends, page = (None if t is None else t.expand(*tokens) for t in (ends, page))
    order = ("kv", "gate", "kv_before", "gate_before", "bias", "bias_before")
    positional = [*(tensors[n] for n in order), given.get("weight"), cos, sin, ends, page]
    ops = torch.ops.dsv4fuse
    if leg.slots is None:
        return ops.compress_kv(*positional, matrix, **arguments)
    place = leg.slots.arguments(given, tokens)
    return ops.compress_kv_cache(
        *positional, given["cache"], place.pop("slot"), place.pop("seq"), matrix, **place,
        **arguments, keep=keep, spare=site.spare,
    )  # fmt: skip


def _arguments(site: Site, numerics: str) -> dict[str, Any]:
    leg, found = site.leg, site.windows
    rows = int(site.pool.kv.node.meta["val"].shape[-2])
    gathered = found.now.kv if isinstance(found.now.kv, Gathered) else None
    return {
        "width": rows // 2 if found.before is not None else rows,
        "ring": gathered.ring if gathered else 0,
        "shifted": found.shifted,
        "masked": found.before is not None and found.before.masked,
        "narrow_bias": found.now.narrow,
        "pool_rounding": site.pool.arguments["rounding"],
        "pool_dtype": site.pool.node.meta["val"].dtype,
        "eps": leg.norm.scalar("eps") if leg.norm else 0.0,
        "norm": leg.norm.arguments["rounding"] if leg.norm else "none",
        "rope_rounding": leg.rope.arguments["rounding"],
        "precise": numerics == "precise",
        "factor": leg.turn.factor if leg.turn else 1.0,
        **quant_arguments(leg),
    }


EXAMPLES = {
    f"{kind} {rows}": partial(example, kind=kind)
    for kind in EXAMPLE_ROWS
    for rows, example in (("rows", prefill), ("ring", decode))
}
# A step that predicts tokens: of four new ones of each request one closes a wide window, or none.
EXAMPLES |= {
    "wide ring of four": partial(decode, kind="wide", new=4),
    "wide ring of four, none closes": partial(decode, kind="wide", new=4, closing=False),
}
FUSION = Fusion(NAME, find, (POOL,), EXAMPLES, varied=True)
