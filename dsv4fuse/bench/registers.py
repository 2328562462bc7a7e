"""What the compiled kernels of ours take of a multiprocessor: registers, spills, shared memory.

Read from what Inductor launches, so it is the code that was timed: its autotuner holds for each
configuration of a kernel a launcher with the figures that the driver gave when it was loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dsv4fuse.bench.launches import kernel_names


@dataclass(frozen=True)
class Kernel:
    """One configuration of a kernel; ``constants`` are its compile-time numbers and words.

    ``registers`` are those of a thread, ``spills`` what did not fit and went to local memory, in
    the driver's unit; ``shared`` is in bytes. None: the driver did not say.
    """

    name: str
    warps: int
    stages: int
    registers: int | None
    spills: int | None
    shared: int | None
    constants: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        spilled = f" + {self.spills} spilled" if self.spills else ""
        return f"{self.name} ×{self.warps}: {self.registers}{spilled}"


@contextlib.contextmanager
def collected() -> Iterator[list[Kernel]]:
    """A list that holds, at the end, the kernels of what was compiled and run meanwhile."""
    from torch._inductor.codecache import PyCodeCache

    PyCodeCache.cache_clear()  # a module that was loaded before is not loaded again
    found: list[Kernel] = []
    yield found
    found += of(PyCodeCache.modules)


def of(modules: Iterable[object]) -> list[Kernel]:
    """Each configuration of our kernels in modules as Inductor writes them, once."""
    held = [value for module in modules for value in vars(module).values()]
    found = []
    for autotuner in held:
        name = getattr(getattr(autotuner, "fn", None), "__name__", "")
        if name in kernel_names():
            found += [_of(name, autotuner, x) for x in getattr(autotuner, "launchers", ())]
    return [kernel for i, kernel in enumerate(found) if kernel not in found[:i]]


def _of(name: str, autotuner: Any, launcher: Any) -> Kernel:
    constants = {**autotuner.triton_meta.get("constants", {}), **launcher.config.kwargs}
    return Kernel(
        name, launcher.config.num_warps, launcher.config.num_stages, launcher.n_regs,
        launcher.n_spills, launcher.shared,
        {k: v for k, v in constants.items() if isinstance(v, (bool, int, float, str))},
    )  # fmt: skip
