"""What launches of Gluon kernels ask of the device and the tensors."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dsv4fuse import compat


def is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def gluon_kernel(module: str, name: str) -> Any:
    """None where it cannot be imported: Gluon is experimental, may be absent or have changed."""
    try:
        return getattr(importlib.import_module(f".{module}", __package__), name)
    except Exception:  # whatever a changed interface raises
        return None


def refusal(device: torch.device, kernel: Any) -> str | None:
    """Why no launch on this device is that of a Gluon kernel, or None."""
    if not is_hopper(device):
        return "It is for GPUs of compute capability 9."
    if kernel is None:
        return "This Triton has no Gluon, or not the one that the kernel was written in."
    if compat.packaging():
        return "A package holds launches of Triton's kernels only."
    return None


def aligned(t: Tensor) -> Tensor:
    """Itself where each row is dense and starts at a multiple of 32 bytes, or a copy that is so. A
    fake tensor's first row is taken for one that does."""
    steps = [s for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
    start = 0 if isinstance(t, FakeTensor) else t.data_ptr()
    if start % 32 == 0 and t.stride(-1) == 1 and not any(s % 16 for s in steps):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
