"""The lightning indexer: its scores with their masks, and its queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spellings import _quants
from ..spellings import indexer_logits as x
from ..spellings import indexer_q as q
from ..spellings._case import BF16, FP32
from ..spellings._rotations import ROTATIONS
from ..spellings._rotations import matrix as rotation_matrix
from . import _atoms
from ._hand import Hand, Site

DOTS = {
    "einsum": x.dots,
    "matmul": lambda a, k: torch.matmul(a.float(), k.float().unsqueeze(1).mT),
    "flat": lambda a, k: torch.matmul(a.float().flatten(1, 2), k.float().mT).unflatten(
        1, (a.shape[1], -1)
    ),
    "rounded": lambda a, k: torch.einsum("bshd,btd->bsht", a, k).float(),
}
RELUS = {
    "relu": F.relu,
    "method": lambda s: s.relu(),
    "in place": lambda s: s.relu_(),
    "clamp": lambda s: s.clamp(min=0),
    "clamp_min": lambda s: s.clamp_min(0.0),
    "maximum": lambda s: torch.maximum(s, torch.zeros(())),
}
RELU_EDITS = {
    "gelu": F.gelu, "leaky": lambda s: F.leaky_relu(s, 0.1), "above": lambda s: s.clamp(max=0),
    "at one": lambda s: s.clamp(min=1.0), "abs": torch.abs, "none": lambda s: s,
    "squared": lambda s: s.relu().square(), "rounded": lambda s: s.bfloat16().relu().float(),
}  # fmt: skip
TOTALS = {
    "sum": x.total,
    "left": lambda s, w: (w[..., None] * s).sum(-2),
    "einsum": lambda s, w: torch.einsum("bsht,bsh->bst", s, w),
    "matmul": lambda s, w: (w.unsqueeze(-2) @ s).squeeze(-2),
}
TOTAL_EDITS = {
    "mean": lambda s, w: (s * w[..., None]).mean(2),
    "largest": lambda s, w: (s * w[..., None]).amax(2),
    "rounded": lambda s, w: (s * w[..., None]).bfloat16().float().sum(2),
}
SCALES = {
    "none": (lambda s: s, lambda s: s, lambda s: s),
    "first": (lambda s: s * x.SCALE, lambda s: s, lambda s: s),
    "second": (lambda s: s, lambda s: s * x.SCALE, lambda s: s),
    "last": (lambda s: s, lambda s: s, lambda s: s * x.SCALE),
}
KEY_SCALES = {  # of the dots, of the sums
    "none": (lambda s, k: s, lambda t, k: t),
    "of dots": (lambda s, k: s * k[:, None, None], lambda t, k: t),
    "of dots, first": (lambda s, k: k.unsqueeze(1).unsqueeze(1) * s, lambda t, k: t),
    "of sums": (lambda s, k: s, lambda t, k: t * k.unsqueeze(1)),
}


def logits(hand: Hand) -> Site:
    """Σ over the heads of weight · relu(q · k), and a range of keys."""
    dtype = hand.dtype()
    b, s, t, h, d = (
        hand.number(n, v)
        for n, v in (("B", (2, 1)), ("S", (5, 1)), ("T", (33, 16)), ("H", (4, 6)), ("D", (16, 32)))
    )
    dots, relu = hand.pick("dots", DOTS), hand.pick("relu", RELUS, mutants=RELU_EDITS, of="relu")
    total = hand.pick("total", TOTALS, mutants=TOTAL_EDITS, of="sum")
    before, between, behind = hand.pick("scale", SCALES)
    of_dots, of_sums = hand.pick("key scale", KEY_SCALES)
    first = hand.seam("in front")
    masks = {"no mask": None} | x.MASKS | x.WINDOWS
    mask = hand.pick("mask", masks)
    count = 0 if mask is None else 2 if hand.words["mask"] in x.WINDOWS else 1

    def fn(q: Tensor, k: Tensor, w: Tensor, scales: Tensor, *ends: Tensor) -> object:
        def score(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
            rated = between(relu(before(of_dots(dots(first(q), k), scales))))
            return behind(of_sums(total(rated, w), scales))

        return (score if mask is None else x.visible(mask, score))(q, k, w, *ends)

    given = (
        hand.tensor("q", b, s, h, d, dtype=dtype),
        hand.tensor("k", b, t, d, dtype=dtype),
        hand.random(b, s, h, dtype=FP32),
        hand.random(b, t, dtype=FP32),
    )
    ends = (torch.arange(s) % t + 1, torch.arange(s) // 2)[:count]
    ends = tuple(e.expand(b, s).clone() for e in ends)
    return hand.site("indexer_logits", fn, (*given, *ends), {"indexer_logits": 1}, exact=False)


PARTS = {
    "rotated": (1, 0),
    "codes": (0, 1),
    "fake": (0, 2),
    "rotated codes": (1, 1),
    "rotated fake": (1, 2),
}


def queries(hand: Hand) -> Site:
    """rope → rotation and fp8, one of them or both."""
    dtype = hand.dtype("dtype", "bf16", "fp16")
    b, s = hand.number("B", (2, 1, 3)), hand.number("S", (5, 1, 3))
    rope, tables = _atoms.rope(hand, dtype, q.ROPE // 2)
    rotated, kind = hand.pick("parts", PARTS)
    turn = hand.pick("rotation", ROTATIONS) if rotated else (lambda y, m: y)
    pieces = _atoms.quant(hand) if kind else {}
    first, between = hand.seam("in front"), hand.seam("between")

    def fn(x: Tensor, m: Tensor, *table: Tensor):
        y = turn(between(rope(first(x), *table)), m)
        if kind == 2:
            return _quants.fake(y, q.BLOCK, **pieces)
        return _quants.quantise(y, q.BLOCK, **pieces) if kind else y

    matrix = rotation_matrix(q.DIM).to(dtype)
    x = hand.tensor("x", b, s, q.HEADS, q.DIM, dtype=dtype)
    given = (x, matrix, *tables(b, s, 1))
    return hand.site("indexer_q", fn, given, {"indexer_q": 1}, exact=not rotated)


FAMILIES = {"logits": logits, "queries": queries}
assert BF16
