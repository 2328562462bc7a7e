"""Compressed entries that a matrix rotates behind the rope, as the indexer's are, then fp4.

A rotation takes a power of two of lanes, so these entries have 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _fp4, _pools, _quants, _rotations
from ._case import BF16, FP16, FP32, Case, Draw, plain
from ._layouts import NORM, ROPE, TURN
from ._pools import BATCH, COUNT, RATIO
from ._rotations import ROTATIONS, SCALE, scaled

NAME, DIM = "compress_kv", 64
Fn = Callable[..., Any]
POOLED = "with the window before"
TURNED, BARE = "rope → matrix", "rope"


def inputs(
    dim: int = DIM, dtype: torch.dtype = BF16, matrix: Any = None, cache: bool = False,
    count: int = COUNT,
) -> Fn:  # fmt: skip
    """Projections with some tokens left over, bias, weight, matrix, tables[, cache]."""

    def make() -> tuple[Tensor, ...]:
        draw = Draw()
        rows = (BATCH, count * RATIO + 3, 2 * dim)
        kv, gate = (draw(*rows, dtype=dtype) for _ in "ab")
        bias, w = draw(RATIO, 2 * dim, dtype=dtype), draw(dim, dtype=dtype)
        m = torch.eye(dim).roll(1, 0) if dim & (dim - 1) else _rotations.matrix(dim)
        tables = draw.angles(BATCH, count, ROPE // 2)
        written = (draw(BATCH + 1, count + 2, dim, dtype=dtype),) if cache else ()
        return (kv, gate, bias, w, m.to(matrix or dtype), *tables, *written)

    return make


def entries(kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    """Before the rope."""
    return NORM(_pools.POOLS["hf"](*_pools.chunked(kv, gate, bias)), w)


def case(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    """``fn(y, matrix)`` behind the rope."""

    def run(kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor, m: Tensor, *tables: Tensor) -> Any:
        return fn(TURN(entries(kv, gate, bias, w), *tables), m)

    more = {"counts": {NAME: 1}, "exact": False} | more
    return Case(plain(run), make or inputs(), parts=parts or (POOLED, TURNED), **more)


def fp4(y: Tensor) -> Tensor:
    return _fp4.fake(y, 32)


def written(change: Fn) -> Fn:
    def fn(kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor, m: Tensor, cos: Tensor, sin: Tensor,
           cache: Tensor) -> None:  # fmt: skip
        cache[:BATCH, :COUNT] = change(TURN(entries(kv, gate, bias, w), cos, sin), m)

    return fn


def stored(change: Fn, *parts: str, **more: Any) -> Case:
    more = {"counts": {NAME: 1}, "exact": False} | more
    return Case(plain(written(change)), inputs(cache=True), parts=(POOLED, *parts), **more)


def in_place(y: Tensor, m: Tensor) -> Tensor:
    """As the reference does it, whose quantiser writes into its argument."""
    y = scaled(y, m)
    return y.copy_(_fp4.fake(y, 32, code=_fp4.by_masks))


def ring_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    last = torch.tensor([[1], [2]]) * RATIO - 1
    kv, gate = draw(BATCH, RATIO + 3, DIM), draw(BATCH, RATIO + 3, DIM, dtype=FP32)
    given = (kv, gate, last, torch.arange(BATCH)[:, None], draw(DIM, dtype=FP32))
    tables = draw.angles(BATCH, 1, ROPE // 2)
    return (*given, *tables, draw(BATCH, 9, DIM), _rotations.matrix(DIM).to(BF16))


def ring(*given: Tensor) -> Tensor:
    """A decode step of windows apart."""
    *rest, m = given
    return _pools.ring(overlap=False, change=lambda y: fp4(scaled(y, m)))(*rest)


SPELLINGS: dict[str, Case] = {
    **{f"rotation: {n}": case(ROTATIONS[n]) for n in ("matmul", "linear, transposed", "flattened")},
    "rotation: fp32 matrix": case(_rotations.wide, inputs(matrix=FP32)),
    "rotation: fp16": case(scaled, inputs(dtype=FP16)),
    "rotation: one entry": case(scaled, inputs(count=1), "norm", TURNED),
    "rotation: dynamic": case(scaled, dynamic={i: (0,) for i in (0, 1, 5, 6)}),
    "rotation, fp4": case(
        lambda y, m: fp4(scaled(y, m)), None, POOLED, "matrix → fp4 fake quant"
    ),
    "rotation, write": stored(scaled, "matrix → cache write"),
    "rotation, fp4, write": stored(
        lambda y, m: fp4(scaled(y, m)), "matrix → fp4 fake quant → cache write"
    ),
    "rotation, fp4, write: in place": stored(in_place, "matrix → fp4 fake quant → cache write"),
    "rotation: ring, fp4": Case(
        plain(ring), ring_inputs, {NAME: 1},
        ("Gather", "matrix → fp4 fake quant → cache write", "not computed"), exact=False,
    ),
    "rotation of 48 lanes: left outside": case(
        scaled, inputs(48), POOLED, BARE, absent=("matrix",), exact=True
    ),
    "rotation, what it turns is read too: left outside": case(
        lambda y, m: (scaled(y, m), y.sum(-1)), None, POOLED, BARE, absent=("matrix",), exact=True
    ),
    "rotation, fp4, what is quantised is read too: left outside": case(
        lambda y, m: (lambda t: (fp4(t), t.sum(-1)))(scaled(y, m)), None, POOLED, TURNED,
        absent=("fp4",),
    ),
}  # fmt: skip

KNOWN_MISSES = {
    "rotation: butterfly": case(
        _rotations.butterfly, exact=True, why="additions of pieces are no product"
    ),
}


def edit(fn: Fn, like: str = "rotation: matmul", make: Fn | None = None, **more: Any) -> Case:
    """What is left is what stands in front of the rotation, unless ``parts`` say otherwise."""
    more = {"absent": ("matrix",), "like": SPELLINGS[like]} | more
    return case(fn, make, *more.pop("parts", (POOLED, "norm", BARE)), **more)


def turned_first(kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor, m: Tensor, cos: Tensor,
                 sin: Tensor) -> Tensor:  # fmt: skip
    return TURN(scaled(entries(kv, gate, bias, w), m), cos, sin)


MUTANTS: dict[str, Case] = {
    "rotation: in front of the rope": Case(
        plain(turned_first), inputs(), {"norm_rope_cache": 1}, absent=("matrix",), exact=False,
        like=SPELLINGS["rotation: matmul"],
    ),
    "rotation: half of the matrix": edit(lambda y, m: scaled(y, m[:, : DIM // 2])),
    "rotation: by itself": edit(lambda y, m: scaled(y, y.mT @ y)),
    "rotation: over the entries": edit(
        lambda y, m: torch.einsum("bnd,nm->bmd", y, m[:COUNT, :COUNT]) * SCALE
    ),
    "rotation: a matrix for each entry": edit(
        lambda y, m: torch.einsum("bnd,nde->bne", y, torch.stack([m, -m, m]))
    ),
    "rotation: biased": edit(lambda y, m: F.linear(y, m, m[0]) * SCALE),
    "rotation: another scale a row": edit(lambda y, m: (y @ m) * y.mean(-1, keepdim=True)),
    "rotation: factor rounded first": edit(  # the product without the factor
        _rotations.rounded_first, "rotation: fp32 matrix", inputs(matrix=FP32),
        parts=(POOLED, TURNED), absent=(),
    ),
    "rotation: another sign": edit(  # of another matrix, which the op is given
        lambda y, m: scaled(y, -m), parts=(POOLED, TURNED), absent=()
    ),
    "rotation: another factor": edit(
        lambda y, m: (y @ m) * (SCALE / 2), parts=(POOLED, TURNED), absent=()
    ),
    "rotation: behind the quant": edit(
        lambda y, m: scaled(fp4(y), m), "rotation, fp4", parts=(POOLED, "rope → fp4 fake quant")
    ),
    "rotation: leading lanes through fp8": edit(
        lambda y, m: (lambda t: torch.cat((_quants.fake(t[..., :-ROPE], 16), t[..., -ROPE:]), -1))(
            scaled(y, m)
        ), "rotation, fp4", parts=(POOLED, TURNED), absent=("quant",),
    ),
    **{
        f"rotation, fp4: {name}": edit(
            lambda y, m, pieces=_fp4.MUTANTS[name]: _fp4.fake(scaled(y, m), 32, **pieces),
            "rotation, fp4", parts=(POOLED, TURNED), absent=("quant",),
        )
        for name in ("ties up", "other maximum")
    },
}  # fmt: skip
