"""Norm → fp8 codes and scales, alone or with the norm of kv in the same launch."""

from __future__ import annotations

from torch import Tensor

from ..spellings import _quants
from . import _atoms
from ._hand import Hand, Site

NAME = "norm_quant"
ONE = {NAME: 1}
GROUP = 32
ENDS = {
    "codes and scales": lambda y, c, s: (c, s),
    "flat": lambda y, c, s: (c.flatten(-2), s.squeeze(-1)),
    "the norm too": lambda y, c, s: (c, s, y * 2),
    "codes only": lambda y, c, s: c,
}


def latent(hand: Hand) -> Site:
    """q's latent, of which others may read the norm."""
    dtype, lead = hand.dtype(), hand.number("rows", ((5,), (1,), (), (2, 3)))
    dim = hand.number("lanes", (32, 96))
    norm, w = _atoms.norm(hand, dtype, dim)
    pieces, end = _atoms.quant(hand), hand.pick("end", ENDS)
    first, between = hand.seam("in front"), hand.seam("between")

    def fn(x: Tensor, w: Tensor):
        y = between(norm(first(x), w))
        return end(y, *_quants.quantise(y, GROUP, **pieces))

    return hand.site(NAME, fn, (hand.tensor("x", *lead, dim, dtype=dtype), w), ONE)


def latents(hand: Hand) -> Site:
    """q's and kv's latents, columns of one projection."""
    dtype, lead = hand.dtype(), hand.number("rows", ((5,), (1,), (2, 3)))
    dim, kv_dim = hand.number("lanes", (32, 96)), hand.number("kv lanes", (32, 64))
    norm, w = _atoms.norm(hand, dtype, dim)
    kv_norm, kv_w = _atoms.norm(hand, dtype, kv_dim, "kv norm")
    pieces, behind = _atoms.quant(hand), hand.flag("kv behind")

    def fn(x: Tensor, w: Tensor, kv_w: Tensor):
        q, kv = x.split([dim, kv_dim], dim=-1)
        early = None if behind else kv_norm(kv, kv_w)
        codes = _quants.quantise(norm(q, w), GROUP, **pieces)
        return codes, kv_norm(kv, kv_w) if behind else early

    x = hand.tensor("x", *lead, dim + kv_dim, dtype=dtype)
    return hand.site(NAME, fn, (x, w, kv_w), ONE, parts=("second norm",))


FAMILIES = {"latent": latent, "two latents": latents}
