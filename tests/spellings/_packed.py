"""kv rows packed into bytes and written to a uint8 cache, spelled and misspelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _quants
from ._case import Draw
from ._layouts import DIM, NORM, ROPE, TURN
from ._steps import tables
from ._writes import SLOTS, TOKENS

GROUP, U8 = 8, torch.uint8  # 4 scale bytes and 2 of padding
NOPE = DIM - ROPE
SCALES = DIM // GROUP
ROW = NOPE + 2 * ROPE + SCALES
Fn = Callable[..., Any]


def _e8m0(s: Tensor) -> Tensor:
    return s.squeeze(-1).to(torch.float8_e8m0fnu).view(U8)


def pack(
    y: Tensor, *, pieces: dict[str, Fn] | None = None, scale: Fn = _e8m0,
    order: tuple[int, ...] = (0, 1, 2, 3), tail: Fn = lambda t: t.contiguous().view(U8),
    pad: int = 0, source: Fn = lambda t: t,
) -> Tensor:  # fmt: skip
    """Codes, the tail, scale bytes and padding, in that order."""
    nope, rope = y.split([NOPE, ROPE], dim=-1)
    pieces = _quants.VARIANTS["pow2"] if pieces is None else pieces
    codes, s = _quants.quantise(source(nope), GROUP, **pieces)
    zeros = torch.full((*y.shape[:-1], SCALES - NOPE // GROUP), pad, dtype=U8)
    parts = [codes.flatten(-2).view(U8), tail(rope), scale(s), zeros]
    return torch.cat([parts[i] for i in order], dim=-1)


def inputs(draw: Draw | None = None) -> tuple[Tensor, ...]:
    """kv rows, weight, tables, the cache of bytes, slots."""
    draw = draw or Draw()
    table = tables(draw, TOKENS)
    cache = torch.full((SLOTS, ROW), 171, dtype=U8)
    return draw(TOKENS, DIM), draw(DIM), *table, cache, draw.permutation(SLOTS)[:TOKENS]


def stored(put: Fn | None = None, **pieces: Any) -> Fn:
    """norm, rope, pack, write; ``put(cache, slots, rows)``."""

    def fn(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: Tensor) -> Any:
        rows = pack(TURN(NORM(x, w), cos, sin), **pieces)
        if put is not None:
            return put(cache, at, rows)
        cache[at] = rows

    return fn


def _kept(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: Tensor) -> Any:
    y = TURN(NORM(x, w), cos, sin)
    cache[at] = pack(y)
    return y * 2, cache.sum(-1)


def _tail_first(t: Tensor) -> Tensor:
    return t.contiguous().view(U8).flip(-1)


SPELLINGS: dict[str, Fn] = {
    "rows": stored(),
    "index_copy": stored(lambda c, at, rows: c.index_copy_(0, at, rows) * 2),
    "index_put": stored(lambda c, at, rows: c.index_put_((at,), rows) * 2),
    "negative slots": stored(lambda c, at, rows: c.__setitem__(at - SLOTS, rows)),
    "scale by its inverse": stored(pieces=_quants.VARIANTS["pow2_reciprocal"]),
    "methods": stored(pieces=_quants.VARIANTS["pow2_methods"]),
    "kept": _kept,
}
MUTANTS: dict[str, Fn] = {  # of "rows"
    "tail reversed": stored(tail=_tail_first),
    "scales in front of the tail": stored(order=(0, 2, 1, 3)),
    "padding of ones": stored(pad=1),
    "codes of another row": stored(source=lambda t: t.roll(1, 0)),
    "codes of half": stored(source=lambda t: t * 0.5),
    "scales of another row": stored(scale=lambda s: _e8m0(s.roll(1, 0))),
    "scales one step up": stored(scale=lambda s: _e8m0(s * 2)),
    "raw scales": stored(pieces=_quants.VARIANTS["default"]),
}
