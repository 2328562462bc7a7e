"""The pieces that several families share, drawn: norms, rotations, quantisation, products."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..spellings import _norms, _quants, _rope_mutants, _ropes
from ..spellings._case import FP32
from ._hand import Fn, Hand

NORMS = _norms.PLAIN | _norms.BF16_WEIGHT | _norms.FP32_WEIGHT
ROPES = {"real": _ropes.REAL, "complex": _ropes.COMPLEX, "narrow": _ropes.EVERY}
FLOORS = (0.5, 1e-4, 1e-12)


def _weight_before(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The weight multiplies before the one rounding, where the original's multiplies behind it."""
    y = x.float()
    return (w.float() * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps))).to(x.dtype)


def _rounded_between(x: Tensor, w: Tensor, eps: float) -> Tensor:
    y = x.float()
    mean = y.square().mean(-1, keepdim=True).to(torch.bfloat16)
    return w * (y * torch.rsqrt(mean.float() + eps)).to(x.dtype)


NORM_EDITS = _norms.MUTANTS | {
    "weight before the cast": _weight_before, "mean rounded": _rounded_between,
}  # fmt: skip


def norm(hand: Hand, dtype: torch.dtype, dim: int, what: str = "norm") -> tuple[Fn, Tensor]:
    """``norm(x)`` of ``dim`` lanes, with its weight, which several norms may share."""
    fn = hand.pick(what, NORMS, loose=_norms.LOOSE, mutants=NORM_EDITS, of="hf_weighted")
    wide = hand.words[what] in _norms.FP32_WEIGHT
    weight = hand.random(dim, dtype=FP32 if wide else dtype)
    eps = hand.eps(what)
    return (lambda x, w: fn(x, w, eps)), weight


def rope(hand: Hand, dtype: torch.dtype, half: int, what: str = "rope") -> tuple[Fn, Fn]:
    """``rope(x, *tables)`` and ``tables(*lead)`` for it."""
    table = {
        f"{kind} {n}": (f, {"real": FP32, "complex": None, "narrow": dtype}[kind])
        for kind, fns in ROPES.items() for n, f in fns.items()
    } | {"rounded tables": (_ropes.REAL["hf"], dtype)}  # fmt: skip
    edits = {n: (f, FP32) for n, f in _rope_mutants.MUTANTS.items()}
    fn, kind = hand.pick(what, table, mutants=edits, of="real slices_and_stack")
    return fn, lambda *lead: _tables(hand, half, kind, *lead)


def _tables(hand: Hand, half: int, kind: Any, *lead: int) -> tuple[Tensor, ...]:
    cos, sin = hand.random.angles(*lead, half)
    return (torch.complex(cos, sin),) if kind is None else (cos.to(kind), sin.to(kind))


def inverse(turn: Fn) -> Fn:
    """The rotation back, by −sin or by the conjugate."""

    def back(x: Tensor, *tables: Tensor) -> Tensor:
        if len(tables) == 1:
            return turn(x, tables[0].conj())
        return turn(x, tables[0], -tables[1])

    return back


def _pieces(part: str) -> dict[str, Fn]:
    """The ways of one step that leave all other steps as they are."""
    own = {n: v[part] for n, v in _quants.VARIANTS.items() if set(v) == {part}}
    return {"default": _quants.quantise.__kwdefaults__[part]} | own


BLOCKS, AMAX, FLOOR, SCALE, CODES = map(_pieces, ("blocks", "amax", "floor", "scale", "codes"))
# Codes by a reciprocal: only of a power of two is it exact.
RECIPROCAL = {n: v["codes"] for n, v in _quants.VARIANTS.items() if {"scale", "codes"} == set(v)}
STEPS = {"blocks": BLOCKS, "amax": AMAX, "floor": FLOOR, "scale": SCALE, "codes": CODES}


def quant(hand: Hand) -> dict[str, Fn]:
    """Keyword arguments of ``_quants.quantise``, each step spelled by itself."""
    chosen: dict[str, Fn] = {}
    for step, table in STEPS.items():
        if step == "codes" and "pow2" in hand.words["quant scale"]:
            table = table | RECIPROCAL
        edits = {n: v[step] for n, v in _quants.MUTANTS.items() if set(v) == {step}}
        chosen[step] = hand.pick(
            f"quant {step}", table, loose=_quants.LOOSE, mutants=edits, of="default"
        )
    chosen["floor"] = partial(chosen["floor"], f=hand.number("quant least", FLOORS))
    return chosen
