"""The experts' grouped product: each row by its expert's weight, for few rows at memory's rate.

Scope: ``torch.nn.functional.grouped_mm`` (and ``torch._grouped_mm``, which transformers calls) of
rows ``[S, K]`` that are sorted by expert, weights ``[E, K, N]`` of any strides, and the end of each
expert's rows, in bf16. torch's product takes 1.3 to 2.2 times what memory takes for the weights
where an expert has few rows, as in a decode step. How many there are must be known: a launch for
few is slow for many, and where an expert has hundreds torch's is as fast.
Sources: transformers' experts by grouped products; this project's plain model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.scene import Scene
from dsv4fuse.views import argument

from ._hyper_built import hidden

aten = torch.ops.aten
MANY = 128  # rows for each expert: measured ratios of torch's time are 0.8 there, 1.08 at 384
EXPERTS = 64  # of the example, of which as many copies as the benchmark makes fit a GPU


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    nodes = (n for n in scene.graph.nodes if n.target is aten._grouped_mm.default)
    return [c for n in nodes if (c := _candidate(n)) is not None]


def _candidate(node: fx.Node) -> Candidate | None:
    x, w, ends = (argument(node, i, name, None) for i, name in enumerate(("self", "mat2", "offs")))
    if ends is None or argument(node, 3, "bias", None) is not None:
        return None
    a, b = x.meta["val"], w.meta["val"]
    if a.dim() != 2 or b.dim() != 3 or {a.dtype, b.dtype} != {torch.bfloat16}:
        return None
    if argument(node, 4, "out_dtype", None) not in (None, torch.bfloat16):
        return None

    def call(*tensors: Tensor) -> tuple[Tensor]:
        return (torch.ops.dsv4fuse.expert_mm(*tensors),)

    return Candidate(
        "expert_mm", node, (x, w, ends), call, (node,), variant="rows", tokens=a.shape[0],
        reads={ends: a.shape[0]}, ascending=frozenset({ends}), loose=frozenset({"order of a sum"}),
        unsupported=_unsupported(a.shape[0], b.shape[0]),
        detail={"parts": f"{a.shape[0]} rows by expert → grouped product, {b.shape[0]} experts"},
    )  # fmt: skip


def _unsupported(rows: int | torch.SymInt, experts: int | torch.SymInt) -> str | None:
    if not isinstance(rows, int) or not isinstance(experts, int):
        return "How many rows there are is a symbol, and many are better multiplied by torch."
    if rows > MANY * experts:
        return f"Of more than {MANY} rows for each expert torch's product is as fast."
    return None


def example(tokens: int, sizes: Sizes, device: str) -> Example:
    """As many rows, each by one of 64 experts at random; the weights of gate and up."""
    d, n = hidden(sizes), 2 * sizes.inter
    x = torch.randn(tokens, d, device=device).bfloat16()
    w = torch.empty(EXPERTS, n, d, device=device, dtype=torch.bfloat16).normal_(0, d**-0.5)
    ids = torch.randint(EXPERTS, (tokens,), device=device).sort().values
    every = torch.arange(EXPERTS, device=device)
    ends = torch.searchsorted(ids, every, right=True, out_int32=True)

    def fn(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x, w.mT, offs=ends)

    moved = x.nbytes + tokens * n * 2 + int(ids.unique().numel()) * n * d * 2
    return Example(fn, (x, w, ends), moved, d * 2.0**-24, 2 * tokens * n * d)


EXAMPLES = {"rows": example}
FUSION = Fusion("expert_mm", find, (), EXAMPLES, varied=True)
