"""Inverse rope of the attention output [→ fp8 group quant for the grouped projection].

Scope: o ``[.., H, D]`` in any order of its leading axes (batch, sequence, one head axis), rotated
back (conjugate, or cos and −sin) on the trailing interleaved pairs; the rotated tensor alone, or
e4m3 codes of groups of heads ``[.., G, H/G·D]`` and their scales. Seed: TensorRT-LLM #14254.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from dsv4fuse import atoms
from dsv4fuse.chains import Quantised, quantised
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes, undecided
from dsv4fuse.layout import Order, arrange, head_order, heads_first, restore, token_count
from dsv4fuse.match import Bound
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.specs import CODES, INVERSE_ROPE

from ._turns import rotated


@dataclass(frozen=True)
class Grouped:
    """The quantised value as a reshape of the rotated one: how many groups of heads."""

    quant: Quantised
    groups: int
    axis: bool  # the groups have an axis of their own


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    turned = scene.outermost(INVERSE_ROPE)
    if not turned:
        return []
    view, found = rotated(scene), []
    quants = quantised(view)
    for hit in turned:
        order = head_order(hit.x, hit.cos, lone="heads")
        if order is None:
            found.append(undecided("inv_rope_quant", hit))
            continue
        grouped = next((g for q in quants if (g := _grouped(view, hit, q, order))), None)
        found.append(_candidate(hit, order, grouped, numerics))
    return found


def _grouped(scene: Scene, hit: Hit, quant: Quantised, order: Order) -> Grouped | None:
    """Is the quantised tensor the rotated one, heads merged into the lanes of groups?"""
    if len(order) != 3 or order[2] is None:
        return None
    shape, turned = quant.shape, hit.node.meta["val"].shape
    heads, dim = turned[order[2]], turned[-1]
    width = shape[-1]
    if not all(isinstance(v, int) for v in (heads, dim, width)) or width % dim:
        return None
    groups = heads * dim // width
    tokens = [a for a in order[:2] if a is not None]
    if tokens != sorted(tokens) or order[2] < max(tokens, default=-1):
        return None
    lead = [turned[a] for a in range(len(turned) - 1) if a != order[2]]
    axis = groups > 1 or len(shape) == len(lead) + 2
    merged = [*lead, *([groups] if axis else []), width]
    same = [str(s) for s in shape] == [str(s) for s in merged] and quant.is_reshape(scene, hit.node)
    return Grouped(quant, groups, axis) if same else None


def _candidate(
    hit: Hit, order: Order, grouped: Grouped | None, numerics: str
) -> Candidate:
    bounds = {name: hit.env.holes[name] for name in ("x", "cos", "sin")}
    inputs = tuple(dict.fromkeys(b.node for b in bounds.values()))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensors[inputs.index(b.node)] for name, b in bounds.items()}
        return _call(hit, order, grouped, given, bounds, numerics)

    quant = grouped.quant if grouped else None
    outputs: tuple[fx.Node, ...] = quant.outputs if quant else (hit.node,)
    steps = "inverse rope" + (f" → fp8 quant in {grouped.groups} groups" if grouped else "")
    return Candidate(
        "inv_rope_quant",
        outputs[0],
        inputs,
        call,
        outputs,
        variant="quant" if quant else "plain",
        tokens=token_count(hit.node, order),
        unsupported=quant.unsupported if quant else None,
        loose=hit.env.loose | (quant.loose if quant else frozenset()),
        detail={"parts": steps},
    )


def _call(
    hit: Hit,
    order: Order,
    grouped: Grouped | None,
    given: dict[str, Tensor],
    bounds: dict[str, Bound],
    numerics: str,
) -> tuple[Tensor, ...]:
    seats: Order = order if len(order) == 3 else (*order, None)
    x = arrange(given["x"], bounds["x"], seats)
    cos, sin = (
        arrange(given[n], bounds[n], order[:2]).expand(*x.shape[:2], -1) for n in ("cos", "sin")
    )
    arguments = {"rope_rounding": hit.arguments["rounding"], "precise": numerics == "precise"}
    ops = torch.ops.dsv4fuse
    if grouped is None:
        first = heads_first(hit.node, seats)
        out = ops.inv_rope(x, cos, sin, heads_first=first, **arguments)
        return (restore(out, seats, hit.node.meta["val"].dim()),)
    quant = grouped.quant
    codes, scales = ops.inv_rope_quant(
        x, cos, sin, groups=grouped.groups, **arguments, **quant.arguments
    )
    tokens = dict(zip(seats, x.shape, strict=False))
    lead = [tokens.get(a, 1) for a in range(hit.node.meta["val"].dim() - 1) if a != seats[2]]
    axis = [grouped.groups] if grouped.axis else []
    return quant.shaped(codes, scales, [*lead, *axis, codes.shape[-1]])


def example(tokens: int, sizes: Sizes, device: str, quant: bool) -> Example:
    """o ``[T, H, D]`` bf16, fp32 tables; codes ``[T, G, H/G·D]``, raw fp32 scales per 128."""

    def fn(o: Tensor, cos: Tensor, sin: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        o = atoms.rope(o, cos.unsqueeze(1), sin.unsqueeze(1), inverse=True, rounding="once")
        grouped = o.view(o.shape[0], sizes.groups, -1)
        return atoms.group_quant(grouped, group=128, floor=1e-10, scale="fp32") if quant else o

    o = torch.randn(tokens, sizes.heads, sizes.head_dim, device=device, dtype=torch.bfloat16)
    angle = torch.rand(tokens, sizes.rope_dim // 2, device=device)
    written = o.numel() + o.numel() // 32 if quant else o.nbytes
    return Example(fn, (o, angle.cos(), angle.sin()), o.nbytes + written + 2 * angle.nbytes)


EXAMPLES = {"quant": partial(example, quant=True), "plain": partial(example, quant=False)}
FUSION = Fusion("inv_rope_quant", find, (INVERSE_ROPE, CODES), EXAMPLES)
