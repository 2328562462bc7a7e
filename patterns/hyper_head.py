"""Hyper-connections at the end of a model: the streams collapsed into one.

Scope: as ``hyper_connection_pre`` without post and comb: fn ``[n, n·D]``, one scale.
Source: DeepSeek-V4's hc_head.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dsv4fuse import atoms
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex

from . import _hyper as hyper
from . import _hyper_built as built
from ._hyper import F32, SLACK, whole


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    found = (_candidate(scene, node) for node in scene.nodes)
    return [c for c in found if c is not None]


def _candidate(scene: Scene, gate: fx.Node) -> Candidate | None:
    """A site from the node ``[.., n]`` of its weights, ``sigmoid(z) + eps``."""
    size, term = hyper.shape(gate), scene.low.term(gate)
    if isinstance(term, Complex) or term.op != "add" or not size or term.dtype != F32:
        return None
    z, eps = sorted(term.args, key=lambda t: t.op == "const")
    if z.op != "sigmoid" or eps.op != "const" or not isinstance(size[-1], int):
        return None
    if not scene.first(gate):
        return None
    *lead, n = size
    mixes = hyper.affine(scene, z.args[0], tuple(lead), whole(len(lead), n), 1, 0)
    if mixes is None or mixes.count != n or hyper.shape(mixes.base) != (n,):
        return None
    y = built.collapsed(scene, mixes, tuple(lead), eps.args[0])
    if y is None or not mixes.fits(y, 1):
        return None
    inputs = tuple(dict.fromkeys(mixes.inputs))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        out = torch.ops.dsv4fuse.hyper_head(
            *mixes.tensors([given[i] for i in mixes.inputs]),
            norm_eps=mixes.eps, eps=eps.args[0], before=mixes.before,
        )  # fmt: skip
        return (mixes.shaped(out, given[mixes.streams], y),)

    return Candidate(
        "hyper_head", y, inputs, call, (y,), variant="plain", tokens=mixes.tokens,
        loose=built.loosened(scene, (y,), inputs), detail={"parts": "mixes → pre → collapse"},
        spread=mixes.spread(), judged="exact",
    )  # fmt: skip


def example(tokens: int, sizes: Sizes, device: str) -> Example:
    """Streams ``[T, 4, D]`` bf16, fn fp32."""
    d = built.hidden(sizes)

    def fn(x: Tensor, w: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        mixes = atoms.hyper_mixes(x, w, eps=1e-6, before=True)
        return atoms.hyper_collapse(x, torch.sigmoid(mixes * scale + base) + 1e-6)

    x = torch.randn(tokens, 4, d, device=device, dtype=torch.bfloat16)
    w = torch.randn(4, 4 * d, device=device) / (4 * d) ** 0.5
    small = torch.rand(1, device=device), torch.randn(4, device=device)
    return Example(fn, (x, w, *small), x.nbytes * 5 // 4 + w.nbytes, SLACK)


EXAMPLES = {"plain": example}
FUSION = Fusion("hyper_head", find, (), EXAMPLES)
