"""The lightning indexer's queries: rope [→ matrix rotation] [→ fp8 quant, fp8 or fp4 fake quant].

Scope: q ``[.., H, D]`` turned on the trailing interleaved pairs, then at least one step more: a
product with a square matrix that the graph holds (DeepSeek's Hadamard rotation, as ``q @ m`` or a
linear layer, scaled or not), codes and scales in groups, or q through fp8 or fp4 and back. Rope
alone is ``norm_rope_cache``. Head weights that take q's scale stay outside: they are one product a
head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dsv4fuse import atoms
from dsv4fuse.chains import Quantised, divides_by_product, quantised
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.layout import Order, arrange, head_order, token_count
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.specs import FAKE_QUANT, ROPE, code_distance

from ._turns import Turn, rotated, turns

NAME = "indexer_q"


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    ropes = [(h, order) for h in scene.outermost(ROPE) if (order := _order(h))]
    turned = turns(scene) if ropes else {}
    ends = {h.node: turned[h.node].node if h.node in turned else h.node for h, _ in ropes}
    quants = quantised(rotated(scene)) if ropes else []
    fakes = rotated(scene).outermost(FAKE_QUANT) if ropes else []
    found = []
    for hit, order in ropes:
        turn, last = turned.get(hit.node), ends[hit.node]
        quant = next((q for q in quants if _whole(q, last)), None)
        fake = next((f for f in fakes if f.x.node is last and f.x.straight), None)
        if fake and quant and not scene.live_without(quant.codes.node, [fake.node]):
            quant = None
        if turn or quant or fake:
            found.append(_candidate(hit, order, turn, quant, fake, numerics))
    return found


def _order(hit: Hit) -> Order | None:
    """Batch, sequence, heads, where they stand in this order."""
    order = head_order(hit.x, hit.cos)
    if order is None or len(order) != 3:
        return None
    held = [a for a in order if a is not None]
    shape = hit.node.meta["val"].shape
    rest = [n for a, n in enumerate(shape[:-1]) if a not in held]
    return order if held == sorted(held) and all(n == 1 for n in rest) else None


def _whole(quant: Quantised, node: fx.Node) -> bool:
    """Are these the codes of this value, as it lies there?"""
    codes, value = quant.codes.node.meta["val"], node.meta["val"]
    blocked = bool(quant.codes.arguments["blocked"])
    same = codes.dim() == value.dim() + blocked and codes.dtype == atoms.FP8
    return same and quant.x.node is node and quant.x.straight


def _candidate(
    hit: Hit, order: Order, turn: Turn | None, quant: Quantised | None, fake: Hit | None,
    numerics: str,
) -> Candidate:  # fmt: skip
    bounds = {name: hit.env.holes[name] for name in ("x", "cos", "sin")}
    nodes = [b.node for b in bounds.values()] + ([turn.matrix.node] if turn else [])
    inputs = tuple(dict.fromkeys(nodes))
    step = quant.codes if quant else fake
    how = _arguments(hit, turn, step) | {"precise": numerics == "precise"}

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensors[inputs.index(b.node)] for name, b in bounds.items()}
        matrix = tensors[inputs.index(turn.matrix.node)] if turn else None
        return _call(hit, order, turn, quant, given, matrix, how)

    outputs = quant.outputs if quant else ((fake.node if fake else turn.node),)  # type: ignore
    kinds = ["rope", "matrix" * (turn is not None), "fp8 quant" * (quant is not None)]
    if quant is None and fake is not None:
        kinds += ["fp4 fake quant" if how.get("fp4") else "fake quant"]
    loose = hit.env.loose | (step.env.loose if step else frozenset())
    return Candidate(
        NAME,
        outputs[0],
        inputs,
        call,
        outputs,
        variant="quant" if quant else "fake fp4" if how.get("fp4") else "fake" if fake else "plain",
        tokens=token_count(hit.node, order),
        unsupported=divides_by_product(step.arguments) if step else None,
        loose=loose | ({"order of the sums"} if turn else frozenset()),
        code=_distances(quant, fake) if turn else {},
        detail={"parts": " → ".join(k for k in kinds if k)},
    )


def _distances(quant: Quantised | None, fake: Hit | None) -> dict[fx.Node, float]:
    """How far the turn's sums, in another order, may move what is rounded behind them."""
    if quant is not None:
        return quant.distances
    return {fake.node: code_distance(fake.arguments)} if fake else {}


def _arguments(hit: Hit, turn: Turn | None, step: Hit | None) -> dict[str, Any]:
    """What the fused op is told besides its tensors."""
    how = {"rope_rounding": hit.arguments["rounding"], "factor": turn.factor if turn else 1.0}
    if step is not None:
        how |= {k: step.arguments[k] for k in ("group", "scale", "via")}
        how["floor"] = step.env.scalars.get("floor", 0.0)
        how |= {k: step.arguments[k] for k in ("fp4",) if k in step.arguments}
    return how


def _call(
    hit: Hit, order: Order, turn: Turn | None, quant: Quantised | None, given: dict[str, Tensor],
    matrix: Tensor | None, how: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    rank = hit.node.meta["val"].dim()
    x = arrange(given["x"], hit.x, order)
    cos, sin = (
        arrange(given[n], hit.env.holes[n], order[:2]).expand(*x.shape[:2], -1)
        for n in ("cos", "sin")
    )
    if turn is not None and matrix is not None:
        matrix = turn.shown(matrix)
    held = dict(zip(order, x.shape, strict=False))
    shape = [*(held.get(a, 1) for a in range(rank - 1)), x.shape[-1]]
    ops = torch.ops.dsv4fuse
    if quant is None:
        return (ops.indexer_q(x, cos, sin, matrix, **how).view(shape),)
    return quant.shaped(*ops.indexer_q_quant(x, cos, sin, matrix, **how), shape)


def example(tokens: int, sizes: Sizes, device: str, kind: str) -> Example:
    """q ``[T, H, 128]`` bf16 of integers, turned by no angle, so that every sum is exact."""

    def fn(x: Tensor, cos: Tensor, sin: Tensor, m: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = atoms.rope(x, cos.unsqueeze(1), sin.unsqueeze(1), rounding="once")
        if kind == "quant":
            return atoms.group_quant(x, group=128, floor=1e-4, scale="pow2")
        x = torch.matmul(x, m) * 128**-0.5
        fp4 = "kept" if kind == "fake fp4" else ""
        quant = dict(group=32, floor=6 * 2.0**-126 if fp4 else 1e-4, scale="pow2", fp4=fp4)
        return x if kind == "plain" else atoms.fake_quant(x, **quant)  # type: ignore[arg-type]

    x = torch.randint(-3, 4, (tokens, min(sizes.heads, 64), 128), device=device).bfloat16()
    cos = torch.ones(tokens, sizes.rope_dim // 2, device=device)
    m = (torch.randint(0, 2, (128, 128), device=device) * 2 - 1).bfloat16()
    written = x.numel() + x.numel() // 32 if kind == "quant" else x.nbytes
    return Example(fn, (x, cos, torch.zeros_like(cos), m), x.nbytes + written + 2 * cos.nbytes)


KINDS = ("plain", "fake", "fake fp4", "quant")
EXAMPLES = {kind: partial(example, kind=kind) for kind in KINDS}
FUSION = Fusion(NAME, find, (FAKE_QUANT,), EXAMPLES)
