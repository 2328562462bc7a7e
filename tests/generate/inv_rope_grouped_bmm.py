"""Rotation back → grouped output projection, weights wide or e4m3, activations wide or fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spellings import inv_rope_grouped_bmm as g
from . import _atoms
from ._hand import Hand, Site

NAME = "inv_rope_grouped_bmm"
EDITS = {
    "heads flipped": lambda y: y.flip(2), "tokens rolled": lambda y: y.roll(1, 1),
    "half": lambda y: y * 0.5, "lanes rolled": lambda y: y.roll(1, -1),
}  # fmt: skip


def projection(hand: Hand) -> Site:
    """Weights ``[G·N, K]`` as on disk."""
    dtype = hand.dtype("dtype", "bf16", "fp16")
    rope, tables = _atoms.rope(hand, dtype, g.ROPE // 2)
    back = _atoms.inverse(rope)
    first = hand.seam("in front")
    between = hand.pick("between", {"nothing": lambda y: y}, mutants=EDITS, of="nothing")
    kinds = {"wide": None, "wide.": None} | g.DEQUANT | {"fp8 activations": "fp8"}
    kind = hand.pick("weights", kinds if hand.words["dtype"] == "bf16" else {"wide": None})
    product = hand.pick("product", g.PRODUCTS)
    narrow = hand.pick("cast of the weights", {"rounded": True, "fp32 product": False})
    pieces = _atoms.quant(hand) if kind == "fp8" else {}
    if kind == "fp8":
        hand.words["product"] = "einsum"
        product = g.EINSUM

    def fn(x: Tensor, *rest: Tensor) -> Tensor:
        *table, w, scale = rest if kind else (*rest, None)
        y = between(back(first(x), *table))
        if kind is None:
            return product(y, w)
        if kind == "fp8":
            wide = g._blocks(w, scale)
            return product(g._simulated(y, pieces).view(y.shape), wide).to(x.dtype)
        if narrow:
            return product(y, kind(w, scale).to(x.dtype))
        return product(y.float(), kind(w, scale)).to(x.dtype)

    x = hand.tensor("x", g.B, g.S, g.H, g.DIM, dtype=dtype)
    weights = g.usual(dtype=dtype, e4m3=kind is not None)(hand.random)[3:]
    return hand.site(NAME, fn, (x, *tables(g.B, g.S, 1), *weights), {NAME: 1}, exact=False)


FAMILIES = {"projection": projection}
assert torch
