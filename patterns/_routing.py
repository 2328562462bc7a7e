"""Choices of experts in a graph: what is gathered from scores, and where its index comes from."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsv4fuse import rules
from dsv4fuse.scene import Scene
from dsv4fuse.views import VIEWS, argument, base_of

aten, prims = torch.ops.aten, torch.ops.prims
MOST = 16  # experts of a token; a top-k of more is no router


@dataclass(frozen=True)
class Gathered:
    """The scores of chosen experts: ``node[.., k] = scores[.., index[.., k]]``."""

    node: fx.Node
    scores: fx.Node
    index: fx.Node


@dataclass(frozen=True)
class Choice:
    """Which experts: by a top-k of the node ``by``, or by the rows ``ids`` of ``table``."""

    experts: fx.Node  # int64
    by: fx.Node | None = None
    ordered: bool = True
    table: fx.Node | None = None
    ids: fx.Node | None = None


def gathers(scene: Scene) -> Iterator[Gathered]:
    for node in scene.nodes:
        rank, args = node.meta["val"].dim(), node.args
        if node.target is aten.gather.default and args[1] % max(rank, 1) == rank - 1:
            yield Gathered(node, args[0], args[2])
        elif node.target is aten.index.Tensor and len(args[1]) == rank == 2 and all(args[1]):
            if _counts_rows(scene, args[1][0]):
                yield Gathered(node, args[0], args[1][1])
        elif node.target is operator.getitem and _top(args[0]) and args[1] == 0:
            index = next((u for u in args[0].users if u.args[1] == 1), None)
            if index is not None:
                yield Gathered(node, args[0].args[0], index)


def _counts_rows(scene: Scene, rows: fx.Node) -> bool:
    """Is it ``arange(T)[:, None]``?"""
    count = base_of(rows)
    return (
        rows.meta["val"].dim() == 2
        and count.target is prims.iota.default
        and count.kwargs["start"] == 0
        and count.kwargs["step"] == 1
        and statically_known_true(rows.meta["val"].shape[1] == 1)
        and scene.reshaped(rows, count)
    )


def _top(node: fx.Node) -> bool:
    """Is it a top-k of a few, the largest along the last axis?"""
    if node.target is not aten.topk.default:
        return False
    rank, k = node.args[0].meta["val"].dim(), node.args[1]
    last = rank > 0 and argument(node, 2, "dim", -1) % rank == rank - 1
    return last and isinstance(k, int) and k <= MOST and argument(node, 3, "largest", True)


def choice(scene: Scene, gathered: Gathered) -> Choice | None:
    """Where the index of a gather comes from, through views of the same order."""
    node, experts = gathered.index, gathered.scores.meta["val"].shape[-1]
    # Negative ones count from the end in take_along_dim and in an index, not in a gather: a table
    # may hold them, a top-k's indices never are.
    along = node.target is aten.remainder.Scalar and node.args[1] == experts
    wraps = along or gathered.node.target is aten.index.Tensor
    node = node.args[0] if along else node
    while node.target in VIEWS - {operator.getitem} and scene.reshaped(node, node.args[0]):
        node = node.args[0]
    if node.target is operator.getitem and _top(node.args[0]) and node.args[1] == 1:
        top = node.args[0]
        return Choice(node, top.args[0], argument(top, 4, "sorted", True))
    last = node.args[0] if node.target is prims.convert_element_type.default else node
    if last.target is aten.embedding.default:
        table, ids = last.args[:2]
    elif last.target is aten.index.Tensor and len(last.args[1]) == 1:
        table, (ids,) = last.args
    else:
        return None
    kinds = [t.meta["val"].dtype in rules.INTEGERS for t in (table, ids)]
    fits = table.meta["val"].dim() == 2 and node.meta["val"].dtype == torch.int64 and all(kinds)
    return Choice(node, table=table, ids=ids) if fits and not wraps else None
