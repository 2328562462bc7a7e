"""Leading axes: from a graph's order of batch, sequence and heads to a kernel's, and back.

No data moves here: axes are permuted, unit axes come and go, broadcasts get stride 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsv4fuse.match import Bound

Order = tuple[int | None, ...]


def arrange(t: Tensor, bound: Bound, order: Order) -> Tensor:
    """A bound tensor as ``[*order, lanes]``: axes permuted, unit axes added; no data moves.

    ``order`` names the root's axes; one that the tensor lacks becomes an axis of size one.
    """
    if bound.part:
        t = torch.view_as_real(t)[..., 0 if bound.part == "re" else 1]
    if not bound.laned:
        t = t.unsqueeze(-1)
    rows = list(bound.rows)
    for axis in reversed([a for a, r in enumerate(rows) if r is None]):
        t = t.squeeze(axis)
        del rows[axis]
    present = [r for r in order if r is not None and r in rows]
    t = _permuted(t, [rows.index(r) for r in present])
    for axis, r in enumerate(order):
        if r is None or r not in rows:
            t = t.unsqueeze(axis)
    return t


def restore(t: Tensor, order: Order, rank: int) -> Tensor:
    """``arrange`` undone: ``[*order, lanes]`` as the root's own ``rank`` axes."""
    for axis in reversed([a for a, r in enumerate(order) if r is None]):
        t = t.squeeze(axis)
    held = [r for r in order if r is not None]
    axes = sorted(held)
    t = _permuted(t, [held.index(a) for a in axes])
    for axis in range(rank - 1):
        if axis not in axes:
            t = t.unsqueeze(axis)
    return t


def _permuted(t: Tensor, rows: list[int]) -> Tensor:
    return t if rows == sorted(rows) else t.permute(*rows, len(rows))


def head_order(x: Bound, cos: Bound, lone: str = "batch") -> Order | None:
    """Which of the root's axes are (batch, sequence[, heads]): heads share a rotation.

    Where batches share it too, an axis in front of the sequence is the batch and the next the
    heads; ``lone`` says which a single one is. None when there are more axes than that.
    """
    turned = [r for r in cos.rows if r is not None]
    places = {r: i for i, r in enumerate(x.rows) if r is not None}
    shared = [r for r in places if r not in turned]
    if any(r not in places for r in turned):
        return None
    # One rotation for all, as in a decode step: heads stand behind the sequence's one place.
    one = next((i for i, r in enumerate(x.rows) if r is None), len(x.rows))
    first = min((places[t] for t in turned), default=one)
    batch = [r for r in shared if places[r] < first]
    heads = [r for r in shared if r not in batch]
    if len(batch) == 2 and not heads or len(batch) == 1 and not heads and lone == "heads":
        heads = [batch.pop()]
    tokens = [*batch, *turned]
    if len(tokens) > 2 or len(heads) > 1:
        return None
    tokens.sort(key=lambda r: places[r])
    return (*(None,) * (2 - len(tokens)), *tokens, *heads)


def token_count(root: fx.Node, order: Order) -> int | torch.SymInt:
    """How many tokens (batch times sequence) a root of that order has."""
    shape = root.meta["val"].shape
    return math.prod(shape[a] for a in order[:2] if a is not None)


def heads_first(root: fx.Node, order: Order) -> bool:
    """Do the root's heads lie in front of its sequence in memory? An op behind a transposed tensor
    keeps the order of what it reads, whatever the order of the axes."""
    _, sequence, head = order
    if sequence is None or head is None:
        return False
    value = root.meta["val"]
    if any(statically_known_true(value.shape[a] == 1) for a in (sequence, head)):
        return head < sequence
    return statically_known_true(value.stride(head) > value.stride(sequence))


def through(inner: Bound, outer: Bound) -> Bound:
    """``inner``, found at the node of ``outer``, with its axes named by outer's root."""
    rows = tuple(None if r is None else outer.rows[r] for r in inner.rows)
    return Bound(inner.node, rows, inner.part, inner.laned)
