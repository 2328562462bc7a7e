"""Operands of a kernel by named axes: which node, and what each of its axes is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dsv4fuse import rules
from dsv4fuse.contract import Axes, Operand

aten, prims = torch.ops.aten, torch.ops.prims
CASTS = (prims.convert_element_type.default, aten._to_copy.default)


@dataclass(frozen=True)
class Seat:
    """A node and its axes: numbers of coordinates, None for an axis of size one."""

    node: fx.Node
    axes: Axes


def dtype_of(seat: Seat) -> torch.dtype:
    return seat.node.meta["val"].dtype


def seats(operand: Operand) -> Iterator[Seat]:
    """The nodes that hold an operand, each behind the casts that only widen it."""
    for node, axes in operand.whole():
        while node.target in CASTS and rules.widens(
            node.args[0].meta["val"].dtype,  # type: ignore[union-attr]
            node.meta["val"].dtype,
        ):
            node = node.args[0]  # type: ignore[assignment]
        yield Seat(node, axes)


def placed(t: Tensor, axes: Axes, order: Axes) -> Tensor:
    """A tensor with its axes in that order, those it lacks of size one; no data moves."""
    for i in reversed([i for i, a in enumerate(axes) if a is None]):
        t = t.squeeze(i)
    held = [a for a in axes if a is not None]
    t = t.permute([held.index(a) for a in order if a in held])
    for i, a in enumerate(order):
        if a not in held:
            t = t.unsqueeze(i)
    return t


def unplaced(t: Tensor, order: Axes, rank: int) -> Tensor:
    """``[*order, lanes]`` as a root's own ``rank`` axes and the lanes."""
    for i in reversed([i for i, a in enumerate(order) if a is None]):
        t = t.squeeze(i)
    held = [a for a in order if a is not None]
    t = t.permute([*(held.index(a) for a in sorted(held)), len(held)])
    for a in range(rank):
        if a not in held:
            t = t.unsqueeze(a)
    return t
