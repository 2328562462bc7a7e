"""The rotation back of the attention's output [→ fp8 codes and scales in groups of heads]."""

from __future__ import annotations

from torch import Tensor

from ..spellings import _quants
from ..spellings._layouts import layouts
from . import _atoms
from ._hand import Hand, Site
from .norm_rope_cache import SIZES

NAME = "inv_rope_quant"
ONE = {NAME: 1}
BLOCK = 32


def turned_back(hand: Hand) -> Site:
    """In any layout."""
    dtype, (dim, lanes) = hand.dtype(), hand.number("lanes", SIZES)
    b, s, h = (hand.number(n, v) for n, v in (("B", (2, 1, 3)), ("S", (5, 1, 3)), ("H", (3, 1, 4))))
    layout = hand.pick("layout", layouts(b, s, h, dim))
    rope, tables = _atoms.rope(hand, dtype, lanes // 2)
    first, last = hand.seam("in front"), hand.seam("behind")
    back = _atoms.inverse(rope)
    fn = layout.around(lambda x, _, *table: last(back(first(x), *table)))
    x = hand.tensor("x", *layout.shape, dtype=dtype)
    given = (x, *tables(*layout.table))
    return hand.site(NAME, lambda x, *table: fn(x, x, *table), given, ONE)


def in_groups(hand: Hand) -> Site:
    """And quantised, heads merged into groups."""
    dtype, (dim, lanes) = hand.dtype(), hand.number("lanes", ((32, 16), (96, 64), (64, 32)))
    b, s, h = hand.number("B", (2, 1, 3)), hand.number("S", (5, 1, 3)), 4
    groups = hand.number("groups", (1, 2, 4))
    rope, tables = _atoms.rope(hand, dtype, lanes // 2)
    back, pieces = _atoms.inverse(rope), _atoms.quant(hand)
    first, between = hand.seam("in front"), hand.seam("between")
    flat = hand.flag("flat")

    def fn(x: Tensor, *table: Tensor):
        y = between(back(first(x), *table)).reshape(b, s, groups, -1)
        codes, scales = _quants.quantise(y, BLOCK, **pieces)
        return (codes.flatten(-2), scales.squeeze(-1)) if flat else (codes, scales)

    x = hand.tensor("x", b, s, h, dim, dtype=dtype)
    return hand.site(NAME, fn, (x, *tables(b, s, 1)), ONE, parts=("fp8 quant",))


FAMILIES = {"turned back": turned_back, "in groups": in_groups}
