"""Pairs sorted by expert, and what is made of the sort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import Case, plain

NAME = "expert_sort"
T, K, E = 9, 3, 8
S = T * K
FAR = (1 << 32) + 3  # as int32 it is 3


def drawn(low: int = 0, high: int = E, dtype: torch.dtype = torch.int64) -> Callable[..., Any]:
    """Ids, ids of others, and scores of which experts are chosen."""

    def inputs() -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(low, high, (2, S), generator=draw).to(dtype)
        return ids[0].clone(), ids[1].clone(), torch.randn(T, E, generator=draw)

    return inputs


def _case(fn: Callable[..., Any], *parts: str, **more: Any) -> Case:
    absent = tuple(p for p in ("values", "inverse", "ends", "counts") if p not in parts)
    found = {"counts": {NAME: 1}, "parts": parts, "absent": absent, "inputs": drawn(), **more}
    return Case(plain(fn), **found)


def up(n: int = E, first: int = 0) -> Tensor:
    return torch.arange(first, first + n)


def offsets(ids: Tensor, bins: int = E, low: int = 0, high: int = E - 1) -> Tensor:
    counts = torch.histc(ids.float(), bins=bins, min=low, max=high)
    return torch.cumsum(counts, dim=0, dtype=torch.int32)


def inverse(order: Tensor, first: int = 0) -> Tensor:
    found = torch.empty_like(order)
    found[order] = up(order.shape[0], first)
    return found


def searched(ids: Tensor, **how: Any) -> Tensor:
    return torch.searchsorted(ids, up(), **how)


def compared(ids: Tensor, first: int = 0, dim: int = 0) -> Tensor:
    return (ids[:, None] == up(first=first)).sum(dim)


def added(ids: Tensor, one: int = 1, zero: int = 0) -> Tensor:
    return torch.full((E,), zero).scatter_add(0, ids, torch.full_like(ids, one))


def put(ids: Tensor) -> Tensor:
    zeros = torch.zeros(E, dtype=torch.int64)
    return zeros.index_put((ids,), torch.tensor(1), accumulate=True)


def _both(ids: Tensor) -> tuple[Tensor, ...]:
    counts = compared(ids)
    return counts, counts.int().cumsum(0, dtype=torch.int32), counts.cumsum(0)


def far() -> tuple[Tensor, ...]:
    ids, *more = OUTSIDE()
    return torch.where(ids == 2, FAR, ids), *more


def _transformers(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """As it is used: what torch makes of equal ids, of which any may come first, is not seen."""
    held, order = torch.sort(ids)
    rows = torch.arange(ids.shape[0])[order // K] + held
    return rows[inverse(order)], offsets(held)


def _plain(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    held, order = ids.sort(stable=True)
    ends = [searched(held, right=True, out_int32=True) for _ in range(2)]
    return held >= E, order // K, ends[0] * 2, ends[1], order.argsort()


def _three(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    held, order = ids.sort(descending=False, stable=True)
    return order, offsets(held), held


def _choice(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    chosen = s.topk(K).indices.reshape(-1)
    return _transformers(chosen, others, s)


def _elsewhere(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    held, order = s.topk(K).indices.reshape(-1).sort()
    rows = s[order // K].masked_fill((held >= E).unsqueeze(-1), 0.0)
    return rows[inverse(order)], offsets(held), held


def _split(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """A rank's experts 4 to 7; 4 stands for those that are elsewhere."""
    chosen = s.topk(K).indices
    held, order = (chosen - 4).where(chosen >= 4, 4).flatten().sort(stable=True)
    return order, torch.searchsorted(held, up(4), right=True), held >= 4


def by(make: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """The order, and what is made of ids."""
    return lambda ids, others, s: (ids.argsort(stable=True), make(ids))


def by_order(make: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    def fn(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        order = ids.argsort(stable=True)
        return order, make(ids, order)

    return fn


def of_order(make: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A router's choice, sorted, and what is made of the order."""

    def fn(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        order = s.topk(K).indices.flatten().argsort(stable=True)
        return order, make(order)

    return fn


def of_sorted(make: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def fn(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        held, order = ids.sort(dim=0, stable=True)
        return order, make(held)

    return fn


def of_choice(make: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda ids, others, s: by(make)(s.topk(K).indices.flatten(), others, s)


OUTSIDE = drawn(-3, E + 3)
ALL = ("values", "order", "inverse", "ends")
TWO = ("order", "ends")
SPELLINGS: dict[str, Case] = {
    "transformers": _case(_transformers, *ALL),
    "transformers: ids outside": _case(_transformers, *ALL, inputs=OUTSIDE),
    "transformers: int32": _case(_transformers, *ALL, inputs=drawn(-3, E + 3, torch.int32)),
    "transformers: of a choice": _case(_choice, *ALL),
    "transformers: dynamic": _case(_transformers, *ALL, dynamic={0: (0,)}),
    "plain": _case(_plain, *ALL),
    "three of them": _case(_three, "values", *TWO),
    "plain: ids outside": _case(_plain, *ALL, inputs=OUTSIDE),
    "plain: dynamic": _case(_plain, *ALL, inputs=OUTSIDE, dynamic={0: (0,)}),
    "experts elsewhere": _case(_split, "values", *TWO),
    "an elsewhere that is nowhere": _case(
        _elsewhere, *ALL, counts={NAME: 1, "known_range": 1}
    ),
    "strided": _case(lambda ids, others, s: _transformers(ids[::3], others, s), *ALL),
    "of one token": _case(lambda ids, others, s: _plain(ids[:1].expand(S), others, s), *ALL),
    "searched from the left": _case(
        of_sorted(lambda held: torch.searchsorted(held, up(first=1))), *TWO, inputs=OUTSIDE
    ),
    "a side by name": _case(of_sorted(lambda held: searched(held, side="right")), *TWO),
    "bucketize": _case(of_sorted(lambda held: torch.bucketize(up(), held, right=True)), *TWO),
    "ids in order, by an index": _case(
        by_order(lambda ids, order: searched(ids[order], right=True)), *TWO, inputs=OUTSIDE
    ),
    "ids in order, by a gather": _case(
        by_order(lambda ids, order: searched(ids.gather(0, order), right=True)), *TWO,
        inputs=OUTSIDE,
    ),
    "compared": _case(
        by(lambda ids: compared(ids).cumsum(0).to(torch.int32)), *TWO, inputs=OUTSIDE
    ),
    "compared, the other axis first": _case(
        by(lambda ids: (up()[:, None] == ids).sum(1).cumsum(0)), *TWO, inputs=OUTSIDE
    ),
    "compared in fp32": _case(
        by(lambda ids: (ids[:, None] == up()).float().sum(0).cumsum(-1)), *TWO, inputs=OUTSIDE
    ),
    "counts and ends": _case(of_sorted(_both), *TWO, "counts", inputs=OUTSIDE),
    "counts only": _case(by(compared), "order", "counts", inputs=OUTSIDE),
    "one-hot": _case(by(lambda ids: F.one_hot(ids, E).sum(0).cumsum(0)), *TWO),
    "scatter_add": _case(by(lambda ids: added(ids).cumsum(0)), *TWO),
    "index_add": _case(
        of_choice(lambda ids: torch.zeros(E).index_add(0, ids, torch.ones(S)).cumsum(0).int()), *TWO
    ),
    "an index that accumulates": _case(of_choice(lambda ids: put(ids).cumsum(0)), *TWO),
    "counted as int32": _case(by(lambda ids: offsets(ids.int())), *TWO, inputs=far),
    "counted as fp32": _case(by(offsets), *TWO, inputs=far),
    "inverse: written": _case(of_order(inverse), "order", "inverse"),
    "inverse: scattered": _case(
        of_order(lambda o: torch.zeros_like(o).scatter(0, o, up(S))), "order", "inverse"
    ),
    "inverse: sorted": _case(of_order(lambda o: o.argsort()), "order", "inverse"),
    "inverse: int32": _case(
        of_order(lambda o: torch.zeros(S, dtype=torch.int32).scatter(0, o, up(S).int())),
        "order", "inverse",
    ),
    "inverse: twice": _case(of_order(lambda o: (o.argsort(), inverse(o))), "order", "inverse"),
}  # fmt: skip


def _mutant(fn: Callable[..., Any], like: str, *parts: str, **more: Any) -> Case:
    counts = {NAME: 1} if parts else {}
    return _case(fn, *parts, **{"counts": counts, "like": SPELLINGS[like], **more})


def _other(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """The inverse of another order."""
    held, order = torch.sort(ids, stable=True)
    rows = torch.arange(ids.shape[0])[order // K] + held
    return rows[inverse(others.argsort())], offsets(held)


def _rows(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    held, order = ids.view(T, K).sort(-1)
    return order, offsets(held.flatten())


def _floats(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    held, order = (ids + 0.25).sort()
    rows = torch.arange(ids.shape[0])[order // K] + held
    return rows[inverse(order)], offsets(held)


def _falling(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    held, order = ids.sort(descending=True, stable=True)
    return order, offsets(held), held


def _of(make: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    return lambda ids, others, s: (ids.argsort(stable=True), make(ids, others))


def _bytes(ids: Tensor) -> Tensor:
    every = torch.arange(E, dtype=torch.uint8)
    return (ids.to(torch.uint8)[:, None] == every).sum(0).cumsum(0)


def _unsorted(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    held, order = ids.sort(stable=True)
    return order, searched(ids, right=True) + 0 * held[0]


def _chosen_by_each(ids: Tensor, others: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    chosen = s.topk(K).indices
    counts = torch.zeros_like(s).scatter(1, chosen, 1.0).sum(0)
    return chosen.flatten().argsort(stable=True), counts.cumsum(0).int()


MUTANTS: dict[str, Case] = {
    "descending": _mutant(_falling, "three of them"),
    "floats": _mutant(_floats, "transformers"),
    "rows by themselves": _mutant(_rows, "transformers"),
    "inverse of another order": _mutant(_other, "transformers", "values", *TWO),
    "from the second expert on": _mutant(
        by(lambda ids: offsets(ids, low=1)), "counted as fp32", inputs=far
    ),
    "up to one more": _mutant(by(lambda ids: offsets(ids, high=E)), "counted as fp32", inputs=far),
    "of one bin more": _mutant(by(lambda ids: offsets(ids, E + 1)), "counted as fp32", inputs=far),
    "of one expert": _mutant(
        by(lambda ids: offsets(ids, 1, high=0)), "counted as fp32", inputs=OUTSIDE
    ),
    "counts of others": _mutant(_of(lambda ids, others: offsets(others)), "counted as fp32"),
    "counts of some": _mutant(by(lambda ids: offsets(ids[:T])), "counted as fp32"),
    "each counted twice": _mutant(
        by(lambda ids: offsets(ids[:, None].expand(S, 2))), "counted as fp32"
    ),
    "each of the next": _mutant(by(lambda ids: offsets(ids + 1)), "counted as fp32"),
    "as bytes": _mutant(by(_bytes), "compared", inputs=drawn(250, 250 + 2 * E)),
    "below each": _mutant(of_sorted(searched), "a side by name"),
    "searched among the unsorted": _mutant(_unsorted, "a side by name"),
    "searched from the second on": _mutant(
        of_sorted(lambda held: torch.searchsorted(held, up(first=1), right=True)), "a side by name"
    ),
    "searched by another order": _mutant(
        by_order(lambda ids, order: searched(ids[order.flip(0)], right=True)),
        "ids in order, by an index",
    ),
    "others in this order": _mutant(
        lambda ids, others, s: (lambda order: (order, searched(others[order], right=True)))(
            ids.argsort(stable=True)
        ), "ids in order, by an index",
    ),
    "searched for halves": _mutant(
        of_sorted(lambda held: torch.searchsorted(held, up() // 2, right=True)), "a side by name"
    ),
    "searched through a sorter": _mutant(
        of_sorted(lambda held: searched(held, right=True, sorter=up(S).flip(0))), "a side by name"
    ),
    "compared from one on": _mutant(by(lambda ids: compared(ids, 1).cumsum(0)), "compared"),
    "compared the other way": _mutant(by(lambda ids: compared(ids, dim=1).cumsum(0)), "compared"),
    "other than": _mutant(
        by(lambda ids: (ids[:, None] != up()).sum(0).cumsum(0)), "compared"
    ),
    "twos": _mutant(by(lambda ids: added(ids, one=2).cumsum(0)), "scatter_add"),
    "added to ones": _mutant(by(lambda ids: added(ids, zero=1).cumsum(0)), "scatter_add"),
    "from the end": _mutant(
        by(lambda ids: put(ids).cumsum(0)), "an index that accumulates", inputs=drawn(-E, E)
    ),
    "set, not added": _mutant(
        of_choice(lambda ids: torch.zeros(E, dtype=torch.int64).index_put(
            (ids,), torch.tensor(1)).cumsum(0)), "an index that accumulates",
    ),
    "numbered from one": _mutant(of_order(lambda o: inverse(o, 1)), "inverse: written"),
    "numbered by twos": _mutant(
        of_order(lambda o: torch.empty_like(o).index_put((o,), up(S) * 2)), "inverse: written"
    ),
    "added to places": _mutant(
        of_order(lambda o: torch.ones_like(o).index_put((o,), up(S), accumulate=True)),
        "inverse: written",
    ),
    "written beside others": _mutant(
        of_order(lambda o: o.new_zeros(S + 1).scatter(0, o, up(S))), "inverse: scattered"
    ),
    "some are written": _mutant(
        of_order(lambda o: torch.zeros_like(o).scatter(0, o[:T], up(T))), "inverse: scattered"
    ),
    "all to one place": _mutant(
        of_order(lambda o: torch.zeros_like(o).scatter(0, o[:1].expand(S), up(S))),
        "inverse: scattered",
    ),
    "sorted the other way": _mutant(
        of_order(lambda o: o.argsort(descending=True)), "inverse: sorted"
    ),
    "sorted a part": _mutant(of_order(lambda o: o[: S - 1].argsort()), "inverse: sorted"),
    "an order of any numbers": _mutant(
        lambda ids, others, s: (lambda o: (o, inverse(o)))(others.argsort(stable=True)),
        "inverse: written",
    ),
}  # fmt: skip
KNOWN_MISSES: dict[str, Case] = {
    "index_add": _case(
        by(lambda ids: torch.zeros(E).index_add(0, ids, torch.ones(S)).cumsum(0).int()), *TWO,
        why="decomposed to an index, which counts negative ids from the end",
    ),
    "not above each": _case(
        by(lambda ids: (ids <= up()[:, None]).sum(1)), *TWO, why="ends that are compared for"
    ),
    "chosen by each token": _case(
        _chosen_by_each, *TWO,
        why="counts the tokens of an expert: other numbers where a token names it twice",
    ),
}  # fmt: skip
