"""The kernels of all sites compiled beside one another, ahead of the check that runs them in turn.

Each fused op is called once with fake tensors of the site's shapes and strides, its launches
compile and do not run, in the threads that Triton compiles in. The check then finds them compiled.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4fuse import compat
from dsv4fuse.fusion import Candidate

log = logging.getLogger("dsv4fuse")
THREADS = 8  # at most; a kernel takes half a second, of which Python's lock is held a fifth


def precompile(candidates: Sequence[Candidate], device: torch.device) -> None:
    """Compile what these candidates would launch on that GPU. Whatever fails, fails again later,
    where it is somebody's to report."""
    try:
        from triton import AsyncCompileMode

        from dsv4fuse.kernels._launch import instead_of_launches
    except ImportError:  # no Triton: nothing to compile
        return
    threads = min(THREADS, len(candidates), os.cpu_count() or 1)
    if threads < 2:
        return
    try:
        with (
            ThreadPoolExecutor(threads) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
            compat.outside_compilation(),
            instead_of_launches(_compile),
        ):
            for candidate in candidates:
                _called(candidate, device)
    except RuntimeError:  # somebody else is compiling this way
        log.debug("compiling ahead", exc_info=True)


def _called(candidate: Candidate, device: torch.device) -> None:
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = [_fake(n, device) for n in candidate.inputs]
        with _Bodies():
            candidate.call(*inputs)
    except Exception:
        log.debug("compiling %s ahead", candidate.fusion, exc_info=True)


def _fake(node: fx.Node, device: torch.device) -> Any:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return compat.hint(value)
    sizes, strides = ([compat.hint(n) for n in ns] for ns in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=device)


class _Bodies(TorchDispatchMode):
    """A fused op called with fake tensors is its body, launches and all, not its fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "dsv4fuse":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(_CUDA, *args, **(kwargs or {}))


_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@dataclass(frozen=True)
class _Pointer:
    """What a compiler asks of a tensor: its dtype, and whether its address is a multiple of 16."""

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return 0


def _compile(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def pointer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return _Pointer(value.dtype, value.storage_offset() * value.element_size())

    named = {name: pointer(value) for name, value in kwargs.items()}
    kernel.run(*map(pointer, args), grid=grid, warmup=True, **named)
