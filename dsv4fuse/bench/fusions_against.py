"""How far the rows of two runs of ``bench`` are apart."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from dsv4fuse.bench.fusions import Row, load
from dsv4fuse.terminal import table_console

APART = 0.05  # of the shorter time: what the table shows
TITLES = ("fusion", "variant", "model", "tokens", "ours µs, then", "now", "apart %",
          "Inductor's, %")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The same row of an older run and of this one."""

    then: Row
    now: Row

    @property
    def ours(self) -> float:
        return _apart(self.then.ours, self.now.ours)

    @property
    def inductor(self) -> float:
        return _apart(self.then.inductor, self.now.inductor)


def _apart(a: float, b: float) -> float:
    return max(a, b) / min(a, b) - 1


def show(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Prints how far the rows are from those of a file or folder that ``save`` wrote."""
    console, found = table_console(), pairs(rows, path)
    made = table(found)
    if made.row_count:
        console.print(made)
    console.print(sentence(found))


def pairs(rows: Sequence[Row], path: pathlib.Path) -> list[Pair]:
    """Those of the rows that a file, or a folder's ``<fusion>.json``, has too, the farthest apart
    first; ValueError or OSError for a file that holds none."""
    names = dict.fromkeys(r.fusion for r in rows)
    files = [path / f"{n}.json" for n in names] if path.is_dir() else [path]
    older = {r.site: r for f in files if f.exists() or f is path for r in load(f)[0]}
    found = [Pair(older[r.site], r) for r in rows if r.site in older]
    return sorted(found, key=lambda p: -p.ours)


def sentence(found: Sequence[Pair]) -> str:
    """How many there are, and how far apart."""
    if not found:
        return "No row is in both."
    apart = [p.ours for p in found]
    within = sum(a <= APART for a in apart)
    return (f"Of {len(found)} rows in both, {within} differ by {APART:.0%} at most; "
            f"{statistics.median(apart):.2%} in the middle.")  # fmt: skip


def table(found: Sequence[Pair]) -> Table:
    """The pairs that are farther apart."""
    made = Table(*TITLES)
    for pair in found:
        if pair.ours > APART:
            fusion, variant, model, tokens = pair.now.site
            made.add_row(fusion, variant, model, str(tokens), f"{pair.then.ours:.2f}",
                         f"{pair.now.ours:.2f}", f"{100 * pair.ours:.1f}",
                         f"{100 * pair.inductor:.1f}")  # fmt: skip
    return made
