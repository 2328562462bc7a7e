"""The counters that Nsight Compute is asked for, and how its CSV is read.

All are ratios of hardware counters of compute capability 9.0, by the names of Nsight Compute 2025.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsv4fuse.bench.limits import Kernel, limit

RANGE = "dsv4fuse row"  # the NVTX range of a row, with its number behind it
_TIME, _BYTES = "gpu__time_duration.sum", "dram__bytes.sum"
_ELAPSED = ".avg.pct_of_peak_sustained_elapsed"
_PERCENT = {
    "dram": f"gpu__dram_throughput{_ELAPSED}",
    "l2": f"lts__throughput{_ELAPSED}",
    "l1": f"l1tex__throughput{_ELAPSED}",
    "tensor": f"sm__pipe_tensor_cycles_active{_ELAPSED}",
    "issue": f"sm__inst_issued{_ELAPSED}",
    "sm": f"sm__throughput{_ELAPSED}",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
_STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
_STALLS = (
    "barrier branch_resolving dispatch_stall drain gmma imc_miss lg_throttle long_scoreboard "
    "math_pipe_throttle membar mio_throttle misc no_instruction not_selected selected "
    "short_scoreboard sleeping tex_throttle wait"
).split()
UNITS = (_TIME, _BYTES, *_PERCENT.values())  # how busy each is, without what warps wait for
METRICS = (*UNITS, *map(_STALLED.format, _STALLS))
_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3,
       "s": 1e6, "second": 1e6}  # fmt: skip


def parsed(text: str, multiprocessors: int) -> dict[int, list[Kernel]]:
    """By number of the row the kernels in what ``ncu --csv --page raw --print-units base --nvtx``
    prints: messages that begin with ==, a header, a row of units, and a row for each launch, in
    one of whose columns is the NVTX range."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    header, *table = [*csv.reader(lines[start:])] or [[]]
    units, found = dict[str, str](), dict[int, list[Kernel]]()
    for cells in table:
        named = dict(zip(header, cells, strict=False))
        within = re.search(rf"{RANGE} (\d+)\b", " ".join(cells))
        if within:
            kernel = _kernel(named, units)
            kernel = replace(kernel, limit=limit(kernel, multiprocessors))
            found.setdefault(int(within[1]), []).append(kernel)
        elif not cells or cells[0] == "":
            units = named
    return found


def _kernel(named: Mapping[str, str], units: Mapping[str, str]) -> Kernel:
    time, moved = _number(named.get(_TIME)), _number(named.get(_BYTES))
    percent: dict[str, Any] = {name: _number(named.get(m)) for name, m in _PERCENT.items()}
    return Kernel(
        named["Kernel Name"],
        math.nan if time is None else time * _US.get(units.get(_TIME, ""), math.nan),
        _product(named["Grid Size"]),
        _product(named["Block Size"]),
        None if moved is None else moved / 1e6,
        stalls=_stalls(named),
        **percent,
    )


def _stalls(named: Mapping[str, str]) -> tuple[tuple[str, float], ...]:
    """The two longest of the reasons, each in percent of the cycles between two instructions of a
    warp, in one of which it is selected."""
    cycles = {reason: _number(named.get(_STALLED.format(reason))) or 0.0 for reason in _STALLS}
    total = sum(cycles.values())
    waits = [(x, reason) for reason, x in cycles.items() if x > 0 and reason != "selected"]
    longest = sorted(waits, reverse=True)[:2]
    return tuple((reason.replace("_", " "), 100 * x / total) for x, reason in longest)


def _product(size: str) -> int:
    """Of ``(132, 1, 1)``."""
    return math.prod(int(n) for n in re.findall(r"\d+", size))


def _number(cell: str | None) -> float | None:
    """None for a metric that was not asked for, and for n/a."""
    try:
        value = float((cell or "").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
