"""The pairs of a token and an expert, sorted by expert, with all that is made of it in one launch.

Scope: a sort of expert ids ``[S]``, stable or not (a stable order is one of those that a sort may
return), of which the order is read and at least one more: its inverse (written at its places,
scattered, sorted once more) or how many ids each expert has, and where they end (``histc``, a
comparison or one-hot summed up, ones added at the ids, then ``cumsum``; ``searchsorted``,
``bucketize``); the sorted ids themselves, returned by the sort or indexed by its order. How many
experts there are is seen of these, or of the router's top-k.
Seed: transformers' experts, by grouped products; the same in this project's plain model.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dsv4fuse import rules
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.readers import readers
from dsv4fuse.scene import Scene
from dsv4fuse.views import VIEWS

from . import _expert_ids as expert_ids
from ._expert_ids import Counted, Ids

aten = torch.ops.aten
MOST = 1024  # bins of the kernel; indices of more, of which nothing is counted, are of no experts
NAMES = ("values", "order", "inverse", "ends", "counts")


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    sorts = (n for n in scene.graph.nodes if expert_ids.ascends(n))
    return [c for n in sorts if (c := _candidate(scene, n)) is not None]


def _candidate(scene: Scene, sort: fx.Node) -> Candidate | None:
    results = {u.args[1]: u for u in sort.users if u.target is operator.getitem and u.users}
    order, x = results.get(1), sort.args[0]
    if order is None:
        return None
    values = [results[0]] if 0 in results else []
    values += [n for n in order.users if _chosen(scene, n, x, order)]
    found = Ids(scene, x, tuple(values))  # type: ignore[arg-type]
    counted = _alike(expert_ids.counted(found))
    inverses = expert_ids.inverses(scene, order)
    outputs = _outputs(scene, values, order, inverses, counted)
    kinds = {kind for _, kind in outputs}
    experts = counted[0].experts if counted else 0
    bins = max(experts, found.known or 0)
    if not bins or len(kinds - {"values"}) < 2 or not counted and bins > MOST:
        return None
    ends = next((c for c in counted if c.ends), None)
    how = _Sort(outputs, bins, experts, ends is not None and ends.negative,
                any(c.narrow for c in counted))  # fmt: skip
    drawn = bins if found.known else bins + 1  # with an expert elsewhere
    drawn = experts if any(c.inside for c in counted) else drawn
    return Candidate(
        "expert_sort", outputs[0][0], (x,), how, tuple(n for n, _ in outputs),
        reads={x: drawn},
        variant="searchsorted" if ends and ends.negative else "histc",
        tokens=_tokens(x), detail={"parts": "sorted ids → " + ", ".join(
            k for k in NAMES if k in kinds)},
    )  # fmt: skip


def _chosen(scene: Scene, node: fx.Node, x: Any, order: fx.Node) -> bool:
    """Are they the ids in this order?"""
    if node.target is aten.index.Tensor:
        source, indices = node.args[:2]
        ordered = list(indices) == [order]
    else:
        ordered = node.target is aten.gather.default and node.args[2] is order
        source = node.args[0]
    return ordered and scene.low.term(source) is scene.low.term(x)


def _alike(counted: list[Counted]) -> list[Counted]:
    """Those that one kernel gives: of as many experts, and of the same meaning, as the first."""
    ends = [c for c in counted if c.ends]
    first = next(iter((*ends, *counted)), None)
    return [
        c for c in counted
        if (c.experts, c.narrow) == (first.experts, first.narrow)
        and (not c.ends or c.negative == first.negative)
    ]  # fmt: skip


def _outputs(
    scene: Scene, values: list[fx.Node], order: fx.Node, inverses: list[fx.Node],
    counted: list[Counted],
) -> tuple[tuple[fx.Node, str], ...]:  # fmt: skip
    """The nodes that others need when they are all replaced, each with its name in NAMES."""
    found = [(n, "inverse") for n in inverses] + [(c.node, "ends") for c in counted if c.ends]
    rest = [(c.node, "counts") for c in counted if not c.ends]
    for more in (rest, [(order, "order")], [(n, "values") for n in values]):
        taken = [n for n, _ in found]
        found += [(n, k) for n, k in more if scene.live_without(n, taken)]
    return tuple(sorted(found, key=lambda nk: scene.order[nk[0]]))


def _tokens(x: Any) -> int | torch.SymInt:
    """How many tokens chose, where the ids are a view of ``[.., K]``."""
    source = x.args[0] if x.target in VIEWS and x.target is not operator.getitem else x
    shape = source.meta["val"].shape
    return math.prod(shape[:-1]) if len(shape) > 1 else shape[0]


@dataclass(frozen=True)
class _Sort:
    """A site's fused op as a function of the ids."""

    outputs: tuple[tuple[fx.Node, str], ...]
    bins: int
    experts: int
    negative: bool
    narrow: bool

    def __call__(self, ids: Tensor) -> tuple[Tensor, ...]:
        kinds = {kind for _, kind in self.outputs}
        made = torch.ops.dsv4fuse.expert_sort(
            ids, bins=self.bins, experts=self.experts, ends=self._dtype("ends"),
            counts=self._dtype("counts"), values="values" in kinds, inverse="inverse" in kinds,
            negative=self.negative, narrow=self.narrow,
        )  # fmt: skip
        found, given = [], set[str]()
        for node, kind in self.outputs:
            value = made[NAMES.index(kind)].to(node.meta["val"].dtype)
            # What leaves the graph twice are tensors of their own.
            found.append(value.clone() if kind in given and _leaves(node) else value)
            given.add(kind)
        return tuple(found)

    def _dtype(self, kind: str) -> torch.dtype | None:
        """What the first of a kind is given as; None if there is none."""
        dtypes = [n.meta["val"].dtype for n, k in self.outputs if k == kind]
        found = [d if d in rules.INTEGERS else torch.int32 for d in dtypes]
        return found[0] if found else None


def _leaves(node: fx.Node) -> bool:
    return any(u.op == "output" for n in (node, *readers(node)[1]) for u in n.users)


def example(tokens: int, sizes: Sizes, device: str, searched: bool) -> Example:
    """Each token's experts differ; the sort is stable, so that it has one result."""
    each = torch.rand(tokens, sizes.experts, device=device).argsort(-1)[:, : sizes.top_k].clone()
    moved = 4 * each.nbytes + 4 * sizes.experts
    return Example(partial(_plain, experts=sizes.experts, searched=searched), (each,), moved)


def _plain(chosen: Tensor, experts: int, searched: bool) -> tuple[Tensor, ...]:
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    if searched:
        every = torch.arange(experts, device=ids.device)
        ends = torch.searchsorted(ids, every, right=True, out_int32=True)
        return ids, order, ends, order.argsort()
    counted = ids.int() if ids.is_cuda else ids.float()
    counts = torch.histc(counted, bins=experts, min=0, max=experts - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=ids.device)
    return ids, order, ends, inverse


EXAMPLES = {
    "histc": partial(example, searched=False), "searchsorted": partial(example, searched=True),
}  # fmt: skip
FUSION = Fusion("expert_sort", find, (), EXAMPLES)
