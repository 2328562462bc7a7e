"""Constants from the host, spelled and misspelled. On a CPU nothing is copied and none is taken.

``tests/test_host_sync.py`` runs the same functions with x on a GPU, a pretended one or a real one:
there each of ``SPELLINGS`` is one site, and none of ``MUTANTS`` and ``KNOWN_MISSES`` is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._case import BF16, FP32, Case, Draw, plain


def _case(fn: Callable[..., Any], **more: Any) -> Case:
    return Case(plain(fn), lambda: (Draw()(4, 3, dtype=FP32),), **more)


def _masked(x: Tensor) -> Tensor:
    none = torch.tensor(-1).to(x.device)
    return torch.where(x > 0, torch.ones_like(x, dtype=torch.int64), none)


def _in_place(x: Tensor) -> Tensor:
    count = torch.tensor(1.0).to(x.device)
    count += x.sum()
    return count


SPELLINGS: dict[str, Case] = {
    "tensor, moved": _case(lambda x: x * torch.tensor(2.5).to(x.device)),
    "tensor on the device": _case(lambda x: x * torch.tensor(2.5, device=x.device)),
    "integer": _case(_masked),
    "as_tensor": _case(lambda x: x + torch.as_tensor(-1, device=x.device)),
    "new_tensor": _case(lambda x: x + x.new_tensor(3.0)),
    "to a tensor": _case(lambda x: x + torch.tensor(3).to(x)),
    "bool": _case(lambda x: torch.tensor(True).to(x.device) & (x > 0)),
    "infinity": _case(lambda x: torch.maximum(x, torch.tensor(float("-inf")).to(x.device))),
    "equal elements": _case(lambda x: x + torch.tensor([7.0, 7.0, 7.0], device=x.device)),
    "zeros": _case(lambda x: x + torch.zeros(3).to(x.device)),
    "ones like": _case(lambda x: x + torch.ones(4, 1).to(x.device).expand(4, 3)),
    "full": _case(lambda x: x.to(BF16) + torch.full((3,), 7.3).to(x.device, BF16)),
    "scalar_tensor": _case(lambda x: x + torch.scalar_tensor(3.0).to(x.device)),
    "arange": _case(lambda x: x + torch.arange(3).to(x.device)),
    "arange, steps": _case(lambda x: x + torch.arange(6, 0, -2).to(x.device)),
    "arange, view": _case(lambda x: x + torch.arange(4)[:, None].to(x.device)),
    "arange, cast": _case(lambda x: x + torch.arange(3).float().to(x.device)),
    "changed afterwards": _case(_in_place),
    "returned": _case(lambda x: (x, torch.tensor(-1).to(x.device))),
}


def _mutant(fn: Callable[..., Any], like: str, **more: Any) -> Case:
    return _case(fn, like=SPELLINGS[like], **more)


def _changed_before(x: Tensor) -> Tensor:
    count = torch.tensor(1.0)
    count.add_(0.5)
    return x * count.to(x.device)


MUTANTS: dict[str, Case] = {
    "changed before": _mutant(_changed_before, "tensor, moved"),
    "a product of constants": _mutant(
        lambda x: x * (torch.tensor(2.5) * 3).to(x.device), "tensor, moved"
    ),
    "different elements": _mutant(
        lambda x: x + torch.tensor([7.0, 8.0, 7.0], device=x.device), "equal elements"
    ),
    "random": _mutant(
        lambda x: (x + torch.zeros(3).bernoulli_(0.5).to(x.device)).gt(-100.0).float(), "zeros"
    ),
    "a power": _mutant(lambda x: x + (0.5 ** torch.arange(3)).to(x.device), "arange"),
    "made on the device": _mutant(
        lambda x: x + torch.full((3,), 7.0, device=x.device), "zeros"
    ),
    "of the data": _mutant(lambda x: x * x.detach().sum().to(x.device), "tensor, moved"),
    "left on the host": _mutant(lambda x: x * torch.tensor(-2.5), "tensor, moved"),
}

KNOWN_MISSES: dict[str, Case] = {}
