"""Pairs of a token and an expert, sorted, and what is made of the sort."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._hand import Hand, Site

E, K, HERE = 12, 5, 7
CHOICES = {
    "topk": lambda s: s.topk(K, dim=-1).indices,
    "the least": lambda s: s.topk(K, largest=False, sorted=False).indices,
    "every expert": lambda s: s.argsort(-1),
    "the first": lambda s: s.argsort(-1, descending=True)[..., :K],
    "moved": lambda s: (s.topk(K).indices + 3) % E,
}
FLAT = {
    "reshape": lambda at: at.reshape(-1),
    "flatten": lambda at: at.flatten(),
    "by experts": lambda at: at.transpose(0, -1).reshape(-1),
    "narrow": lambda at: at.flatten().to(torch.int32),
    "every second": lambda at: at.flatten()[::2],
}
SORTS = {
    "sort": lambda ids: ids.sort(stable=True),
    "argsort, index": lambda ids: (lambda o: (ids[o], o))(ids.argsort(stable=True)),
    "argsort, gather": lambda ids: (lambda o: (ids.gather(-1, o), o))(ids.argsort(stable=True)),
    "an axis by name": lambda ids: torch.sort(ids, dim=0, stable=True),
}
SORT_EDITS = {
    "descending": lambda ids: ids.sort(descending=True, stable=True),
    "other ids": lambda ids: (ids.sort(stable=True)[0], ids.flip(0).argsort(stable=True)),
    "negated": lambda ids: (lambda v, o: (-v, o))(*(-ids).sort(stable=True)),
}


def _up(ids: Tensor, first: int = 0, n: int = E) -> Tensor:
    return torch.arange(first, first + n, dtype=ids.dtype)


def _histc(ids: Tensor, held: Tensor, bins: int = E, low: int = 0, high: int = E - 1) -> Tensor:
    return torch.histc(held.float(), bins=bins, min=low, max=high)


def _ended(count):
    return lambda ids, held: count(ids, held).cumsum(0, dtype=torch.int32)


def _added(ids: Tensor, held: Tensor, one: float = 1.0) -> Tensor:
    return torch.zeros(E).scatter_add(0, held.long(), torch.full(held.shape, one))


ENDS = {
    "histc": _ended(_histc),
    "of what is not sorted": _ended(lambda ids, held: _histc(ids, ids)),
    "compared": _ended(lambda ids, held: (held[:, None] == _up(held)).sum(0)),
    "compared, turned": _ended(lambda ids, held: (_up(ids)[:, None] == ids).sum(1)),
    "one-hot": _ended(lambda ids, held: F.one_hot(ids.long(), E).sum(0)),
    "added": _ended(_added),
    "counts": lambda ids, held: (held[:, None] == _up(held)).sum(0),
    "both": lambda ids, held: (lambda n: n.cumsum(0) + n)(_added(ids, held).int()),
    "searched": lambda ids, held: torch.searchsorted(held, _up(held), right=True),
    "searched, narrow": lambda ids, held: torch.searchsorted(
        held, _up(held), out_int32=True, side="right"
    ),
    "searched from the left": lambda ids, held: torch.searchsorted(held, _up(held, 1)),
    "bucketize": lambda ids, held: torch.bucketize(_up(held), held, right=True),
    "of some": _ended(lambda ids, held: _histc(ids, held, HERE, 0, HERE - 1)),
    "of some, searched": lambda ids, held: torch.searchsorted(held, _up(held, n=HERE), right=True),
}
END_EDITS = {
    "from one on": _ended(lambda ids, held: _histc(ids, held, low=1)),
    "one more": _ended(lambda ids, held: _histc(ids, held, high=E)),
    "one bin more": _ended(lambda ids, held: _histc(ids, held, E + 1)[:E]),
    "of the next": _ended(lambda ids, held: _histc(ids, held + 1)),
    "half of them": _ended(lambda ids, held: _histc(ids, held[: held.shape[0] // 2])),
    "twice": _ended(lambda ids, held: _added(ids, held, 2.0)),
    "from the last": lambda ids, held: _histc(ids, held).flip(0).cumsum(0, dtype=torch.int32),
    "below": lambda ids, held: torch.searchsorted(held, _up(held)),
    "among the unsorted": lambda ids, held: torch.searchsorted(ids, _up(ids), right=True),
    "from the second": lambda ids, held: torch.searchsorted(held, _up(held, 1), right=True),
}


def _put(order: Tensor, first: int = 0, step: int = 1, into: Tensor | None = None) -> Tensor:
    into = torch.empty_like(order) if into is None else into
    into[order] = torch.arange(order.shape[0]) * step + first
    return into


INVERSES = {
    "written": _put,
    "scattered": lambda o: torch.zeros_like(o).scatter_(0, o, torch.arange(o.shape[0])),
    "sorted": lambda o: o.argsort(),
    "sorted, stable": lambda o: torch.sort(o, stable=True)[1],
    "none": lambda o: o[:1],
}
INVERSE_EDITS = {
    "from one": lambda o: _put(o, 1) % o.shape[0],
    "by twos": lambda o: _put(o, step=2) % o.shape[0],
    "added": lambda o: torch.ones_like(o).index_put(
        (o,), torch.arange(o.shape[0]), accumulate=True) % o.shape[0],
    "falling": lambda o: o.argsort(descending=True),
    "some": lambda o: _put(o[: o.shape[0] // 2], into=torch.zeros_like(o)),
    "of another": lambda o: _put(o.flip(0)),
}  # fmt: skip


def sorted_pairs(hand: Hand) -> Site:
    """Scores ``[rows, 12]``."""
    rows, dtype = hand.number("rows", (7, 1, 3)), hand.dtype("dtype", "bf16", "fp32")
    choose, flat = hand.pick("choice", CHOICES), hand.pick("flat", FLAT)
    sort = hand.pick("sort", SORTS, mutants=SORT_EDITS, of="sort")
    end = hand.pick("ends", ENDS, mutants=END_EDITS, of="histc")
    turn = hand.pick("inverse", INVERSES, mutants=INVERSE_EDITS, of="written")
    first, last = hand.seam("in front"), hand.seam("behind")
    elsewhere = hand.flag("elsewhere")

    def fn(s: Tensor) -> tuple[Tensor, ...]:
        s = first(s)
        ids = flat(choose(s))
        ids = ids.where(ids < HERE, HERE) if elsewhere else ids
        held, order = sort(ids)
        pairs = s.flatten()[order]
        return last(s), pairs[turn(order)], order, held, end(ids, held)

    s = hand.tensor("scores", rows, E, dtype=dtype)
    return hand.site("expert_sort", fn, (s,), {"expert_sort": 1})


FAMILIES = {"sorted by expert": sorted_pairs}
