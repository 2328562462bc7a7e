"""torch's compile workers: processes in which Inductor, and here whoever asks, compiles kernels."""

from __future__ import annotations

import contextlib
import importlib
from concurrent import futures
from typing import Any

from torch._inductor.async_compile import AsyncCompile, get_compile_threads


def start() -> bool:
    """Starts them, as torch's own backend does, unless they run. False where there are none to be
    (TORCHINDUCTOR_COMPILE_THREADS=1). This process then takes the ptxas that they take."""
    if get_compile_threads() < 2:
        return False
    take_their_ptxas()
    AsyncCompile.use_process_pool()
    return True


def warm() -> None:
    """Starts them, and has each do what the first kernel of a process begins with: a second."""
    with contextlib.suppress(RuntimeError):  # of a pool whose process has died
        for _ in range(get_compile_threads() if start() else 0):
            AsyncCompile.process_pool().submit(_begin)


def _begin() -> None:
    take_their_ptxas()
    from triton.runtime.cache import triton_key

    triton_key()  # a hash of Triton's files
    importlib.import_module("dsv4fuse.kernels._launch")


def compiled(kernel: Any, folder: str) -> None:
    """A worker's job, here: those of a module that imports more would begin with its imports."""
    take_their_ptxas()
    kernel.compiled(folder)


def pool(patience: float) -> Any:
    """Their pool, or None if they do not run within so many seconds."""
    with contextlib.suppress(futures.TimeoutError):
        AsyncCompile.wait_pool_ready(patience)
    return AsyncCompile.process_pool() if AsyncCompile.use_process_pool() else None


def take_their_ptxas() -> None:
    """That of torch, where it brings one: its version is a part of the keys of Triton's cache, and
    Triton remembers the version that it asked first."""
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

    _set_triton_ptxas_path()
    with contextlib.suppress(ImportError):  # no Triton, or none for NVIDIA
        from triton.backends.nvidia.compiler import get_ptxas_version

        get_ptxas_version.cache_clear()
