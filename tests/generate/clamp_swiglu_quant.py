"""Clamp → SwiGLU [→ routing weight] [→ fp8 codes and scales]."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..spellings import _quants, _swiglus
from ..spellings._case import FP32
from . import _atoms
from ._hand import Fn, Hand, Site

NAME = "clamp_swiglu_quant"
ONE = {NAME: 1}
LIMITS = (1.5, 7.0, 0.3)
# In the activation's dtype the reference's placeholder for a bound does not move behind a cast.
WIDE_ONLY = ("clamp_max", "min_first", "full_like", "full", "where", "where_both")
PRODUCTS = {
    "silu first": lambda s, u: s * u,
    "up first": lambda s, u: u * s,
    "torch.mul": lambda s, u: torch.mul(s, u),
    "in place": lambda s, u: s.mul_(u),
}
GROUP = 32
PACK_EDITS = {
    "gate for up": lambda x: x.chunk(2, dim=-1)[::-1],
    "up is gate": lambda x: (x.chunk(2, dim=-1)[0],) * 2,
    "lanes one further": lambda x: x.roll(1, -1).chunk(2, dim=-1),
}
CLAMPS = {n: f for n, f in _swiglus.CLAMP.items() if n != "where_or_equal"}


def activation(hand: Hand) -> Site:
    """Rows ``[.., 2·W]`` of gate and up."""
    dtype, lead = hand.dtype(), hand.number("rows", ((7,), (1,), (), (2, 3), (4, 2, 3)))
    width, wide = hand.number("width", (32, 96, 64)), hand.flag("wide")
    clamps = CLAMPS if wide else {n: f for n, f in CLAMPS.items() if n not in WIDE_ONLY}
    silus = _swiglus.SILU if wide or dtype == FP32 else _exact_silus()
    clamp = hand.pick("clamp", clamps, mutants=_swiglus.LIMITS, of="clamp")
    pieces = dict(
        pack=hand.pick("pack", _swiglus.PACKED, mutants=PACK_EDITS, of="chunk"),
        clamp=partial(clamp, b=hand.number("limit", LIMITS)),
        silu=hand.pick(
            "silu", silus, loose=_swiglus.LOOSE_SILU, mutants=_swiglus.SILUS, of="functional"
        ),
        product=hand.pick("product", PRODUCTS),
        wide=wide,
    )
    first, last = hand.seam("in front"), hand.seam("behind")
    weigh, weights = _weight(hand, dtype, wide, lead)
    quant = hand.flag("quant")
    codes = _codes(hand) if quant else (lambda y: y)
    parts = [*["routing weight"] * bool(weights), *["fp8 quant"] * quant]

    def fn(x: Tensor, *w: Tensor):
        return codes(last(weigh(pieces, first(x), *w)))

    x = hand.tensor("x", *lead, 2 * width, dtype=dtype)
    return hand.site(NAME, fn, (x, *weights), ONE, parts=parts)


def _exact_silus() -> dict[str, Fn]:
    """In a narrow dtype each step of a spelled-out one rounds by itself, where silu does not."""
    return {n: _swiglus.SILU[n] for n in ("functional", "module", "in_place")}


def _weight(
    hand: Hand, dtype: torch.dtype, wide: bool, lead: tuple[int, ...]
) -> tuple[Fn, tuple[Tensor, ...]]:
    """The activation with or without the routing weight of each row."""
    if not lead or not hand.flag("routing weight"):
        return (lambda pieces, x: _swiglus.act(x, **pieces)), ()
    if wide:  # multiplied in fp32, before the one rounding
        product = hand.pick("weight", {"left": lambda y, w: w * y, "right": lambda y, w: y * w})

        def weighed(pieces: dict[str, Fn], x: Tensor, w: Tensor) -> Tensor:
            own = pieces["product"]
            return _swiglus.act(x, **{**pieces, "product": lambda s, u: product(own(s, u), w)})

        return weighed, (hand.random(*lead, 1, dtype=FP32),)
    return (lambda pieces, x, w: _swiglus.act(x, **pieces) * w), (
        hand.random(*lead, 1, dtype=dtype),
    )


def _codes(hand: Hand) -> Fn:
    pieces = _atoms.quant(hand)
    return lambda y: _quants.quantise(y, GROUP, **pieces)


FAMILIES = {"gate and up": activation}
