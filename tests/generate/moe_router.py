"""The router: scores → choice → gathered weights, by top-k and by token id."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spellings import moe_router as r
from ..spellings._case import BF16, FP32
from ._hand import Hand, Site

ONE = {"moe_router": 1}
CHOICES = {
    "bias behind": lambda s, b: (s + b).topk(r.K, dim=-1).indices,
    "bias in front": lambda s, b: (b + s).topk(r.K)[1],
    "row of bias": lambda s, b: torch.topk(s + b[None], r.K, dim=1).indices,
    "not sorted": lambda s, b: (s + b).topk(r.K, sorted=False).indices,
    "two": lambda s, b: (s + b).topk(2).indices,
    "no bias": lambda s, b: s.topk(r.K)[1],
}
CHOICE_EDITS = {
    "smallest": lambda s, b: (s + b).topk(r.K, dim=-1, largest=False).indices,
    "factor": lambda s, b: (s * b).topk(r.K, dim=-1).indices,
    "twice": lambda s, b: (s + b + b).topk(r.K, dim=-1).indices,
    "next expert": lambda s, b: ((s + b).topk(r.K, dim=-1).indices + 1) % r.E,
    "other rows": lambda s, b: (s + b).topk(r.K, dim=-1).indices.roll(1, 0),
}
FUNCTION_EDITS = {
    "beta": lambda x: torch.nn.functional.softplus(x, beta=2.0).sqrt(),
    "no root": torch.nn.functional.softplus,
    "softmax over tokens": lambda x: x.softmax(dim=0),
}
WEIGHTS = {"eps": r.add_eps} | r.WEIGHTS
GATHERS = {"axis 1": r.by_gather} | r.GATHERS
# Two spellings that torch itself computes by another kernel than the graph's.
NARROW = ("softplus", "sigmoid", "softmax")


# A table's entries might be negative, which these two wrap around and a gather does not.
NO_WRAP = {n: f for n, f in GATHERS.items() if n not in ("along", "index")}


def _scores(hand: Hand, gathers: dict = GATHERS) -> dict:
    dtype, wide = hand.dtype(), hand.flag("wide")
    names = r.FUNCTIONS if wide or dtype == FP32 else NARROW
    functions = {n: r.FUNCTIONS[n] for n in names}
    func = hand.pick("scores", functions, mutants=FUNCTION_EDITS, of="softplus")
    return dict(
        func=func,
        wide=wide,
        gather=hand.pick("gather", gathers),
        weigh=hand.pick("weights", WEIGHTS),
    )


def by_top(hand: Hand) -> Site:
    """The best of the biased scores."""
    pieces = _scores(hand)
    dtype = {"bf16": BF16, "fp16": torch.float16, "fp32": FP32}[hand.words["dtype"]]
    rows = hand.number("rows", (7, 1, 3))
    pieces["choose"] = hand.pick("choice", CHOICES, mutants=CHOICE_EDITS, of="bias behind")
    first = hand.seam("in front")
    x = hand.tensor("x", rows, r.E, dtype=dtype)
    bias = hand.random(r.E, dtype=hand.dtype("bias", "fp32", "bf16"))
    return hand.site(
        "moe_router", lambda x, b: r.route(first(x), b, **pieces), (x, bias), ONE, exact=False
    )


def by_id(hand: Hand) -> Site:
    """Experts that a table names for each token."""
    pieces = _scores(hand, NO_WRAP)
    dtype = {"bf16": BF16, "fp16": torch.float16, "fp32": FP32}[hand.words["dtype"]]
    rows, find = hand.number("rows", (7, 1, 3)), hand.pick("find", r.LOOKUPS)
    first = hand.seam("in front")
    x = hand.tensor("x", rows, r.E, dtype=dtype)
    ids = torch.randint(r.VOCAB, (rows,), generator=hand.random.generator)

    def fn(x: Tensor, table: Tensor, ids: Tensor):
        return r.look_up(first(x), table, ids, find=find, **pieces)

    return hand.site("moe_router", fn, (x, r._table(hand.random), ids), ONE, exact=False)


FAMILIES = {"by top-k": by_top, "by token id": by_id}
