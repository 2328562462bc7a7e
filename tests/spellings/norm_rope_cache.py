"""RMSNorm → rope → cache write for q and kv, spelled and misspelled.

One piece (norm, rope, layout, fake quant, write) is changed at a time; the pieces themselves are
in the files with an underscore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _norms, _packed, _quants, _rope_mutants, _ropes, _write_mutants
from ._case import BF16, FP16, FP32, Case, Draw, plain
from ._layouts import BATCH, DIM, HEADS, LAYOUTS, NORM, ROPE, SEQ, TURN, Layout
from ._norm_rope_mutants import (
    alpha,
    alpha_eps,
    before_rope,
    from_itself,
    old_between,
    rounded_eps,
    shifted,
    two_names,
)
from ._partial_sums import (
    MUTANTS as SUM_MUTANTS,
)
from ._partial_sums import (
    SUMS,
    both_of_parts,
    both_of_parts_inputs,
    parts_inputs,
)
from ._steps import Layer, both, both_inputs, busy, layer_inputs, several, tables
from ._writes import DECODE, FLAT, ONE_HEAD, PAGES, PREFILL, Write, one_sequence

NAME = "norm_rope_cache"
GROUP = 16
B, S, H = BATCH, SEQ, HEADS
Fn = Callable[..., Any]


def _case(fn: Fn, inputs: Fn, *parts: str, **more: Any) -> Case:
    count = more.pop("count", 1)
    return Case(plain(fn), inputs, {NAME: count} if count else {}, parts, **more)


def q_inputs(
    dtype: torch.dtype = BF16, weight: torch.dtype | None = None, table: Any = FP32
) -> Callable[[], tuple[Tensor, ...]]:
    """q ``[B,S,H,D]``, weight, tables ``[B,S,1,R/2]``."""

    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        x, w = draw(BATCH, SEQ, HEADS, DIM, dtype=dtype), draw(DIM, dtype=weight or dtype)
        return (x, w, *tables(draw, BATCH, SEQ, 1, dtype=table))

    return inputs


def q_case(norm: Fn, rope: Fn, inputs: Fn | None = None, *parts: str, **more: Any) -> Case:
    def fn(x: Tensor, w: Tensor, *table: Tensor) -> Tensor:
        return rope(norm(x, w), *table)

    return _case(fn, inputs or q_inputs(), *(parts or ("Q: norm", "rope")), **more)


def _halves(x: Tensor) -> Tensor:
    """Cut and joined again: nothing."""
    return torch.cat(x.chunk(2, dim=-1), dim=-1)


SPELLINGS: dict[str, Case] = {}
for _table, _weight in ((_norms.PLAIN, None), (_norms.BF16_WEIGHT, None)):
    for _name, _norm in _table.items():
        SPELLINGS[f"norm: {_name}"] = q_case(_norm, TURN, exact=_name not in _norms.LOOSE)
for _name, _norm in _norms.FP32_WEIGHT.items():
    SPELLINGS[f"norm: {_name}"] = q_case(
        _norm, TURN, q_inputs(weight=FP32), exact=_name not in _norms.LOOSE
    )
for _dtype in (FP16, FP32):
    for _name in ("hf_unweighted", "once", "hf_weighted", "functional", "every_weighted"):
        SPELLINGS[f"norm: {_name}, {_dtype}"] = q_case(
            (_norms.PLAIN | _norms.BF16_WEIGHT)[_name], TURN, q_inputs(_dtype)
        )
for _name, _rope in _ropes.REAL.items():
    SPELLINGS[f"rope: {_name}"] = q_case(NORM, _rope)
for _name, _rope in _ropes.COMPLEX.items():
    SPELLINGS[f"rope: {_name}"] = q_case(NORM, _rope, q_inputs(table=None))
for _name, _rope in _ropes.EVERY.items():
    SPELLINGS[f"rope: {_name}"] = q_case(NORM, _rope, q_inputs(table=BF16))
for _dtype in (FP16, FP32):
    for _name in ("hf", "copy_into_the_slice", "slices_and_stack"):
        SPELLINGS[f"rope: {_name}, {_dtype}"] = q_case(NORM, _ropes.REAL[_name], q_inputs(_dtype))
SPELLINGS |= {
    "the reference's q": q_case(
        _norms.PLAIN["reference_in_place"], _ropes.COMPLEX["reference"], q_inputs(table=None)
    ),
    "transformers' q": q_case(
        _norms.PLAIN["hf_unweighted"], _ropes.REAL["hf"], q_inputs(table=BF16)
    ),
    "rope of rounded tables": q_case(NORM, _ropes.REAL["hf"], q_inputs(table=BF16)),
    "halves joined again": q_case(lambda x, w: _halves(NORM(_halves(x), w)), TURN),
    "rows joined again": q_case(lambda x, w: torch.stack(NORM(x, w).unbind(0)), TURN),
    "heads joined again": q_case(lambda x, w: torch.cat(NORM(x, w).split(1, 2), 2), TURN),
    "no norm": q_case(lambda x, w: x, TURN, None, "Q: rope"),
    "dynamic batch and sequence": q_case(
        NORM, TURN, dynamic={0: (0, 1), 2: (0, 1), 3: (0, 1)}
    ),
    "dynamic, complex": q_case(
        NORM, _ropes.COMPLEX["reference"], q_inputs(table=None), dynamic={0: (0, 1), 2: (0, 1)}
    ),
    "dynamic, by halves": q_case(
        NORM, _ropes.REAL["hf"], dynamic={0: (0, 1), 2: (0, 1), 3: (0, 1)}
    ),
}


# ---- layouts -----------------------------------------------------------------------------------


def _layout(layout: Layout, **more: Any) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        return (draw(*layout.shape), draw(DIM), *tables(draw, *layout.table))

    core = layout.around(lambda x, w, *table: TURN(NORM(x, w), *table))
    return _case(core, inputs, "norm", "rope", **more)


SPELLINGS |= {f"layout: {name}": _layout(layout) for name, layout in LAYOUTS.items()}


# ---- kv: fake quant and write ------------------------------------------------------------------


def kv_inputs(write: Write) -> Callable[[], tuple[Any, ...]]:
    """kv rows, weight, tables, the cache and where to write."""

    def inputs() -> tuple[Any, ...]:
        draw = Draw()
        rows = draw(*write.rows, DIM)
        table = tables(draw, *write.rows)
        cache = draw(*write.cache, DIM)
        return (rows, draw(DIM), *table, cache, *write.where(draw, write.rows, write.cache))

    return inputs


def kv_case(write: Write, change: Fn = lambda y: y, *parts: str, **more: Any) -> Case:
    def fn(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, *where: Any) -> Any:
        return write.fn(cache, change(TURN(NORM(x, w), cos, sin)), *where)

    return _case(
        fn, kv_inputs(write), *(parts or ("Kv: norm", "rope", "cache write")), **more
    )


def in_place(pieces: dict[str, Fn]) -> Fn:
    """Fake quant of the nope lanes, copied over them as the reference does."""

    def change(y: Tensor) -> Tensor:
        y = y.clone()
        y[..., :-ROPE].copy_(_quants.fake(y[..., :-ROPE], GROUP, **pieces))
        return y

    return change


def joined(pieces: dict[str, Fn]) -> Fn:
    def change(y: Tensor) -> Tensor:
        nope, turned = y.split([DIM - ROPE, ROPE], dim=-1)
        return torch.cat((_quants.fake(nope, GROUP, **pieces), turned), dim=-1)

    return change


WRITES = FLAT | DECODE | PREFILL
SPELLINGS |= {f"write: {name}": kv_case(write) for name, write in WRITES.items()}
SPELLINGS |= {
    f"write: {name}, one sequence": kv_case(one_sequence(write))
    for name, write in (DECODE | PREFILL).items() if len(write.rows) == 2
}  # fmt: skip
SPELLINGS |= {f"pages: {name}": kv_case(write) for name, write in PAGES.items()}
SPELLINGS |= {
    "write: slots, a cache of any size": kv_case(FLAT["slots"], dynamic={4: (0,)}),
    "pages: view, a cache of any size": kv_case(PAGES["view"], dynamic={4: (0, 1)}),
}
SPELLINGS |= {f"write: one head, {name}": kv_case(write) for name, write in ONE_HEAD.items()}
for _name, _pieces in _quants.VARIANTS.items():
    SPELLINGS[f"fake quant: {_name}"] = kv_case(
        FLAT["slots"], joined(_pieces), "norm", "rope → fake quant → cache write",
        exact=_name not in _quants.LOOSE,
    )  # fmt: skip
SPELLINGS |= {
    f"fake quant in place: {name}": kv_case(
        FLAT["slots"], in_place(_quants.VARIANTS[name]), "fake quant → cache write"
    )
    for name in ("default", "pow2")
}


# ---- rows as bytes -----------------------------------------------------------------------------

SPELLINGS |= {
    f"packed: {name}": _case(
        fn, _packed.inputs, "Kv: norm", "rope → fp8 rows → cache write"
    )
    for name, fn in _packed.SPELLINGS.items()
}  # fmt: skip


# ---- partial results of a split product --------------------------------------------------------


def _summed(sums: Fn) -> Fn:
    def fn(parts: Tensor, w: Tensor, *table: Tensor) -> Tensor:
        return TURN(NORM(sums(parts), w), *table)

    return fn


for _name, (_sums, _shape, _dtype) in SUMS.items():
    SPELLINGS[f"parts: {_name}"] = _case(
        _summed(_sums), parts_inputs(_shape, _dtype), "Q: sum of parts → norm", "rope"
    )
SPELLINGS |= {
    "parts, dynamic": _case(
        _summed(SUMS["rows and merged heads"][0]), parts_inputs(SUMS["rows and merged heads"][1]),
        "sum of parts", dynamic={0: (2,), 2: (1,), 3: (1,)},
    ),
    "parts of q and kv": _case(
        both_of_parts, both_of_parts_inputs, "Q: sum of parts", "kv: sum of parts", "cache write"
    ),
}  # fmt: skip


BOTH = ("Q: norm", "kv: norm", "rope → cache write")
SPELLINGS |= {
    "q and kv": _case(both, both_inputs, *BOTH),
    "q and kv, dynamic": _case(
        both, both_inputs, *BOTH, dynamic={0: (1,), 1: (1,), 3: (1,), 4: (1,), 6: (1,)}
    ),
    "two layers in one buffer": _case(
        several, lambda: (*both_inputs()[:5], Draw(3)(2, B, 8, DIM), both_inputs()[6]), count=2
    ),
    "a module with a cache": Case(
        Layer, layer_inputs, {NAME: 1}, ("Kv: norm", "rope → cache write")
    ),
    "other readers": _case(busy, q_inputs(), "Q: norm", "rope"),
}



_HF = SPELLINGS["norm: hf_weighted"]
MUTANTS: dict[str, Case] = {
    "kv one position on": _case(  # each is a site of its own, with its own tables
        shifted, both_inputs, "Q: norm", "Kv: norm", "write", count=2, like=SPELLINGS["q and kv"]
    ),
    "written before the rope": _case(
        before_rope, kv_inputs(FLAT["slots"]), "Kv: norm", absent=("write",),
        like=SPELLINGS["write: slots"],
    ),
    "read between": _case(  # the write stays; only seen when the plan is applied
        old_between, kv_inputs(FLAT["slots"]), "Kv: norm", "rope", absent=("write",),
        like=SPELLINGS["write: slots"], why="reads the cache between its old and its new version",
    ),
    "two names of one cache": _case(
        two_names, kv_inputs(FLAT["slots"]), "Kv: norm", absent=("write",),
        like=SPELLINGS["write: slots"],
    ),
    "factor of a sum": q_case(
        NORM, lambda x, c, s: alpha(x, c, s, 1, 2), None, "", count=0,
        like=_HF,
    ),
    "factor of a difference": q_case(
        NORM, lambda x, c, s: alpha(x, c, s, 2, 1), None, "", count=0,
        like=_HF,
    ),
    "rounded eps": q_case(rounded_eps, TURN, None, "rope", like=_HF),
    "rows of the cache itself": _case(  # the write stays
        from_itself, kv_inputs(FLAT["slice"]), "Kv: norm", "rope", absent=("write",),
        like=SPELLINGS["write: slice"], why="is a part of the cache that the fused op would write.",
    ),
    "factor of eps": q_case(
        alpha_eps, TURN, None, "rope", like=_HF
    ),
}  # fmt: skip
for _name, _fn in _packed.MUTANTS.items():
    MUTANTS[f"packed: {_name}"] = _case(
        _fn, _packed.inputs, "Kv: norm", "rope", absent=("write",), like=SPELLINGS["packed: rows"]
    )
for _name, _sums in SUM_MUTANTS.items():
    MUTANTS[f"parts: {_name}"] = _case(
        _summed(_sums), parts_inputs(SUMS["rows"][1]), "norm", absent=("sum of parts",),
        like=SPELLINGS["parts: rows"],
    )  # fmt: skip
for _name, _norm in _norms.MUTANTS.items():
    MUTANTS[f"norm: {_name}"] = q_case(
        _norm, TURN, None, "Q: rope", absent=("norm",), like=_HF
    )
for _name, _rope in _rope_mutants.MUTANTS.items():
    _left = _rope_mutants.STILL_ROPES.get(_name, "")
    MUTANTS[f"rope: {_name}"] = q_case(NORM, _rope, None, _left, count=int(bool(_left)), like=_HF)
for _name, _pieces in _quants.MUTANTS.items():
    if _name != "maximum_of_the_row":
        MUTANTS[f"fake quant: {_name}"] = kv_case(
            FLAT["slots"], joined(_pieces), "norm", absent=("quant", "write"),
            like=SPELLINGS["fake quant: default"],
        )  # fmt: skip
for _name, (_write, _like) in _write_mutants.MUTANTS.items():
    MUTANTS[f"write: {_name}"] = kv_case(
        _write, lambda y: y, "norm", "rope", absent=("write",), like=SPELLINGS[f"write: {_like}"]
    )

KNOWN_MISSES: dict[str, Case] = {
    f"norm: {name}": q_case(norm, TURN, why=why, exact=False)
    for name, (norm, why) in _norms.MISSES.items()
}
KNOWN_MISSES |= {
    f"rope: {name}": q_case(NORM, rope, why=why, exact=False)
    for name, (rope, why) in _ropes.MISSES.items()
}
KNOWN_MISSES |= {
    f"write: {name}": kv_case(write, why=why)
    for name, (write, why) in _write_mutants.MISSES.items()
}
for _name, (_pieces, _why) in _quants.MISSES.items():
    KNOWN_MISSES[f"fake quant: {_name}"] = kv_case(
        FLAT["slots"], joined(_pieces), "norm", "rope → fake quant → cache write", why=_why
    )
