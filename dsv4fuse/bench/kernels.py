"""What Triton makes of the kernels for a GPU that need not be here: registers, stack, seconds.

Nothing is run. The ops are called with tensors on the CPU; a launch is described and left out, so
results hold nothing, and torch's compile workers build what was described.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass

import torch
import triton
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dsv4fuse import compile_workers, ops
from dsv4fuse.backend import dsv4fuse
from dsv4fuse.bench.fusions import variants
from dsv4fuse.fusion import Example, Sizes, registry
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels._launch import Specialised, described
from dsv4fuse.report import FusionError

assert ops  # all kernels: one imported later would take "also on a CPU" for interpreted
# KiB of shared memory that a program may have, by ten times the compute capability.
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
STARTED = 60.0  # seconds in which the compile workers are there, or are not waited for
OPTIONS = {"select": "always", "inner": "eager", "verify": False}


@dataclass(frozen=True)
class Built:
    """One compiled kernel: 32-bit ``registers`` and bytes of ``stack`` of a thread (what does not
    fit into registers lies there), bytes of ``shared`` memory of a program, ``seconds`` it took.

    ``error``: it does not compile.
    """

    kernel: str
    warps: int = 0
    registers: int = 0
    stack: int = 0
    shared: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Launch:
    """A kernel as a fusion's variant launches it at a number of tokens."""

    fusion: str
    variant: str
    tokens: int
    built: Built


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
def describing(capability: int = 90) -> Iterator[list[Specialised]]:
    """Inside, launches on CPU tensors are described; the list grows by one for each.

    ``capability``: ten times the compute capability. Raises RuntimeError where Triton interprets.
    """
    if not isinstance(common.narrow, JITFunction):
        raise RuntimeError("TRITON_INTERPRET=1 is set: there is nothing to compile.")
    active, launched = driver._active, common.INTERPRETED
    driver.set_active(_Absent(capability))
    common.INTERPRETED = True  # launch also on a CPU
    try:
        with described() as found:
            yield found
    finally:
        driver._active, common.INTERPRETED = active, launched


def build(kernel: Specialised) -> Built | None:
    """Compiles it anew. None where this process would compile something else."""
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = kernel.compiled(folder)
    except Exception as error:  # whatever a compiler raises
        return Built(kernel.name, error=_first_line(error))
    if made is None:
        return None
    used = usage(made.asm["cubin"])
    return Built(
        kernel.name, made.metadata.num_warps, used["REG"], used["STACK"], made.metadata.shared,
        time.perf_counter() - started,
    )  # fmt: skip


def _result(job: Future[Built | None] | None) -> Built | None:
    """What a worker built; None if there was none, or it did not live."""
    with contextlib.suppress(Exception):
        return job.result() if job is not None else None
    return None


def _first_line(error: BaseException) -> str:
    """Of the error at the bottom: Triton chains one for each call that a kernel makes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [repr(error)])[-1]


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
    """The kernels of these ``variants``, each where it is first met."""
    with_workers = compile_workers.start()
    met: dict[str, tuple[tuple[str, str, int], Specialised]] = {}
    counts = list(tokens)
    sites = [(*named, t) for named in variants(names) for t in counts]
    for site in sites:
        name, variant, t = site
        progress(f"{name} ({variant}), {t} tokens", len(sites))
        example = registry()[name].examples[variant](t, sizes, "cpu")
        for kernel in _launched(name, example, capability):
            met.setdefault(kernel.key, (site, kernel))
    workers = compile_workers.pool(STARTED) if with_workers else None
    started = [workers.submit(build, k) if workers else None for _, k in met.values()]
    found = []
    for job, (site, kernel) in zip(started, met.values(), strict=True):
        progress(kernel.name, len(sites) + len(met))
        found.append(Launch(*site, _result(job) or build(kernel)))  # type: ignore[arg-type]
    return found


def _launched(name: str, made: Example, capability: int) -> list[Specialised]:
    """What the fused example launches. Raises FusionError where it is not taken."""
    torch._dynamo.reset()
    options = {**OPTIONS, "expect": {name: 1}}
    fused = torch.compile(made.fn, backend=dsv4fuse, options=options, dynamic=False)
    with describing(capability) as found, torch.no_grad():
        try:
            fused(*made.inputs)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, FusionError):
                raise  # others: behind the launch there may be what only a GPU computes
    return found


def table(found: Sequence[Launch], capability: int) -> Table:
    """One row a kernel; what does not fit that GPU is marked."""
    out = Table()
    for title in ("fusion", "tokens", "kernel", "warps", "regs", "stack", "shared", "s"):
        out.add_column(title, overflow="fold", no_wrap=title == "kernel")
    for row in found:
        b = row.built
        shared = f"{b.shared}{'' if fits(b, capability) else ' TOO MUCH'}"
        figures = (str(b.warps), str(b.registers), str(b.stack), shared, f"{b.seconds:.2f}")
        out.add_row(f"{row.fusion} ({row.variant})", str(row.tokens), b.kernel,
                    *((b.error,) if b.error else figures))  # fmt: skip
    return out


def fits(built: Built, capability: int) -> bool:
    """Can a program have that much shared memory? True for a GPU whose limit is not known."""
    return built.shared <= 1024 * SHARED.get(capability, built.shared)


def wrong(found: Sequence[Launch], capability: int) -> list[str]:
    """What does not compile, or would not run, in words."""
    said = []
    for row in found:
        where = f"{row.fusion} ({row.variant}) at {row.tokens} tokens"
        if row.built.error:
            said.append(f"{where}: {row.built.kernel}: {row.built.error}")
        elif not fits(row.built, capability):
            limit = 1024 * SHARED[capability]
            said.append(f"{where}: {row.built.kernel} takes {row.built.shared} of {limit} bytes.")
    return said


def save(found: Sequence[Launch], path: pathlib.Path, capability: int) -> None:
    data = {"capability": capability, "torch": torch.__version__, "triton": triton.__version__}
    text = json.dumps({**data, "launches": [asdict(f) for f in found]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
