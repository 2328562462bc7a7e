"""A report as text: a table on a wide terminal, stacked entries on a narrow one, plain in a pipe.

Rows that differ only in a layer's number are folded: 43 equal lines hide the one that is not.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dsv4fuse.report import Report, Site

STYLE = {"taken": "green", "declined": "yellow", "rejected": "red", "near-miss": "magenta"}

# What the sentence needs to be read, and a source path to be recognised. A terminal that leaves
# less than that beside the other columns gets stacked entries.
_MIN_WHY, _MIN_SOURCE = 36, 24
_GAP = 2
_HEADER = ("status", "fusion", "module", "source", "why")

# An index in a module path: model.layers.3.attn or model.layers[3].attn.
_INDEX = re.compile(r"(?<=[.\[])\d+(?=[.\]]|$)|^\d+(?=\.|$)")


@dataclass(frozen=True)
class Row:
    """One printed line: equal sites of several modules, and how many there are."""

    fusion: str
    status: str
    module: str
    where: str
    reason: str
    count: int


def fold(sites: Sequence[Site]) -> list[Row]:
    """Group sites that differ only in indices of their module path, in the order first seen."""
    groups: dict[tuple[str, ...], dict[tuple[str, ...], int]] = {}
    for site in sites:
        template = _INDEX.sub("{}", site.module.replace("{", "{{").replace("}", "}}"))
        key = (site.fusion, site.status, template, short(site.file, site.line), site.reason)
        indices = tuple(_INDEX.findall(site.module))
        group = groups.setdefault(key, {})
        group[indices] = group.get(indices, 0) + 1
    return [
        Row(fusion, status, template.format(*indices), where, reason, count)
        for (fusion, status, template, where, reason), group in groups.items()
        for indices, count in _fold_indices(group)
    ]


def _fold_indices(group: dict[tuple[str, ...], int]) -> list[tuple[tuple[str, ...], int]]:
    """Merge index tuples that differ in one place, one place after the other.

    Only what is an exact product is merged, so a folded path never names a module that is not
    there: layers 0 and 1 with experts (0, 1) and (0, 2) stay two rows.
    """
    width = len(next(iter(group), ()))
    for place in reversed(range(width)):
        merged: dict[tuple[tuple[str, ...], int], list[str]] = {}
        for indices, count in group.items():
            rest = (*indices[:place], "", *indices[place + 1 :])
            merged.setdefault((rest, count), []).append(indices[place])
        group = {}
        for (rest, count), values in merged.items():
            indices = (*rest[:place], _span(values), *rest[place + 1 :])
            group[indices] = count * len(values)
    return list(group.items())


def _span(values: Sequence[str]) -> str:
    """``{0..42}`` or ``{0,2,4..7}``; a single index stays as it is."""
    if len(values) == 1:
        return values[0]
    numbers = sorted({int(v) for v in values})
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [",".join(map(str, run)) if len(run) < 3 else f"{run[0]}..{run[-1]}" for run in runs]
    return "{" + ",".join(parts) + "}"


def short(file: str, line: int) -> str:
    """``file:line``, from the working directory or the nearest folder of ``sys.path`` on."""
    if not file:
        return ""
    roots = {root for root in (os.getcwd(), *sys.path) if os.path.isabs(root)}
    for root in sorted(roots, key=len, reverse=True):
        if file.startswith(root.rstrip(os.sep) + os.sep) and root != os.sep:
            file = os.path.relpath(file, root)
            break
    return f"{file}:{line}" if line else file


def headline(report: Report) -> str:
    """One line: how many sites, graphs, breaks and seconds, and of what step."""
    graphs = f"{report.graphs} graph" + ("" if report.graphs == 1 else "s")
    breaks = f"{len(report.breaks)} break" + ("" if len(report.breaks) == 1 else "s")
    taken = sum(report.counts().values())
    steps = ", ".join(f"{name} {s:.2f}" for name, s in report.spent.most_common())
    return (
        f"dsv4fuse: {taken} of {len(report.sites)} sites fused in {graphs}, {breaks}, "
        f"{report.seconds:.2f} s" + f" ({steps})" * bool(steps)
    )


def summary(report: Report) -> list[str]:
    """One line for each fusion: how many sites were taken, declined, rejected or missed."""
    found = tally(report)
    width = max(map(len, found), default=0)
    return [
        f"{name:<{width}}  " + ", ".join(f"{of[s]} {s}" for s in STYLE if s in of)
        for name, of in sorted(found.items())
    ]


def tally(report: Report) -> dict[str, dict[str, int]]:
    """Of each fusion, how many sites have which status."""
    found: dict[str, dict[str, int]] = {}
    for site in report.sites:
        of = found.setdefault(site.fusion, {})
        of[site.status] = of.get(site.status, 0) + 1
    return found


def _tail(report: Report) -> list[str]:
    lines = [f"graph break at {short(b.file, b.line) or '?'}: {b.reason}" for b in report.breaks]
    return lines + [f"note: {note}" for note in report.notes]


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    times = f" ×{row.count}" if row.count > 1 else ""
    module = (row.module or "-") + times
    return row.status, row.fusion, module, row.where or "-", _one_line(row.reason)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def to_text(report: Report) -> str:
    """Plain text: columns as wide as they need, one row a line, so that it can be searched."""
    cells = [_cells(row) for row in fold(report.sites)]
    lines = [headline(report), *(f"  {line}" for line in summary(report))]
    if cells:
        table = [_HEADER, *cells]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines.append("")
        lines += [_columns(row, widths) for row in table]
    tail = _tail(report)
    return "\n".join(lines + ([""] if tail else []) + tail)


def _columns(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
    return "  ".join([*padded, row[-1]]).rstrip()


def print_report(report: Report, file: IO[str] | None = None) -> None:
    """Print to ``file`` or stdout: as :func:`to_text` unless it is a terminal."""
    console = Console(file=file, highlight=False)
    out = file if file is not None else sys.stdout
    text = to_text(report)
    plain = _encodable(text, out)
    if not console.is_terminal or plain != text:
        out.write(plain + "\n")
        return
    console.print(Text(headline(report), style="bold"))
    for line in summary(report):
        console.print(_indented(line))
    cells = [_cells(row) for row in fold(report.sites)]
    if cells:
        console.print()
        widths = _widths(cells, console.width)
        _stack(console, cells) if widths is None else _table(console, cells, widths)
        console.print()
    for line in _tail(report):
        console.print(Text(line, overflow="fold"))


def _encodable(text: str, out: IO[str]) -> str:
    # A pipe under LANG=C is ASCII: "×43" must not end the program that prints its report.
    encoding = getattr(out, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("×", "x").encode(encoding, "replace").decode(encoding)
    return text


def _widths(rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Widths of the five columns in a terminal of this width, or ``None`` if they do not fit.

    Computed here since rich, short of space, cuts what it cannot wrap. Only the source gives
    way, by leading folders; the sentence gets the rest.
    """
    natural = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    natural = [max(n, len(name)) for n, name in zip(natural, _HEADER, strict=True)]
    room = width - sum(natural[:3]) - 4 * _GAP
    source = min(natural[3], max(_MIN_SOURCE, room - min(natural[4], 60)))
    source = max(len(_fit(row[3], source)) for row in rows)
    source = max(source, len(_HEADER[3]))
    why = room - source
    return None if why < min(natural[4], _MIN_WHY) else [*natural[:3], source, why]


def _fit(where: str, width: int) -> str:
    """A path without as many of its leading folders as do not fit; the file's name stays."""
    parts = where.split("/")
    while len(where) > width and len(parts) > 1:
        parts = parts[1:]
        where = "/".join(["…", *parts])
    return where


def _table(console: Console, rows: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for name, width in zip(_HEADER, widths, strict=True):
        table.add_column(name, width=width, overflow="fold")
    for status, fusion, module, where, why in rows:
        # Text, not str: "[...]" in a reason is no markup.
        cells = (fusion, module, _fit(where, widths[3]), why)
        table.add_row(Text(status, style=STYLE[status]), *(Text(cell) for cell in cells))
    console.print(table)


def _stack(console: Console, rows: Sequence[Sequence[str]]) -> None:
    for status, fusion, module, where, why in rows:
        console.print(Text.assemble((status, STYLE[status]), " ", (fusion, "bold")))
        for cell in (module, _fit(where, console.width - 2), why):
            if cell and cell != "-":
                console.print(_indented(cell))


def _indented(text: str) -> Padding:
    return Padding(Text(text, overflow="fold"), (0, 0, 0, 2), expand=False)
