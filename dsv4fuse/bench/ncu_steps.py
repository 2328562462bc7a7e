"""``bench --e2e --limits``: Nsight Compute over one step of a whole model, compiled with dsv4fuse.

Of its launches those that multiply matrices and ours; those alike are kept as the longest of them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from dsv4fuse import backend
from dsv4fuse.bench import counters, launches, limits, ncu
from dsv4fuse.bench.limits import Row
from dsv4fuse.bench.machine import environment
from dsv4fuse.bench.steps import Step
from dsv4fuse.factory import build
from dsv4fuse.terminal import table_console
from dsv4fuse.verify import said


def run(
    steps: Sequence[Step], options: Mapping[str, Any], path: pathlib.Path,
    progress: Callable[[str, int], None] = lambda text, total: None,
) -> list[str]:  # fmt: skip
    """Profiles each step and prints; what went wrong in words. Writes ``path`` after each."""
    tool, rows, wrong = ncu.find(), list[Row](), list[str]()
    backend.parse(options)
    if path.exists():
        limits.load(path)
    count = torch.cuda.get_device_properties(0).multi_processor_count
    made_on = {**environment(), "multiprocessors": count}
    only, metrics = "|".join(sorted(launches.multiplying_or_ours())), list(counters.UNITS)
    for step in steps:
        progress(f"{step.model} {step.name}", len(steps))
        call = ["-m", "dsv4fuse.bench.ncu_steps", json.dumps([dataclasses.asdict(step), options])]
        text, failed = ncu.counted(tool, metrics, call, 1, only)
        found = [k for k in counters.parsed(text, count).get(0, [])
                 if launches.family(k.name) != launches.INDUCTOR]  # fmt: skip
        if not found:
            wrong.append(f"{step.model} {step.name}: {failed[0]}.")
            continue
        rows.append(_row(step, limits.joined(found), str(made_on["date"])))
        limits.save(rows, path, made_on)
    _show(rows)
    return wrong


def _row(step: Step, kernels: Sequence[limits.Kernel], date: str) -> Row:
    sizes = dict(step.sizes)
    length = sizes.get("new", 1) if step.name == "decode" else sizes.get("length", 1)
    model = ", ".join(f"{name} {value}" for name, value in sizes.items())
    tokens = sizes.get("batch", 1) * length
    return Row(step.model, step.name, model, tokens, tuple(kernels), date)


def _show(rows: Sequence[Row]) -> None:
    for row in rows:
        columns = limits.cells(row.kernels[0])
        table = Table("kernel", "launches", "µs in all", *columns,
                      title=f"{row.variant} of {row.fusion} ({row.model})")  # fmt: skip
        for k in row.kernels:
            table.add_row(k.name, str(k.launches), f"{k.total:.0f}", *limits.cells(k).values())
        table_console().print(table)


def child(step: Step, options: Mapping[str, Any]) -> None:
    """One step, in the process that ``ncu`` watches. Why it cannot run is said on stdout."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_")
    try:
        torch.manual_seed(0)
        model, args, kwargs = build(step.factory, **step.given)
        compiled = torch.compile(model, backend=backend.dsv4fuse, options=dict(options))
        ncu.show(lambda: compiled(*args, **kwargs), 0)
    except Exception as error:
        print(f"{counters.RANGE} 0: {said(error)}", flush=True)


if __name__ == "__main__":
    plain, options = json.loads(sys.argv[1])
    child(Step(**plain), options)
