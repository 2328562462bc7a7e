"""What Triton makes of the kernels for a GPU that need not be here: registers, stack, seconds.

Nothing is run. The ops are called with tensors on the CPU; every launch stops once its kernel is
compiled, so results hold nothing.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dsv4fuse import ops
from dsv4fuse.backend import dsv4fuse
from dsv4fuse.fusion import Sizes, registry
from dsv4fuse.kernels import _common as common

assert ops  # all kernels: what is imported later would take "launched on a CPU" for interpreted
OPTIONS = {"select": "always", "inner": "eager", "verify": False}


@dataclass(frozen=True)
class Built:
    """One compiled kernel: 32-bit ``registers`` and bytes of ``stack`` of a thread (what does not
    fit into registers lies there), bytes of ``shared`` memory of a program, ``seconds`` it took."""

    kernel: str
    warps: int
    registers: int
    stack: int
    shared: int
    seconds: float


@dataclass(frozen=True)
class Launch:
    """A kernel as a fusion's variant launches it at a number of tokens; ``error``: it is none."""

    fusion: str
    variant: str
    tokens: int
    built: Built | None
    error: str = ""


class _Absent:
    """Stands for the driver of a GPU of that compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def building(capability: int = 90) -> Iterator[list[Built]]:
    """Inside, launches on CPU tensors only compile; the list grows by what they compiled.

    ``capability``: ten times the compute capability. Raises RuntimeError where Triton interprets.
    """
    if not isinstance(common.narrow, JITFunction):
        raise RuntimeError("TRITON_INTERPRET=1 is set: there is nothing to compile.")
    found: list[Built] = []
    known: set[int] = set()
    launch, active, launched = JITFunction.run, driver._active, common.INTERPRETED

    def only_compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        started = time.perf_counter()
        made = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        if id(made) not in known:
            known.add(id(made))
            found.append(_built(made, time.perf_counter() - started))
        return made

    driver.set_active(_Absent(capability))  # type: ignore[arg-type]
    JITFunction.run = only_compiled
    common.INTERPRETED = True  # launch also on a CPU
    try:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            yield found
    finally:
        driver._active, JITFunction.run, common.INTERPRETED = active, launch, launched


def _built(made: Any, seconds: float) -> Built:
    used = usage(made.asm["cubin"])
    return Built(
        made.metadata.name, made.metadata.num_warps, used["REG"], used["STACK"],
        made.metadata.shared, seconds,
    )  # fmt: skip


def usage(cubin: bytes) -> dict[str, int]:
    """REG and STACK of a thread and more, as cuobjdump states them of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", done.stdout)}


def launches(
    names: Sequence[str], sizes: Sizes, tokens: Iterable[int], capability: int = 90,
    progress: Callable[[str, int], None] = lambda text, total: None,
) -> list[Launch]:  # fmt: skip
    """The kernels of each variant of these fusions (all if none), each where it is first met."""
    found: list[Launch] = []
    sites = [
        (name, v, t) for name in names or registry() for v in registry()[name].examples
        for t in tokens
    ]  # fmt: skip
    with building(capability) as built, torch.no_grad():
        for name, variant, t in sites:
            progress(f"{name} ({variant}), {t} tokens", len(sites))
            torch._dynamo.reset()
            built.clear()
            error = ""
            try:
                made = registry()[name].examples[variant](t, sizes, "cpu")
                options = {**OPTIONS, "expect": {name: 1}}
                fused = torch.compile(made.fn, backend=dsv4fuse, options=options, dynamic=False)
                fused(*made.inputs)
            except Exception as failure:  # whatever a compiler raises; the others still count
                error = (str(failure).strip().splitlines() or [repr(failure)])[0]
            found += [Launch(name, variant, t, b) for b in built]
            if error:
                found.append(Launch(name, variant, t, None, error))
    return found


def table(found: Sequence[Launch]) -> Table:
    """One row a kernel."""
    columns = ("fusion", "variant", "tokens", "kernel", "warps", "registers", "stack", "shared", "s")
    out = Table(*columns)
    for row in found:
        b = row.built
        cells = [row.error] if b is None else [
            b.kernel, str(b.warps), str(b.registers), str(b.stack), str(b.shared),
            f"{b.seconds:.2f}",
        ]  # fmt: skip
        out.add_row(row.fusion, row.variant, str(row.tokens), *cells)
    return out
