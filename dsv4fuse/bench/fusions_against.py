"""How far the rows of two runs of ``bench`` are apart."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from dsv4fuse.bench import fusions
from dsv4fuse.bench.fusions import Row, Site
from dsv4fuse.fusion import registry
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


def load(path: pathlib.Path) -> dict[Site, Row]:
    """The rows of a file, or of a folder's ``<fusion>.json``, that ``save`` wrote. Raises OSError
    or ValueError."""
    files = [path]
    if path.is_dir():
        files = [file for name in registry() if (file := path / f"{name}.json").exists()]
    return {row.site: row for file in files for row in fusions.load(file)[0]}


def show(rows: Iterable[Row], older: Mapping[Site, Row]) -> None:
    """Prints how far the rows are from the older ones."""
    console, found = table_console(), pairs(rows, older)
    made = table(found)
    if made.row_count:
        console.print(made)
    console.print(sentence(found))


def pairs(rows: Iterable[Row], older: Mapping[Site, Row]) -> list[Pair]:
    """The rows that are in both, the farthest apart first."""
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
