"""In which order of axes q, kv and the rotation tables come, and what the model does to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._norms import BF16_WEIGHT
from ._ropes import REAL

DIM, ROPE = 48, 16
BATCH, SEQ, HEADS = 2, 5, 3
NORM, TURN = BF16_WEIGHT["hf_weighted"], REAL["slices_and_stack"]
View = Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Layout:
    """x has ``shape``, a table ``[*table, R/2]``; the views in front of and behind the sequence."""

    shape: tuple[int, ...]
    table: tuple[int, ...]
    x: View = _same
    tables: View = _same
    out: View = _same

    def around(self, core: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``core(x, w, *tables)`` with these views around it."""
        return lambda x, w, *tables: self.out(core(self.x(x), w, *map(self.tables, tables)))


def layouts(
    b: int = BATCH, s: int = SEQ, h: int = HEADS, dim: int = DIM, places: int = 7
) -> dict[str, Layout]:
    """Every layout for a batch, a sequence, heads and their size; tables of ``places`` rows."""
    # Rows and heads that share one position ("one position"): still one site, q's.
    return {
        "tokens first": Layout((b, s, h, dim), (b, s, 1)),
        "heads first": Layout((b, h, s, dim), (b, 1, s)),
        "heads by transpose": Layout(
            (b, s, h * dim), (b, s),
            lambda x: x.view(b, s, h, dim).transpose(1, 2), lambda t: t.unsqueeze(1),
        ),
        "heads merged again": Layout(
            (b, s, h * dim), (b, s),
            lambda x: x.unflatten(-1, (h, dim)), lambda t: t[:, :, None], lambda y: y.flatten(-2),
        ),
        "slice of a joint projection": Layout(
            (b, s, (h + 1) * dim), (b, s),
            lambda x: x.split([h * dim, dim], dim=-1)[0].unflatten(-1, (h, dim)),
            lambda t: t.unsqueeze(2),
        ),
        "flat": Layout((s, h, dim), (s, 1)),
        "flat heads first": Layout((h, s, dim), (s,)),
        "rows": Layout((s, dim), (s,)),
        "kv": Layout((b, s, dim), (b, s)),
        "kv, shared positions": Layout((b, s, dim), (s,)),
        "kv with a head axis": Layout((b, 1, s, dim), (b, 1, s)),
        "shared positions": Layout((b, s, h, dim), (s, 1)),
        "shared, unit batch": Layout((b, s, h, dim), (1, s, 1)),
        "shared, heads first": Layout((b, h, s, dim), (s,)),
        "shared, heads first, four axes": Layout((b, h, s, dim), (1, 1, s)),
        "kv at one position": Layout((b, 1, dim), (1, 1)),
        "batch of one": Layout((1, s, h, dim), (1, s, 1)),
        "sequence of one": Layout((b, 1, h, dim), (b, 1, 1)),
        "one head": Layout((b, s, 1, dim), (b, s, 1)),
        "a single row": Layout((1, 1, 1, dim), (1, 1, 1)),
        "a vector": Layout((dim,), ()),
        "one position": Layout((b, h, dim), ()),
        "decode at one position": Layout((b, 1, h, dim), (1, 1, 1)),
        "decode at one position, heads first": Layout((b, h, 1, dim), (1, 1, 1)),
        "tables by position": Layout(
            (s, h, dim), (places,),
            tables=lambda t: t[torch.arange(s) * 2 % places].unsqueeze(1),
        ),
        "slice of the tables": Layout(
            (b, s, h, dim), (s + 4,), tables=lambda t: t[2 : 2 + s].view(1, s, 1, -1)
        ),
    }  # fmt: skip


LAYOUTS = layouts()
