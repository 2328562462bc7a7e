"""Comparisons with indices that all or none of them pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._hand import Hand, Site

N, K = 14, 5
INDICES = {
    "topk": lambda s: s.topk(K, dim=-1).indices,
    "the least": lambda s: torch.topk(s, K, largest=False)[1],
    "argsort": lambda s: s.argsort(-1),
    "argmax": lambda s: s.argmax(-1, keepdim=True),
}
STEPS = {
    "nothing": lambda at: at,
    "narrow": lambda at: at.to(torch.int32),
    "flat": lambda at: at.flatten().unsqueeze(-1),
    "sorted": lambda at: at.sort(-1).values,
    "some": lambda at: at[..., :1],
    "turned": lambda at: at.flip(-1),
}
EDITS = {
    "moved": lambda at: at + 1,
    "negative": lambda at: -at,
    "doubled": lambda at: at * 2,
    "some are none": lambda at: torch.where(at < 3, -1, at + 1),
}
TESTS = {
    "elsewhere": lambda at: at >= N,
    "beyond the last": lambda at: at > N - 1,
    "here": lambda at: at < N,
    "up to the last": lambda at: at <= N - 1,
    "counted": lambda at: at >= 0,
}
NEAR = {
    "the last": lambda at: at >= N - 1,
    "the first": lambda at: at > 0,
    "all but the last": lambda at: at < N - 1,
}


def compared(hand: Hand) -> Site:
    """Scores ``[rows, 14]``."""
    rows, dtype = hand.number("rows", (7, 1, 3)), hand.dtype("dtype", "bf16", "fp32")
    choose = hand.pick("indices", INDICES)
    step = hand.pick("step", STEPS, mutants=EDITS, of="nothing")
    test = hand.pick("test", TESTS, mutants=NEAR, of="elsewhere")
    first, last = hand.seam("in front"), hand.seam("behind")

    def fn(s: Tensor) -> Tensor:
        s = first(s)
        passed = test(step(choose(s)))
        return last(s * passed.sum().to(s.dtype))

    s = hand.tensor("scores", rows, N, dtype=dtype)
    return hand.site("known_range", fn, (s,), {"known_range": 1})


FAMILIES = {"indices that are compared": compared}
