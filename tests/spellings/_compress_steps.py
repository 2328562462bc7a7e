"""Decode steps that write their raw rows to the rings which their windows are then read from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _compress_rotations as turned
from . import _pools, _rotations
from ._case import BF16, FP32, Case, Draw, plain
from ._pools import BATCH, DIM, RATIO
from ._steps import tables

NAME = "compress_kv"
Fn = Callable[..., Any]
BEFORE = "with the window before"
PARTS = ("Ring write → gather", "norm", "rope", "cache write", "not computed")


def inputs(
    series: int = 2, count: int = 1, batch: int = BATCH, gate: Any = BF16, dim: int = DIM
) -> Fn:
    """Rings, positions that each end a window, this step's rows, bias, and the rest.

    Were they consecutive, rows nobody wants would go to the cache's last row, which the op leaves
    alone.
    """

    def make() -> tuple[Any, ...]:
        draw, ring = Draw(), (series + count) * RATIO
        ends = (torch.arange(batch)[:, None] + torch.arange(1, count + 1)) * RATIO - 1
        kv, gates = (draw(batch, ring + 1, series * dim, dtype=d) for d in (BF16, FP32))
        new = (draw(batch, count, series * dim, dtype=d) for d in (BF16, gate))
        bias = draw(RATIO, series * dim, dtype=FP32)
        rest = (draw(dim, dtype=FP32), *tables(draw, batch, count), draw(batch, 9, dim))
        return (kv, gates, ends, *new, bias, *rest)

    return make


def of_kept(positions: Tensor, n: int) -> Tensor:
    """As the plain model: the spare row for what is padding."""
    kept = (positions >= 0) & (positions > positions.amax(dim=1, keepdim=True) - n)
    return torch.where(kept, positions % n, n)


def step(
    page: Fn = lambda b, p: torch.arange(b)[:, None],
    read: Fn = lambda rows: rows,
    at: Fn = of_kept,
    gate_at: Fn | None = None,
    gates: Fn = lambda new, bias, p: new + bias[p % RATIO],
    overlap: bool = True,
    first: Fn = lambda kv, gate: (kv, gate),
    **ring: Any,
) -> Fn:
    def fn(
        kv: Tensor, gate: Tensor, positions: Tensor, new_kv: Tensor, new_gate: Tensor,
        bias: Tensor, *rest: Tensor,
    ) -> Any:  # fmt: skip
        rows, n = page(kv.shape[0], positions), kv.shape[1] - 1
        held = first(kv, gate)
        kv[rows, at(positions, n)] = new_kv
        gate[rows, (gate_at or at)(positions, n)] = gates(new_gate, bias, positions)
        return _pools.ring(overlap, **ring)(*held, positions, read(rows), *rest)

    return fn


def case(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    more = {"counts": {NAME: 1}} | more
    return Case(plain(fn), make or inputs(), parts=parts or (*PARTS, BEFORE), **more)


def rotated(*given: Tensor) -> Any:
    *rest, m = given
    change = lambda y: turned.fp4(_rotations.scaled(y, m))  # noqa: E731
    return step(overlap=False, change=change)(*rest)


def rotated_inputs() -> tuple[Any, ...]:
    return (*inputs(1, dim=turned.DIM)(), _rotations.matrix(turned.DIM).to(BF16))


SPELLINGS: dict[str, Case] = {
    "step": case(step()),
    "step: several tokens": case(step(), inputs(count=3)),
    "step: apart": case(step(overlap=False), inputs(1), *PARTS),
    "step: one request": case(step(), inputs(batch=1)),
    "step: one request, several tokens": case(step(), inputs(batch=1, count=2)),
    "step: modulo": case(step(at=lambda p, n: p % n), inputs(count=2)),
    "step: pages expanded": case(
        step(page=lambda b, p: torch.arange(b)[:, None].expand_as(p)), inputs(count=2)
    ),
    "step: bias first": case(step(gates=lambda g, b, p: b[p % RATIO] + g.float())),
    "step: no bias": case(step(gates=lambda g, b, p: g), inputs(gate=FP32)),
    "step: gates of another kind": case(step(gates=lambda g, b, p: g * 2 + b[0])),
    "step: rotation, fp4": case(
        rotated, rotated_inputs, "Ring write → gather", "matrix → fp4 fake quant → cache write",
        exact=False,
    ),
}  # fmt: skip


def edit(fn: Fn, make: Fn | None = None, **more: Any) -> Case:
    """The rows are written by Inductor, the windows still read by the op."""
    more = {"like": SPELLINGS["step"], "absent": ("Ring write",)} | more
    return case(fn, make, *more.pop("parts", ("Gather", "norm", "rope")), **more)


def another(kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The rings as they were."""
    return kv.clone(), gate.clone()


def twice(kv: Tensor, gate: Tensor, positions: Tensor, new_kv: Tensor, *rest: Tensor) -> Any:
    """One row more is written, before."""
    kv[:, 0] = new_kv[:, 0] * 2
    return step()(kv, gate, positions, new_kv, *rest)


MUTANTS: dict[str, Case] = {
    "step: pages that are given": edit(step(page=lambda b, p: 1 - p // RATIO)),
    "step: pages backwards": edit(step(page=lambda b, p: b - 1 - torch.arange(b)[:, None])),
    "step: a page that is shared": edit(step(page=lambda b, p: torch.arange(b)[:, None] // 2)),
    "step: pages from 1 on": edit(
        step(page=lambda b, p: torch.arange(b)[:, None] - 1)  # the last one comes first
    ),
    "step: another page is read": edit(step(read=lambda rows: rows.flip(0))),
    "step: gates to other rows": edit(step(gate_at=lambda p, n: (p + 1) % n)),
    "step: read before it is written": edit(step(first=another)),
    "step: gates from before": edit(step(first=lambda kv, gate: (kv, gate.clone()))),
    "step: one ring is written twice": edit(twice),
    "step: another row": edit(  # of the ring, which the op is told
        step(at=lambda p, n: (p + 1) % n), absent=(), parts=("Ring write",)
    ),
}
