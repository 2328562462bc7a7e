"""When a compiled program computes what eager does: bits, or no more than rounding apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

STEPS = 2.0  # one for the rule or the order of a sum, one for the rounding of what follows


def copied(args: Sequence[Any]) -> list[Any]:
    """The same values with the same strides; a plain clone would make a view dense."""

    def one(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)

    return [tree_map_only(Tensor, one, a) for a in args]


def difference(a: Tensor, b: Tensor, exact: bool) -> str | None:
    """None where b is what a is, else what is wrong."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return None if torch.equal(a, b) else "integers differ"
    x, y = a.double(), b.double()
    if not torch.equal(x.isnan(), y.isnan()):
        return "NaN elsewhere"
    x, y = x.nan_to_num(), y.nan_to_num()
    if exact:
        return None if torch.equal(x, y) else f"not exact, by {(x - y).abs().max().item():.3g}"
    if not x.numel():
        return None
    step = torch.finfo(a.dtype).eps * (x.abs().amax(-1, keepdim=True) if x.dim() else x.abs())
    worst = ((x - y).abs() / (step + 1e-300)).max().item()
    return None if worst <= STEPS else f"by {worst:.3g} rounding steps"
