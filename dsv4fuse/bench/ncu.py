"""``bench --limits``: Nsight Compute (``ncu``) over one call of ours for each row.

``ncu`` runs a child for some rows (for a step of a whole model, ``ncu_steps``). It calls what it
compiled of each a few times, and once more between cudaProfilerStart and cudaProfilerStop, inside
of an NVTX range with the row's number: nothing else is counted, and ``ncu`` says of each launch in
which range it was. A launch is repeated for as many passes as its counters need. Clocks and caches
are left alone, as in the benchmark.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from dsv4fuse.bench import counters, limits
from dsv4fuse.bench.limits import Row
from dsv4fuse.bench.machine import environment
from dsv4fuse.terminal import table_console
from dsv4fuse.verify import said

if TYPE_CHECKING:
    from dsv4fuse.bench.fusions import Site

WARM_UP = 3  # calls
AT_ONCE = 40  # rows of a child: to start one takes seconds, and what it counted comes at its end
FLAGS = (
    "--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "function", "--nvtx",
    "--profile-from-start", "off", "--target-processes", "application-only",
    "--clock-control", "none", "--cache-control", "none",
)  # fmt: skip


class NcuError(RuntimeError):
    """Nsight Compute is not there, or cannot count."""


def find() -> str:
    """The path of ``ncu``."""
    homes = [os.environ.get("CUDA_HOME") or "/usr/local/cuda", "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)])
    if (found := shutil.which("ncu", path=path)) is None:
        raise NcuError("There is no ncu (Nsight Compute) on PATH, in $CUDA_HOME/bin or in "
                       "/usr/local/cuda/bin.")  # fmt: skip
    return found


def run(
    names: Sequence[str], models: Sequence[str], tokens: Sequence[int], path: pathlib.Path,
    progress: Callable[[str, int], None] = lambda text, total: None, processes: int = 1,
) -> list[str]:  # fmt: skip
    """Profiles and prints; what went wrong in words. Writes ``path`` (``save``) after each child.

    ``progress`` is called before each with its rows and the number of all steps. More than one of
    ``processes``: so many compile all rows before the first is profiled, a step each.
    """
    from dsv4fuse.bench import fusions_table, workers

    ncu, rows, wrong = find(), list[Row](), list[str]()
    if path.exists():
        limits.load(path)  # what is no such file is refused before there is anything to lose
    sites = list(fusions_table.every(names, models, tokens))
    groups = [sites[i : i + AT_ONCE] for i in range(0, len(sites), AT_ONCE)]
    steps = len(groups) + (len(sites) if processes > 1 else 0)
    if processes > 1:
        workers.compile_all(sites, processes, lambda text: progress(text, steps), ways=1)
    count = torch.cuda.get_device_properties(0).multi_processor_count
    made_on = {**environment(), "multiprocessors": count}
    metrics = list(counters.METRICS)
    for group in groups:
        progress(f"{len(group)} rows from {group[0][0]} on", steps)
        try:
            call = ["-m", "dsv4fuse.bench.ncu", json.dumps(list(group))]
            text, failed = counted(ncu, metrics, call, len(group))
        except NcuError as error:
            if not rows:  # nor will it count what comes next
                raise
            text, failed = "", dict.fromkeys(range(len(group)), str(error))
        found = counters.parsed(text, count)
        for number, (name, variant, model, t) in enumerate(group):
            if number in found:
                kernels, date = tuple(found[number]), str(made_on["date"])
                rows.append(Row(name, variant, model, t, kernels, date))
            else:
                wrong.append(f"{name} ({variant}) of {model} at {t} tokens: {failed[number]}.")
        limits.save(rows, path, made_on)
    _show(rows)
    return wrong


def _show(rows: Sequence[Row]) -> None:
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        columns = limits.cells(own[0].kernels[0])
        table = Table("fusion", "variant", "tokens", "kernel", *columns, title=model)
        for row in own:
            for kernel in row.kernels:
                of = row.fusion, row.variant, str(row.tokens)
                table.add_row(*of, kernel.name, *limits.cells(kernel).values())
        table_console().print(table)


def counted(
    ncu: str, metrics: list[str], call: Sequence[str], rows: int, only: str = ""
) -> tuple[str, dict[int, str]]:
    """What ``ncu`` printed of this call of Python, and for each of its rows why it may not be in
    there. It ends at a metric that it does not know; that one is taken out of ``metrics``, and
    ``ncu`` run again. ``only`` the kernels in whose full names this is found, a pattern."""
    chosen = ["--kernel-name-base", "demangled", "--kernel-name", f"regex:{only}"] if only else []
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "ncu.csv"
        while True:
            file.unlink(missing_ok=True)
            done = subprocess.run(
                [ncu, *FLAGS, *chosen, "--metrics", ",".join(metrics), "--log-file", str(file),
                 sys.executable, *call],
                capture_output=True, text=True,
            )  # fmt: skip
            text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
            messages = f"{text}\n{done.stdout}\n{done.stderr}"
            refused = " ".join(re.findall("Failed to find metric (.*)", messages))
            known = [m for m in metrics if not re.search(rf"\b{m.split('.')[0]}\b", refused)]
            if known == metrics:
                break
            metrics[:] = known
    if "ERR_NVGPUCTRPERM" in messages:
        raise NcuError(
            "Nsight Compute may not read the counters of this GPU (ERR_NVGPUCTRPERM): run it as "
            "root, or have the driver loaded with NVreg_RestrictProfilingToAdminUsers=0."
        )
    errors = re.findall("==ERROR== (.*)", messages)
    if done.returncode and not errors:
        errors = done.stderr.splitlines()[-1:]
    why = " ".join(errors).rstrip(".") or "ncu saw no kernel of it"
    own = re.findall(rf"^{counters.RANGE} (\d+): (.*)$", done.stdout, re.MULTILINE)
    if '"ID"' not in text and len(own) < rows:
        raise NcuError(f"Nsight Compute counted nothing: {why}")
    return text, dict.fromkeys(range(rows), why) | {int(n): reason for n, reason in own}


def child(sites: Sequence[Site]) -> None:
    """Each row's call, in the process that ``ncu`` watches. What cannot run is said on stdout."""
    from dsv4fuse.bench import fusions

    for number, site in enumerate(sites):
        try:
            made = fusions.example(*site)
            ours, _ = fusions.both_ways(site[0], made)
            show(lambda: ours(*made.inputs), number)  # noqa: B023
        except Exception as error:
            print(f"{counters.RANGE} {number}: {said(error)}", flush=True)
        made = ours = None  # type: ignore[assignment]
        torch.cuda.empty_cache()


@torch.no_grad()
def show(call: Callable[[], object], number: int) -> None:
    """To the profiler, behind some that it does not see: one call, as the row of a number."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # before it repeats a launch it saves all memory of the process
    within = torch.cuda.nvtx.range(f"{counters.RANGE} {number}")
    with torch.cuda.profiler.profile(), within:
        call()
        torch.cuda.synchronize()


if __name__ == "__main__":
    child([tuple(site) for site in json.loads(sys.argv[1])])
