"""A small call of each op: a kernel's test module (``test_kernel_*.py``) has one for each of its
ops, in ``calls(small)``. opcheck, the fakes and the sanitizer find them here."""

from __future__ import annotations

import importlib
import pathlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Small:
    """What the calls of several ops share; ``length`` is their token axis."""

    def __init__(self, device: str, length: int) -> None:
        self.device, self.length = device, length
        self.q, self.kv, self.w = self(2, length, 2, 128), self(2, length, 128), self(128)
        self.cos, self.sin = self.fp32(2, length, 32), self.fp32(2, length, 32)
        self.ids = torch.arange(length, device=device)
        self.slot = torch.arange(2 * length, device=device).view(2, length) * 2 - length
        # Attention weights are rounded before their division, by the reference after it: on a CPU,
        # where an interpreted kernel meets the reference, they are powers of two (3 + 1, 7 + 1).
        self.even = float(device != "cpu")

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def fp32(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    @cached_property
    def mixing(self) -> tuple[Tensor, ...]:
        """Streams ``[T,4,64]`` and the weights, scales and base of their mixes."""
        scale, base = torch.ones(3, device=self.device), self.fp32(24)
        return self(self.length, 4, 64), self.fp32(24, 256), scale, base

    @cached_property
    def expansion(self) -> tuple[Tensor, ...]:
        """A sublayer's output, the streams, post and comb."""
        mixed = self.fp32(self.length, 4, 4)
        return self(self.length, 64), self.mixing[0], mixed[..., 0], mixed


def calls(device: str, length: int = 3) -> dict[str, Call]:
    """Of each op, positional and keyword arguments."""
    small = Small(device, length)
    found: dict[str, Call] = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("test_kernel_*.py")):
        module = importlib.import_module(f".{path.stem}", __package__)
        found |= getattr(module, "calls", lambda _: {})(small)
    return found
