"""The indexer's queries as people write them: rope, then a rotation, fp8, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _fp4, _quants, _ropes, _rotations
from ._case import BF16, FP16, FP32, Case, Draw, plain
from ._rotations import ROTATIONS, SCALE, scaled

NAME = "indexer_q"
DIM, ROPE, HEADS, BLOCK = 64, 16, 4, 32  # DIM and ROPE are those of _ropes
B, S, H = 2, 5, HEADS
Fn = Callable[..., Any]
TURN = _ropes.REAL["slices_and_stack"]


def inputs(
    *lead: int, table: tuple[int, ...], dtype: torch.dtype = BF16, matrix: Any = None,
    tables: Any = FP32,
) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
    """x, cos, sin (or complex frequencies), and a matrix that is not its own transpose."""

    def make() -> tuple[Tensor, ...]:
        draw = Draw()
        x, (cos, sin) = draw(*lead, DIM, dtype=dtype), draw.angles(*table, ROPE // 2)
        freqs = (torch.complex(cos, sin),) if tables is None else (cos.to(tables), sin.to(tables))
        return x, *freqs, _rotations.matrix(DIM).to(matrix or dtype)

    return make


def _usual(**more: Any) -> Fn:
    return inputs(B, S, H, table=(B, S, 1), **more)


def _case(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    more = {"counts": {NAME: 1}} | more
    return Case(plain(fn), make or _usual(), parts=parts, **more)


def _turned(fn: Fn, rope: Fn = TURN) -> Fn:
    """rope, then ``fn(y, matrix)``."""
    return lambda x, *rest: fn(rope(x, *rest[:-1]), rest[-1])


def _rotation(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    parts = parts or ("Rope → matrix",)
    return _case(_turned(fn), make, *parts, **{"exact": False} | more)


def codes(**pieces: Fn) -> Fn:
    return lambda y, m: _quants.quantise(y, BLOCK, **pieces)


def fake(**pieces: Fn) -> Fn:
    return lambda y, m: _quants.fake(y, BLOCK, **pieces)


def fp4(**pieces: Fn) -> Fn:
    return lambda y, m: _fp4.fake(y, BLOCK, **pieces)


def folded(y: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for a head, folded into the head's weight."""
    found, s = _quants.quantise(y, DIM)
    return found.flatten(-2), s[..., 0, 0] * 0.3


SPELLINGS: dict[str, Case] = {
    **{name: _rotation(fn) for name, fn in ROTATIONS.items()},
    "fp32 matrix": _rotation(_rotations.wide, _usual(matrix=FP32)),
    "fp32": _rotation(scaled, _usual(dtype=FP32)),
    "fp16": _rotation(scaled, _usual(dtype=FP16)),
    "reference": _case(
        _turned(scaled, _ropes.COMPLEX["reference"]), _usual(tables=None), "matrix", exact=False
    ),
    "flat tokens": _rotation(scaled, inputs(S, H, table=(S, 1))),
    "one token": _rotation(scaled, inputs(1, 1, H, table=(1, 1, 1))),
    "one position": _rotation(scaled, inputs(B, 1, H, table=(B, 1, 1))),
    "dynamic": _rotation(scaled, dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    "rotation, fake quant": _rotation(
        lambda y, m: fake()(scaled(y, m), m), None, "matrix → fake quant"
    ),
    "rotation, codes": _rotation(
        lambda y, m: codes()(scaled(y, m), m), None, "matrix → fp8 quant"
    ),
    "scale of a head, folded": _case(_turned(folded), None, "Rope → fp8 quant"),
    "codes, flat tokens": _case(_turned(codes()), inputs(S, H, table=(S, 1)), "fp8 quant"),
    "codes, one token": _case(
        _turned(folded), inputs(1, 1, H, table=(1, 1, 1)), "Rope → fp8 quant"
    ),
    "codes, dynamic": _case(
        _turned(codes()), None, "fp8 quant", dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1)}
    ),
    "other readers": _rotation(
        lambda y, m: (scaled(y, m), y.sum(-1)), counts={NAME: 1, "norm_rope_cache": 1}
    ),
    "codes and what they stand for": _case(
        _turned(lambda y, m: (lambda c, s: (c, s, c.float() * s))(*codes()(y, m))),
        None,
        "Rope → fp8 quant",
    ),
}
for _name in ("default", "float_after_abs", "no_floor", "pow2", "pow2_methods", "not_saturated"):
    _pieces = _quants.VARIANTS[_name]
    SPELLINGS[f"codes: {_name}"] = _case(_turned(codes(**_pieces)), None, "Rope → fp8 quant")
    SPELLINGS[f"fake: {_name}"] = _case(_turned(fake(**_pieces)), None, "Rope → fake quant")
for _name, _pieces in _fp4.VARIANTS.items():
    SPELLINGS[f"fp4: {_name}"] = _case(_turned(fp4(**_pieces)), None, "Rope → fp4 fake quant")
SPELLINGS |= {
    "rotation, fp4": _rotation(
        lambda y, m: fp4()(scaled(y, m), m), None, "matrix → fp4 fake quant"
    ),
    "fp4, fp16": _case(
        _turned(fp4(code=_fp4.by_where)), _usual(dtype=FP16), "Rope → fp4 fake quant"
    ),
    "fp4, dynamic": _case(
        _turned(fp4()), None, "fp4 fake quant", dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1)}
    ),
}


def _edit(fn: Fn, like: str = "matmul", make: Fn | None = None, **more: Any) -> Case:
    """What is left is a rope alone, of the other fusion, unless ``counts`` says otherwise."""
    more = {"counts": {"norm_rope_cache": 1}, "exact": False} | more
    return Case(plain(fn), make or _usual(), like=SPELLINGS[like], **more)


MUTANTS: dict[str, Case] = {
    "rotated first": _edit(lambda x, c, s, m: TURN(scaled(x, m), c, s)),
    "turned back": _edit(
        lambda x, c, s, m: scaled(TURN(x, c, -s), m), counts={"inv_rope_quant": 1}
    ),
    "half of the matrix": _edit(_turned(lambda y, m: scaled(y, m[:, : DIM // 2]))),
    "product with itself": _edit(_turned(lambda y, m: scaled(y, y.mT))),
    "over the heads": _edit(
        _turned(lambda y, m: torch.einsum("bshd,hg->bsgd", y, m[:H, :H]) * SCALE)
    ),
    "a matrix for each head": _edit(
        _turned(lambda y, m: torch.einsum("bshd,hde->bshe", y, torch.stack([m, -m, m, m])))
    ),
    "factor rounded first": _edit(
        _turned(_rotations.rounded_first), "fp32 matrix", _usual(matrix=FP32),
        counts={NAME: 1},  # without the factor
    ),
    "biased": _edit(
        _turned(lambda y, m: F.linear(y, m, m[0]) * SCALE), counts={"norm_rope_cache": 1}
    ),
    "another scale a row": _edit(
        _turned(lambda y, m: (y @ m) * y.mean(-1, keepdim=True)), "not scaled",
        counts={NAME: 1, "norm_rope_cache": 1},  # the product alone
    ),
    "heads in another order": _edit(
        _turned(lambda y, m: codes()(y.flip(2), m)), "codes: default", absent=("quant",)
    ),
    "quant of the input": _edit(
        lambda x, c, s, m: (*codes()(x, m), TURN(x, c, s)), "codes: default", absent=("quant",)
    ),
    "rotation behind the quant": _edit(
        _turned(lambda y, m: scaled(fake()(y, m), m)), "rotation, fake quant",
        counts={NAME: 1}, absent=("matrix",),
    ),
}  # fmt: skip
for _name in ("other_maximum", "saturates_early", "pow2_floor", "scale_of_next_block"):
    _like = "pow2" if _name == "pow2_floor" else "default"
    MUTANTS[f"codes: {_name}"] = _edit(
        _turned(codes(**_quants.MUTANTS[_name])), f"codes: {_like}", absent=("quant",)
    )
    MUTANTS[f"fake: {_name}"] = _edit(
        _turned(fake(**_quants.MUTANTS[_name])), f"fake: {_like}", absent=("quant",)
    )
for _name, _pieces in _fp4.MUTANTS.items():
    MUTANTS[f"fp4: {_name}"] = _edit(
        _turned(fp4(**_pieces)), "fp4: exponent", absent=("quant",)
    )


KNOWN_MISSES: dict[str, Case] = {
    "fp4 of fp32": _case(
        _turned(fp4()), _usual(dtype=FP32), why="2^32 values are too many to run a spelling on"
    ),
    "butterfly": _rotation(
        _rotations.butterfly, exact=True,
        why="additions of pieces are no product; each step is Inductor's",
    ),  # fmt: skip
    "heads first": _rotation(
        scaled, inputs(B, H, S, table=(B, 1, S)), why="the kernel's results have heads last"
    ),
}
