"""The KV compressor, spelled and misspelled.

One piece (layout of the windows, softmax, write) is changed at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _compress_rotations, _fp4, _pools, _quants
from ._case import BF16, FP16, FP32, Case, Draw, plain
from ._layouts import NORM, TURN
from ._pools import BATCH, COUNT, DIM, RATIO
from ._steps import tables

NAME = "compress_kv"
ROPE_DIM = 16
Fn = Callable[..., Any]
BEFORE = ("with the window before", "norm", "rope")


def _case(fn: Fn, inputs: Fn, *parts: str, **more: Any) -> Case:
    count = more.pop("count", 1)
    counts = {NAME: count} if count else {"norm_rope_cache": 1}  # of what follows the pool
    return Case(plain(fn), inputs, counts, parts, **more)


def rows_inputs(
    count: int = COUNT, series: int = 2, left: int = 3, kv: Any = BF16, gate: Any = BF16,
    bias: Any = BF16, batch: int = BATCH,
) -> Fn:  # fmt: skip
    """Projections ``[B, S, C]`` with some tokens left over, bias, weight, tables."""

    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        rows = (batch, count * RATIO + left, series * DIM)
        w = draw(DIM, dtype=BF16 if kv == FP32 else kv)
        given = draw(*rows, dtype=kv), draw(*rows, dtype=gate)
        b = draw(RATIO, series * DIM, dtype=bias)
        return (*given, b, w, *tables(draw, batch, count))

    return inputs


def rows_case(
    layout: Fn, pool: Fn = _pools.POOLS["hf"], inputs: Fn | None = None, *parts: str, **more: Any
) -> Case:
    def fn(kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pooled = pool(*layout(kv, gate, bias))
        return TURN(NORM(pooled.to(w.dtype), w), cos, sin)

    return _case(fn, inputs or rows_inputs(), *(parts or BEFORE), **more)


APART, HF = rows_inputs(series=1), _pools.POOLS["hf"]
SPELLINGS: dict[str, Case] = {
    **{f"layout: {name}": rows_case(fn) for name, fn in _pools.LAYOUTS.items()},
    **{
        f"pool: {name}": rows_case(_pools.hf, fn, decomposed=name == "in bf16")
        for name, fn in _pools.POOLS.items()
    },
    "apart": rows_case(_pools.apart, HF, APART, "Pool (every)", "norm", "rope"),
    "one window": rows_case(_pools.hf, HF, rows_inputs(1), "norm", "rope"),
    "two windows of one sequence": rows_case(_pools.hf, inputs=rows_inputs(2, batch=1)),
    "as it is": rows_case(_pools.rolled, _pools.POOLS["hf"], None, "Pool", "norm", "rope"),
    "no bias": rows_case(lambda x, g, b: _pools.hf(x, g, None)),
    "fp32 bias": rows_case(_pools.hf, inputs=rows_inputs(bias=FP32)),
    "upcast first": rows_case(
        lambda x, g, b: _pools.hf(x.float(), g.float(), b), _pools.POOLS["wide"],
        rows_inputs(bias=FP32),
    ),
    "fp32 projections": rows_case(
        _pools.hf, _pools.POOLS["wide"], rows_inputs(kv=FP32, gate=FP32, bias=FP32)
    ),
    "fp16": rows_case(_pools.hf, inputs=rows_inputs(kv=FP16, gate=FP16, bias=FP16)),
    "dynamic batch": rows_case(
        _pools.hf, dynamic={i: (0,) for i in (0, 1, 4, 5)}
    ),
}  # fmt: skip


def of_products(kv: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Whole windows of a product's rows: the window before is a slice of the same rows."""
    one = torch.eye(kv.shape[-1], dtype=kv.dtype)
    rows = (x.shape[1] // RATIO * RATIO for x in (kv, gate))
    kv, gate = ((x @ one)[:, :n] for x, n in zip((kv, gate), rows, strict=True))
    return _pools.hf(kv, gate, bias)


SPELLINGS["of products"] = rows_case(of_products, inputs=rows_inputs(left=0))


# ---- writes ------------------------------------------------------------------------------------


def written(write: Fn, change: Fn = lambda y: y) -> Fn:
    def fn(
        kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor
    ) -> None:
        pooled = _pools.POOLS["hf"](*_pools.hf(kv, gate, bias))
        write(cache, change(TURN(NORM(pooled, w), cos, sin)))

    return fn


def cache_inputs() -> tuple[Tensor, ...]:
    return (*rows_inputs()(), Draw(9)(BATCH + 1, COUNT + 2, DIM))


def in_place(y: Tensor) -> Tensor:
    y = y.clone()
    y[..., :-ROPE_DIM].copy_(_quants.fake(y[..., :-ROPE_DIM], 16))
    return y


def _slice(cache: Tensor, y: Tensor) -> None:
    cache[:BATCH, :COUNT] = y


SPELLINGS |= {
    "write: a slice": _case(written(_slice), cache_inputs, *BEFORE, "cache write"),
    "write: fake quant": _case(
        written(_slice, in_place), cache_inputs, *BEFORE, "fake quant", "cache write"
    ),
}

# ---- whole rows through fp4 --------------------------------------------------------------------

FP4_PARTS = (*BEFORE, "fp4 fake quant", "cache write")


def fp4_case(pieces: dict[str, Fn], *parts: str, **more: Any) -> Case:
    def change(y: Tensor) -> Tensor:
        return _fp4.fake(y, 16, **pieces)

    return _case(written(_slice, change), cache_inputs, *(parts or FP4_PARTS), **more)


def fp4_in_place(y: Tensor) -> Tensor:
    """As the reference does it, whose function writes into its argument."""
    y = y.clone()
    return y.copy_(_fp4.fake(y, 16, code=_fp4.by_masks))


def fp4_returned(
    kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    y = TURN(NORM(_pools.POOLS["hf"](*_pools.hf(kv, gate, bias)), w), cos, sin)
    return _fp4.fake(y, 16, code=_fp4.by_sum)


SPELLINGS |= {f"fp4: {n}": fp4_case(_fp4.VARIANTS[n]) for n in ("exponent", "where", "table")}
SPELLINGS |= {
    "fp4: in place": _case(written(_slice, fp4_in_place), cache_inputs, *FP4_PARTS),
    "fp4: no write": _case(fp4_returned, rows_inputs(), *FP4_PARTS[:-1]),
}

# ---- rings -------------------------------------------------------------------------------------

RING = ("Gather", "norm", "rope", "cache write", "not computed")


def ring_inputs(series: int, ring: int, count: int = 1) -> Fn:
    """Rings, positions of which the last of each request ends a window, and a cache."""

    def inputs(draw: Draw | None = None) -> tuple[Any, ...]:
        draw = draw or Draw()
        last = torch.tensor([[1], [2]]) * RATIO - 1  # a window with none before it, and one
        positions = last + torch.arange(1 - count, 1)
        kv = draw(BATCH, ring + 1, series * DIM)
        gate = draw(BATCH, ring + 1, series * DIM, dtype=FP32)
        own = (kv, gate, positions, torch.arange(BATCH)[:, None], draw(DIM, dtype=FP32))
        return (*own, *tables(draw, BATCH, count), draw(BATCH, 9, DIM))

    return inputs


def ring_case(fn: Fn, series: int = 2, *parts: str, **more: Any) -> Case:
    inputs = ring_inputs(series, series * RATIO + 2)
    return _case(fn, inputs, *(parts or (RING + (BEFORE[:1] if series == 2 else ()))), **more)


SPELLINGS |= {
    "ring": ring_case(_pools.ring()),
    "ring: apart": ring_case(_pools.ring(overlap=False), 1),
    "ring: clamped": _case(
        _pools.ring(at=lambda span, n: span.clamp(min=0)), ring_inputs(2, 12), *RING
    ),
    "ring: where": ring_case(_pools.ring(mask=_pools.by_where)),
    "ring: the whole cache is read": ring_case(
        _pools.ring(result=lambda cache: cache.clone()), 2, *RING[:-1]
    ),
    "ring: a state of two windows": _case(
        _pools.state, ring_inputs(2, 2 * RATIO - 1), "with the window before", "norm", "rope",
        "cache write",
    ),
}  # fmt: skip

SPELLINGS |= _compress_rotations.SPELLINGS
KNOWN_MISSES = {
    **_compress_rotations.KNOWN_MISSES,
    "rows behind the channels": rows_case(
        _pools.apart, _pools.transposed, APART,
        why="The rows of a window stand behind its channels.",
    ),
    "no maximum": rows_case(
        _pools.apart, _pools.no_maximum, APART, why="A softmax without its maximum may overflow."
    ),
}


# ---- mutants -----------------------------------------------------------------------------------


def mutant(layout: Fn, pool: Fn = _pools.POOLS["hf"], **more: Any) -> Case:
    """One edit away from the plain layout with its own pool."""
    base = {"parts": ("norm", "rope"), "count": 0, **more}
    like = base.pop("like", SPELLINGS["layout: hf"])
    return rows_case(layout, pool, base.pop("inputs", None), *base.pop("parts"), like=like, **base)


AS_IS = {"count": 1, "parts": ("Pool", "norm"), "absent": ("before",)}
APART_LIKE = {"like": SPELLINGS["apart"], "inputs": APART}
MUTANTS: dict[str, Case] = {
    **_compress_rotations.MUTANTS,
    "weights of a window without its first row": mutant(_pools.hf, _pools.shifted_weights),
    "softmax over the entries": mutant(_pools.hf, _pools.over_entries),
    "a mean": mutant(_pools.hf, _pools.averaged),
    "weights times twice": mutant(_pools.hf, _pools.twice, **AS_IS),
    "halves exchanged": mutant(_pools.exchanged, count=1, parts=BEFORE),
    "the window behind": mutant(_pools.behind, **AS_IS),
    "window 0 with zeros before": mutant(_pools.zeros_before, **AS_IS),
    "kv of the same window": mutant(_pools.own_kv, **AS_IS),
    "bias of the other half": mutant(_pools.other_bias, count=1, parts=("Pool", "norm")),
    **{
        f"fp4: {name}": fp4_case(
            _fp4.MUTANTS[name], "norm", "rope", absent=("quant",), like=SPELLINGS["fp4: exponent"]
        )
        for name in ("ties down", "ties up", "scale of next block", "other maximum")
    },
    "ring: mask one off": ring_case(
        _pools.ring(mask=lambda g, span: g.masked_fill(span.unsqueeze(-1) < 1, float("-inf"))), 2,
        "Pool", "norm", absent=("Gather",), like=SPELLINGS["ring"],
    ),
    "ring: gates of another ring": ring_case(
        _pools.ring(gate_shift=1), 2, "Pool", "norm", absent=("Gather",), like=SPELLINGS["ring"]
    ),
    "ring: one position late": ring_case(
        _pools.ring(late=1), 2, "Gather", "norm", like=SPELLINGS["ring"]
    ),
    "ring: from the cache it writes": Case(
        plain(_pools.into_itself), ring_inputs(1, 6), {NAME: 1},
        why="lie in the cache", like=SPELLINGS["ring: apart"],
    ),
    "ring: written to another row": ring_case(
        _pools.ring(slot=lambda ends: ends // RATIO + 1), 2, "Gather",
        like=SPELLINGS["ring"],
    ),
}  # fmt: skip
