"""What limits our kernels: a profile of each launch, and a rule that names what limits it.

The counters are kept as they were read, so that a reader can judge by another rule.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from dsv4fuse.bench import machine

if TYPE_CHECKING:  # it needs Triton, which a reader of profiles may not have
    from dsv4fuse.bench.fusions import Site

BOUND = 80.0  # percent of a unit's peak
# In this order: what memory delivers at its peak has passed through the levels in front of it.
_WORDS = {"dram": "memory", "l2": "L2", "l1": "L1 and shared memory", "tensor": "tensor cores",
          "issue": "issue of instructions", "sm": "arithmetic"}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch; None: Nsight Compute did not say.

    ``us``: its time in µs, with the caches as the replay of the passes leaves them. ``programs``
    and ``threads`` (of a program): how it was launched. ``megabytes``: from and to memory, 10^6
    bytes. ``dram`` to ``sm``: percent of the peak of memory, of L2, of L1 with shared memory, of
    the tensor cores, of the issue of instructions and of the busiest unit of the multiprocessors,
    over the kernel's whole time and all multiprocessors. ``occupancy``: warps on multiprocessors
    that have any, percent of what they can hold. ``stalls``: the two reasons, in Nsight Compute's
    words, for which warps wait longest, in percent of the time between two instructions of a warp.
    ``launches``: of how many alike it is the longest, and their ``total`` in µs.
    """

    name: str
    us: float
    programs: int
    threads: int
    megabytes: float | None = None
    dram: float | None = None
    l2: float | None = None
    l1: float | None = None
    tensor: float | None = None
    issue: float | None = None
    sm: float | None = None
    occupancy: float | None = None
    stalls: tuple[tuple[str, float], ...] = ()
    limit: str = ""
    launches: int = 1
    total: float = 0.0


@dataclass(frozen=True)
class Row:
    """One call of ours: its kernels, in the order of their launches."""

    fusion: str
    variant: str
    model: str
    tokens: int
    kernels: tuple[Kernel, ...]
    date: str

    @property
    def site(self) -> Site:
        return self.fusion, self.variant, self.model, self.tokens

    @property
    def longest(self) -> Kernel:
        return max(self.kernels, key=lambda kernel: kernel.us)


def limit(kernel: Kernel, multiprocessors: int) -> str:
    """The first of memory, L2, L1 and shared memory, tensor cores, issue of instructions and
    arithmetic (any unit of the multiprocessors) that is at 80 % of its peak or more; else latency,
    with what a reader asks next: how full the GPU is and what its warps wait for."""
    for name, word in _WORDS.items():
        if (getattr(kernel, name) or 0.0) >= BOUND:
            return word
    held = "" if kernel.occupancy is None else f", {kernel.occupancy:.0f} % occupancy"
    waits = f"; waits for {kernel.stalls[0][0]}" if kernel.stalls else ""
    grid = f"grid of {kernel.programs} programs on {multiprocessors} multiprocessors"
    return f"latency ({grid}{held}{waits})"


def joined(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Of each name the longest launch, with how many there are; those with the most time first."""
    alike: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        alike.setdefault(kernel.name, []).append(kernel)
    found = []
    for own in alike.values():
        longest, total = max(own, key=lambda k: k.us), sum(k.us for k in own)
        found.append(replace(longest, launches=len(own), total=total))
    return sorted(found, key=lambda k: -k.total)


def cells(kernel: Kernel) -> dict[str, str]:
    """A kernel as a line of a table: each column's title and text."""

    def percent(x: float | None) -> str:
        return "?" if x is None else f"{x:.0f}"

    return {
        "µs": f"{kernel.us:.2f}",
        "limit": kernel.limit.split(" (")[0],
        "programs": f"{kernel.programs} × {kernel.threads}",
        "occupancy %": percent(kernel.occupancy),
        "MB": "?" if kernel.megabytes is None else f"{kernel.megabytes:.1f}",
        "DRAM %": percent(kernel.dram),
        "L2 %": percent(kernel.l2),
        "L1 %": percent(kernel.l1),
        "tensor %": percent(kernel.tensor),
        "issue %": percent(kernel.issue),
        "SM %": percent(kernel.sm),
        "waits for": ", ".join(f"{reason} {share:.0f} %" for reason, share in kernel.stalls),
    }


def save(rows: Iterable[Row], path: pathlib.Path, made_on: Mapping[str, object]) -> None:
    """Into a file, beside those rows of it that such a GPU with these versions has left there and
    these do not replace."""
    kept: dict[Site, Row] = {}
    if path.exists():
        older, before = load(path)
        if machine.alike(before, made_on):
            kept = {row.site: row for row in older}
    kept |= {row.site: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**made_on, "rows": [asdict(row) for row in kept.values()]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def load(path: pathlib.Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows and the machine of a file that ``save`` wrote; ValueError if it is none."""
    data = json.loads(path.read_text(encoding="utf-8"))
    try:
        rows = [Row(**{**r, "kernels": _kernels(r["kernels"])}) for r in data.pop("rows")]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no profile ({error!r}).") from error
    return rows, data


def _kernels(plain: list[dict[str, Any]]) -> tuple[Kernel, ...]:
    return tuple(Kernel(**{**k, "stalls": tuple(map(tuple, k["stalls"]))}) for k in plain)
