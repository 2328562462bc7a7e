"""RMSNorm → fp8 group quant [, a second RMSNorm in the same launch].

Scope: rows ``[.., N]`` normed with or without a weight, then e4m3 codes and scales of groups along
N, up to 8192 wide; the norm itself stays an output where somebody else reads it. A second norm of
as many rows (the kv latent's) joins the launch where both have one place in the graph, unless a
rope takes it: then it is part of ``norm_rope_cache``. A norm that nobody quantises is no site.
Seed: ATOM's q and kv latent norms with q's group quant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from dsv4fuse import atoms, maps
from dsv4fuse.chains import Quantised, quantised
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.layout import arrange
from dsv4fuse.match import Bound
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.specs import CODES, RMS_NORM, ROPE

NAME = "norm_quant"


@dataclass(frozen=True)
class Site:
    """A quantised norm, whether its value is read besides, and a second norm in its launch."""

    norm: Hit
    quant: Quantised
    keep: bool
    kv: Hit | None = None

    @property
    def norms(self) -> dict[str, Hit]:
        return {"x": self.norm} | ({"kv": self.kv} if self.kv else {})

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        kept = (self.norm.node,) if self.keep else ()
        return (*self.quant.outputs, *kept, *((self.kv.node,) if self.kv else ()))


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph; with a second norm and, should that fail, without."""
    sites = [s for q in quantised(scene) if (s := _site(scene, q))]
    others = _others(scene, sites) if sites else []
    found = []
    for site in sites:
        second = next((h for h in _nearest(scene, site, others) if _joins(scene, site, h)), None)
        if second is not None:
            others.remove(second)
            both = Site(site.norm, site.quant, site.keep, second)
            found.append(_candidate(both, numerics))
        found.append(_candidate(site, numerics))
    return found


def _site(scene: Scene, quant: Quantised) -> Site | None:
    """A value that is quantised row by row in its own order, if a norm made it."""
    norm = quant.made_by(scene, RMS_NORM)
    return norm and Site(norm, quant, scene.live_without(norm.node, quant.outputs))


def _others(scene: Scene, sites: list[Site]) -> list[Hit]:
    """The norms that neither a quantiser nor a rope takes."""
    taken = {s.norm.node for s in sites} | {h.x.node for h in scene.outermost(ROPE)}
    return [h for h in scene.outermost(RMS_NORM) if h.node not in taken]


def _nearest(scene: Scene, site: Site, others: list[Hit]) -> list[Hit]:
    here = scene.order[site.norm.node]
    return sorted(others, key=lambda h: abs(scene.order[h.node] - here))


def _joins(scene: Scene, site: Site, other: Hit) -> bool:
    """As many rows of one dtype, and a place for both after all inputs, before all readers."""
    a, b = (maps.sizes_of(h.node.meta["val"])[:-1] for h in (site.norm, other))
    one_dtype = site.norm.x.node.meta["val"].dtype == other.x.node.meta["val"].dtype
    inputs = [b.node for h in (site.norm, other) for b in h.env.holes.values()]
    return a == b and one_dtype and scene.placeable(inputs, (*site.outputs, other.node))


def _candidate(site: Site, numerics: str) -> Candidate:
    bounds = {
        f"{name}.{hole}": bound
        for name, hit in site.norms.items()
        for hole, bound in hit.env.holes.items()
    }
    inputs = tuple(dict.fromkeys(b.node for b in bounds.values()))
    seat = {name: inputs.index(b.node) for name, b in bounds.items()}

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return _call(site, bounds, {n: tensors[i] for n, i in seat.items()}, numerics)

    steps = f"norm ({site.norm.arguments['rounding']}) → fp8 quant" + ", kept" * site.keep
    if site.kv is not None:
        steps += f"; second norm ({site.kv.arguments['rounding']})"
    return Candidate(
        NAME,
        site.outputs[0],
        inputs,
        call,
        site.outputs,
        variant="two norms" if site.kv else "quant",
        tokens=math.prod(site.norm.node.meta["val"].shape[:-1]),
        loose=site.quant.loose.union(*(h.env.loose for h in site.norms.values())),
        code=site.quant.distances,  # the mean, in another order
        detail={"parts": steps},
    )


def _call(
    site: Site, bounds: dict[str, Bound], given: dict[str, Tensor], numerics: str
) -> tuple[Tensor, ...]:
    shapes = {n: h.node.meta["val"].shape for n, h in site.norms.items()}
    rank = len(shapes["x"])
    order = tuple(range(rank - 1))
    lead = list(arrange(given["x.x"], bounds["x.x"], order).shape[:-1])
    rows = {
        n: _flat(arrange(given[f"{n}.x"], bounds[f"{n}.x"], order)) for n in site.norms
    }
    codes, scales, normed, kv = torch.ops.dsv4fuse.norm_quant(
        rows["x"],
        given.get("x.weight"),
        rows.get("kv"),
        given.get("kv.weight"),
        eps=site.norm.scalar("eps"),
        norm=site.norm.arguments["rounding"],
        kv_eps=site.kv.scalar("eps") if site.kv else 0.0,
        kv_norm=site.kv.arguments["rounding"] if site.kv else "once",
        precise=numerics == "precise",
        keep=site.keep,
        **site.quant.arguments,
        by=site.quant.by,
    )
    outs = site.quant.shaped(codes, scales, [*site.quant.lead(lead), codes.shape[-1]])
    kept = (normed.view(*lead, -1),) if site.keep else ()
    return (*outs, *kept, *((kv.view(*lead, shapes["kv"][-1]),) if site.kv else ()))


def _flat(t: Tensor) -> Tensor:
    """``[.., lanes]`` as ``[T, lanes]``."""
    return t.unsqueeze(0) if t.dim() == 1 else t.flatten(0, -2)


def example(tokens: int, sizes: Sizes, device: str, second: bool) -> Example:
    """The latents of one projection, bf16: q's 1024 or 1536 lanes, kv's 512; fp32 weights."""
    width, dim = sizes.inter // 2, sizes.head_dim  # both models' q_lora is half of an expert

    def fn(both: Tensor, w: Tensor, kv_w: Tensor) -> tuple[Tensor, ...]:
        q, kv = both.split([width, dim], dim=-1)
        y = atoms.rms_norm(q, w, eps=1e-6, rounding="once")
        outs = atoms.group_quant(y, group=128, floor=1e-10, scale="fp32")
        return (*outs, atoms.rms_norm(kv, kv_w, eps=1e-6, rounding="once")) if second else outs

    both = torch.randn(tokens, width + dim, device=device, dtype=torch.bfloat16)
    weights = [torch.rand(n, device=device) for n in (width, dim)]
    moved = tokens * (width * 3 + width // 32 + 4 * dim * second)
    return Example(fn, (both, *weights), moved)


EXAMPLES = {"two norms": partial(example, second=True), "quant": partial(example, second=False)}
# A norm that nearly matches is reported by norm_rope_cache: most norms are not quantised.
FUSION = Fusion(NAME, find, (CODES,), EXAMPLES)
