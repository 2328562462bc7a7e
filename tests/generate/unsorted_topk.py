"""A mask made of the indices of a top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from ._hand import Hand, Site

N, K = 14, 5
CHOICES = {
    "method": lambda s: s.topk(K, dim=-1).indices,
    "second": lambda s: torch.topk(s, K)[1],
    "sorted": lambda s: s.topk(K, -1, True, True).indices,
    "the least": lambda s: s.topk(K, largest=False).indices,
    "all": lambda s: s.topk(N).indices,
}
STEPS = {
    "nothing": lambda at: at,
    "narrow": lambda at: at.to(torch.int32).long(),
    "moved": lambda at: (at + 3) % N,
    "a limit": lambda at: torch.where(at >= 9, torch.full_like(at, N - 1), at),
    "a number": lambda at: at.masked_fill(at < 4, 0),
    "by rows": lambda at: torch.where(at > torch.arange(at.shape[-2])[:, None], at, 0),
    "clamped": lambda at: at.clamp(2, 10),
}
EDITS = {
    "places": lambda at: (at + torch.arange(at.shape[-1])) % N,
    "first ones": lambda at: torch.where(torch.arange(at.shape[-1]) < 2, at, 0),
    "summed up": lambda at: at.cumsum(-1) % N,
    "neighbours": lambda at: (at + at.roll(1, -1)) % N,
    "fewer": lambda at: at[..., :2],
    "differences": lambda at: at.diff(dim=-1).abs(),
    "of the first": lambda at: (at + at[..., :1]) % N,
}
ENDS = {
    "mask": lambda s, at: torch.zeros_like(s, dtype=torch.bool).scatter(-1, at, True),
    "in place": lambda s, at: torch.full_like(s, float("-inf")).scatter_(-1, at, 0.0),
    "scores": lambda s, at: s.scatter(s.dim() - 1, at, -1.0),
    "one axis more": lambda s, at: s.new_zeros(s.shape).unsqueeze(1).scatter(
        -1, at.unsqueeze(1), 2.5
    ),
}  # fmt: skip


def mask(hand: Hand) -> Site:
    """Scores ``[rows, 14]``, some of them equal."""
    rows, dtype = hand.number("rows", (7, 1, 3)), hand.dtype("dtype", "bf16", "fp32")
    choose, end = hand.pick("choice", CHOICES), hand.pick("end", ENDS)
    step = hand.pick("step", STEPS, mutants=EDITS, of="nothing")
    first, last = hand.seam("in front"), hand.seam("behind")
    equal = hand.flag("equal ones")

    def fn(s: Tensor) -> Tensor:
        s = first(s)
        return last(end(s, step(choose(s))).to(s.dtype))

    s = hand.tensor("scores", rows, N, dtype=dtype)
    s = s.round() if equal else s
    return hand.site("unsorted_topk", fn, (s,), {"unsorted_topk": 1})


FAMILIES = {"a mask of the largest": mask}
