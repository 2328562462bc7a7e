"""clamp → silu → mul [→ routing weight] [→ fp8 group quant].

Scope: gate and up ``[.., I]`` as two tensors or slices of a packed one (halves, interleaved), any
limit or none, a weight per row ``[.., 1]``; the product alone, or as e4m3 codes and scales of
groups along I. Seed: ATOM's expert activation; DeepSeek's reference; transformers.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, fx

from dsv4fuse import atoms
from dsv4fuse.chains import Quantised, quantised
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.layout import arrange
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.specs import CODES, SWIGLU


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    products = scene.outermost(SWIGLU)
    made = ((q.made_by(scene, SWIGLU), q) for q in (quantised(scene) if products else ()))
    quants = {hit.node: (hit, q) for hit, q in made if hit is not None}
    # Of rows of one block, the quotient by the scale looks like a product with a routing weight.
    bare = [h for h in products if not _weighed(scene, h) & quants.keys()]
    found = {h.node: (h, None) for h in bare} | quants
    return [_candidate(*found[node], numerics) for node in sorted(found)]


def _weighed(scene: Scene, hit: Hit) -> set[fx.Node]:
    """The nodes of which the product's weight is made."""
    bound = hit.env.holes.get("weight")
    return scene.region(bound.node, ()) if bound is not None else set()


def _candidate(hit: Hit, quant: Quantised | None, numerics: str) -> Candidate:
    bounds = {n: b for n, b in hit.env.holes.items() if n in ("gate", "up", "weight")}
    nodes = [b.node for b in bounds.values()]
    inputs = tuple(dict.fromkeys(nodes))
    seat = {name: inputs.index(b.node) for name, b in bounds.items()}
    rank = hit.node.meta["val"].dim()

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        order = tuple(range(rank - 1))
        rows = {n: arrange(tensors[i], bounds[n], order) for n, i in seat.items()}
        return _call(hit, quant, rows, numerics)

    outputs: tuple[fx.Node, ...] = (hit.node,)
    if quant is not None:
        outputs = quant.outputs
    steps = ["clamp" if "limit" in hit.env.scalars else "", f"swiglu ({hit.arguments['rounding']})"]
    steps += ["routing weight" * ("weight" in bounds), "fp8 quant" * (quant is not None)]
    return Candidate(
        "clamp_swiglu_quant",
        outputs[0],
        inputs,
        call,
        outputs,
        variant="quant" if quant else "plain",
        tokens=math.prod(hit.node.meta["val"].shape[:-1]),
        loose=hit.env.loose | (quant.loose if quant else frozenset()),
        detail={"parts": " → ".join(s for s in steps if s)},
    )


def _call(
    hit: Hit, quant: Quantised | None, rows: dict[str, Tensor], numerics: str
) -> tuple[Tensor, ...]:
    *lead, width = torch.broadcast_shapes(rows["gate"].shape, rows["up"].shape)
    flat = [None if t is None else _flat(t.expand(*lead, -1))
            for t in (rows["gate"], rows["up"], rows.get("weight"))]  # fmt: skip
    arguments = {
        "limit": hit.env.scalars.get("limit"),
        "rounding": hit.arguments["rounding"],
        "precise": numerics == "precise",
    }
    if quant is None:
        return (torch.ops.dsv4fuse.clamp_swiglu(*flat, **arguments).view(*lead, width),)
    codes, scales = torch.ops.dsv4fuse.clamp_swiglu_quant(
        *flat, **arguments, **quant.arguments, by=quant.by
    )
    return quant.shaped(codes, scales, [*quant.lead(lead), width])


def _flat(t: Tensor) -> Tensor:
    """``[.., lanes]`` as ``[T, lanes]``."""
    return t.unsqueeze(0) if t.dim() == 1 else t.flatten(0, -2)


def example(tokens: int, sizes: Sizes, device: str, quant: bool) -> Example:
    """A packed bf16 ``[T, 2·I]``, limit 10; codes in groups of 128 with raw fp32 scales."""

    def fn(gate_up: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        gate, up = gate_up.chunk(2, dim=-1)
        y = atoms.clamp_swiglu(gate, up, None, limit=10.0, rounding="silu")
        return atoms.group_quant(y, group=128, floor=1e-10, scale="fp32") if quant else y

    x = torch.randn(tokens, 2 * sizes.inter, device=device, dtype=torch.bfloat16) * 4
    written = sizes.inter + sizes.inter // 32 if quant else 2 * sizes.inter
    return Example(fn, (x,), x.nbytes + tokens * written)


EXAMPLES = {"quant": partial(example, quant=True), "plain": partial(example, quant=False)}
FUSION = Fusion("clamp_swiglu_quant", find, (SWIGLU, CODES), EXAMPLES)
