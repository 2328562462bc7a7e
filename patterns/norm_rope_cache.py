"""RMSNorm → rope → cache write, for q and kv in one launch.

Scope: q ``[.., heads, D]`` and kv ``[.., D]`` in any order of leading axes (batch, sequence and
one head axis), D up to 1024, rope on the trailing interleaved pairs; each part alone too: q or kv
only, without a norm, without a cache. In front of either may stand the sum of up to 16 partial
results of a split product, over their first axis. kv's leading lanes may pass through fp8 (fake
quant), or be packed into bytes: codes, the rope lanes in bf16, e8m0 scales and a zero pad, written
to a uint8 cache ``[N, bytes]`` by an index. A bf16 cache is ``[N, D]``, ``[batch, N, D]`` or pages
seen as ``[N, D]``, written by index tensors (ring, slot mapping), a slice, or two slices (a ring
that a prefill fills). A write that cannot be part of the launch stays as it is.
Seed: ATOM's ``fused_reduce_q_norm_qk_rope_swa_write``; DeepSeek's reference; transformers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dsv4fuse import atoms
from dsv4fuse.chains import divides_by_product, quantised
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes, undecided
from dsv4fuse.layout import arrange, heads_first, restore, token_count
from dsv4fuse.scene import Scene
from dsv4fuse.specs import QUANT_LEAD, RMS_NORM, ROPE
from dsv4fuse.writes import written, written_twice

from ._legs import (
    Leg,
    Writes,
    leg_of,
    norm_arguments,
    quant_arguments,
    seated_like,
    steps,
    sum_dtype,
    together,
    with_write,
)

NAME = "norm_rope_cache"


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph, q and kv that share a rotation paired.

    Where kv is written there are two candidates: with the write and, should that fail, without.
    """
    quants = {h.x.node: h for h in scene.outermost(QUANT_LEAD)}
    ropes = scene.outermost(ROPE)
    legs = [leg_of(scene, rope, quants) for rope in ropes]
    writes = Writes(list(written(scene.graph)), list(written_twice(scene.graph)))
    bytewise = any(w.cache.meta["val"].dtype == torch.uint8 for w in writes.single)
    codes = quantised(scene) if bytewise else []
    candidates = [undecided(NAME, r) for r, leg in zip(ropes, legs, strict=True) if leg is None]
    rows = [leg for leg in legs if leg and not leg.heads]
    stored = {leg.root: w for leg in rows if (w := with_write(scene, leg, writes, codes))}
    for q in [leg for leg in legs if leg and leg.heads]:
        ways = ((k, stored.get(k.root, k)) for k in rows)
        pair = next(((k, w) for k, w in ways if together(scene, seated_like(q, w), w)), None)
        kv, best = pair or (None, None)
        rows = [leg for leg in rows if leg is not kv]
        candidates.append(_candidate(scene, seated_like(q, best), best, numerics))
        if best is not kv and together(scene, q, kv):
            candidates.append(_candidate(scene, q, kv, numerics))
    for kv in rows:
        ways = [stored[kv.root]] if kv.root in stored else []
        candidates += [_candidate(scene, None, leg, numerics) for leg in (*ways, kv)]
    return candidates


def _candidate(scene: Scene, q: Leg | None, kv: Leg | None, numerics: str) -> Candidate:
    legs = [leg for leg in (q, kv) if leg is not None]
    place = kv.slots if kv else None
    write = place.write if place else None
    keep = kv is not None and (
        write is None or scene.live_without(kv.root, [write.node])
    )
    named = {n: leg for n, leg in (("q", q), ("kv", kv)) if leg}
    names = {f"{n}.{k}": node for n, leg in named.items() for k, node in leg.nodes.items()}
    names |= {"cos": legs[0].cos.node, "sin": legs[0].sin.node}
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
        {write.node: kv.packing.pieces} if kv and kv.packing else {},
        variant=_variant(q, kv),
        tokens=token_count(legs[0].root, legs[0].order),
        unsupported=divides_by_product(kv.quant.arguments) if kv and kv.quant else None,
        loose=frozenset().union(*(leg.loose for leg in legs)),
        detail={"parts": "; ".join(steps(n, leg) for n, leg in named.items())},
    )


def _variant(q: Leg | None, kv: Leg | None) -> str:
    if kv is None:
        return "q" if q is not None and q.norm else "q rope"
    return ("kv" if q is None else "q+kv") + (" cache" if kv.slots else "")


def _call(
    q: Leg | None, kv: Leg | None, given: dict[str, Tensor], numerics: str, keep: bool
) -> tuple[Tensor, ...]:
    """The fused op on the bound tensors, and its results as the nodes replaced hold them."""
    first = q or kv
    assert first is not None
    rows = {
        name: None if leg is None else leg.rows(given[f"{name}.x"])
        for name, leg in (("q", q), ("kv", kv))
    }
    x = rows["q" if q else "kv"]
    tokens = x.shape[-4:-2] if q else x.shape[-3:-1]
    cos, sin = (
        arrange(given[n], getattr(first, n), first.order[:2]).expand(*tokens, -1)
        for n in ("cos", "sin")
    )
    arguments: dict[str, object] = {
        "rope_rounding": first.rope.arguments["rounding"],
        "precise": numerics == "precise",
        "q_heads_first": q is not None and heads_first(q.root, q.order),
        "sum_dtype": sum_dtype(q, kv),
        **norm_arguments("q", q),
        **norm_arguments("kv", kv),
        **quant_arguments(kv),
    }
    positional = [rows["q"], rows["kv"], cos, sin, given.get("q.weight"), given.get("kv.weight")]
    ops = torch.ops.dsv4fuse
    if kv is None or kv.slots is None:
        outs = ops.norm_rope(*positional, **arguments)
    elif kv.packing:
        slot = kv.slots.arguments(given, tokens)["slot"]
        outs = ops.norm_rope_cache_fp8(
            *positional, given["cache"], slot, page_size=1, layout="row", wrap=True, keep_kv=keep,
            **arguments, **kv.packing.arguments,
        )  # fmt: skip
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
