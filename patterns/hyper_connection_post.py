"""Hyper-connections behind a sublayer: its output on each stream, and the streams mixed.

Scope: ``post_k · out + Σ_j comb[j, k] · x_j`` for streams x ``[.., 4, D]``, the sum over j a matrix
product or a sum of products; in fp32 with one rounding, or every operation in the streams' dtype.
Source: DeepSeek-V4's hc_post.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dsv4fuse import atoms
from dsv4fuse.contract import Operand, contraction
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.maps import Map
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex, Term

from . import _hyper as hyper
from . import _hyper_built as built
from ._hyper import F32, SLACK, Shape, whole


@dataclass(frozen=True)
class Expansion:
    """The tensors of a site and where it rounds."""

    out: fx.Node
    streams: fx.Node
    post: fx.Node
    comb: fx.Node
    rounding: str


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    found = []
    for node in scene.nodes:
        made = expansion(scene, node)
        if made is not None and scene.first(node):
            found.append(_candidate(scene, node, made, numerics))
    return found


def expansion(scene: Scene, node: fx.Node) -> Expansion | None:
    """The hyper-connection whose new streams a node ``[.., n, D]`` holds."""
    size, term = hyper.shape(node), scene.low.term(node)
    if len(size) < 2 or not isinstance(size[-2], int) or isinstance(term, Complex):
        return None
    wide = term.args[0] if term.op == "cast" else term
    if wide.op != "add" or wide.dtype not in (F32, term.dtype):
        return None
    rounding = "once" if wide.dtype == F32 else "every"
    for product, mixed in (wide.args, wide.args[::-1]):
        if product.op == "mul" and (mixed.op in ("load", "fold")):
            streams = _mixed(scene, mixed, size, rounding)
            for p, o in (product.args, product.args[::-1]) if streams else ():
                found = _added(scene, p, o, size, rounding)
                if found is not None and _alike(found[0], streams[0], node):
                    return Expansion(found[0], streams[0], found[1], streams[1], rounding)
    return None


def _alike(*nodes: fx.Node) -> bool:
    return len({n.meta["val"].dtype for n in nodes}) == 1


def _mixed(
    scene: Scene, term: Term, size: Shape, rounding: str
) -> tuple[fx.Node, fx.Node] | None:
    """(streams, comb) of ``Σ_j comb[j, k] · x_j``."""
    shown = built.held_at(scene, term, size)
    found = contraction(scene, shown) if shown is not None else None
    n, width = size[-2:]
    if found is None or found.size != n or found.rounded and rounding == "every":
        return None
    if found.product.meta["val"].dtype != term.dtype:
        return None
    lead = tuple(whole(i, s) for i, s in enumerate(size[:-2]))
    j, k, d = whole(found.summed, n), whole(len(lead), n), whole(len(lead) + 1, width)
    for left, right in ((found.left, found.right), (found.right, found.left)):
        comb = _held(scene, left, (*lead, j, k), (*size[:-1], n), rounding)
        x = _held(scene, right, (*lead, j, d), size, "once")
        if comb is not None and x is not None:
            return x, comb
    return None


def _added(
    scene: Scene, p: Term, o: Term, size: Shape, rounding: str
) -> tuple[fx.Node, fx.Node] | None:
    """(out, post) of ``post_k · out``."""
    lead = tuple(whole(i, s) for i, s in enumerate(size[:-2]))
    k, d = whole(len(lead), size[-2]), whole(len(lead) + 1, size[-1])
    post = _held(scene, Operand(p, ()), (*lead, k), size[:-1], rounding)
    out = _held(scene, Operand(o, ()), (*lead, d), (*size[:-2], size[-1]), "once")
    return None if post is None or out is None else (out, post)


def _held(
    scene: Scene, operand: Operand, m: Map, size: Shape, rounding: str
) -> fx.Node | None:
    """The node of a factor: in front of a widening, or of the rounding that the kernel does."""
    term = operand.term
    if rounding == "every" and term.op == "cast" and term.args[0].dtype == F32:
        wide = hyper.holding(scene, term.args[0], m, size)
        if wide is not None:
            return wide
    return hyper.holding(scene, term, m, size)


def _candidate(
    scene: Scene, node: fx.Node, made: Expansion, numerics: str
) -> Candidate:
    inputs = tuple(dict.fromkeys((made.out, made.streams, made.post, made.comb)))
    lead = node.meta["val"].dim() - 2

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        new = torch.ops.dsv4fuse.hyper_connection_post(
            *(flat(given[n], lead) for n in (made.out, made.streams, made.post, made.comb)),
            rounding=made.rounding, precise=numerics == "precise",
        )  # fmt: skip
        return (new.view(*given[made.out].shape[:-1], *new.shape[1:]),)

    return Candidate(
        "hyper_connection_post", node, inputs, call, (node,), variant="plain",
        tokens=math.prod(node.meta["val"].shape[:-2]),
        loose=built.loosened(scene, (node,), inputs),
        detail={"parts": f"post · out + combᵀ · streams ({made.rounding})"},
    )  # fmt: skip


def flat(t: Tensor, lead: int) -> Tensor:
    """The leading axes as one."""
    return t.unsqueeze(0) if lead == 0 else t.flatten(0, lead - 1)


def example(tokens: int, sizes: Sizes, device: str) -> Example:
    """out ``[T, D]``, streams ``[T, 4, D]`` bf16, post and comb fp32; every operation rounds."""
    d = built.hidden(sizes)

    def fn(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return atoms.hyper_expand(out, x, post, comb, rounding="every")

    x = torch.randn(tokens, 4, d, device=device, dtype=torch.bfloat16)
    weights = torch.rand(tokens, 4, device=device), torch.rand(tokens, 4, 4, device=device)
    moved = x.nbytes * 9 // 4 + tokens * 80
    return Example(fn, (x[:, 0].clone(), x, *weights), moved, SLACK)


EXAMPLES = {"plain": example}
FUSION = Fusion("hyper_connection_post", find, (), EXAMPLES)
