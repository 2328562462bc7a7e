"""A report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

Made for somebody who was not there: which places were fused, in which line of the module a near
miss departs from the pattern, and what the times of a choice were.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup, escape

from dsv4fuse import __version__, render

if TYPE_CHECKING:
    from dsv4fuse.report import Report, Site

AROUND = 2  # lines of the module shown on either side of the one that is meant


@dataclass(frozen=True)
class Line:
    """A line of the user's source; ``meant`` for the one that the report speaks of."""

    number: int
    text: str
    meant: bool


@dataclass(frozen=True)
class Times:
    """µs of Inductor's code and of the kernel, and how wide their bars are in percent."""

    inductor: float
    ours: float
    measured: str

    @property
    def widths(self) -> tuple[float, float]:
        longest = max(self.inductor, self.ours)
        return 100 * self.inductor / longest, 100 * self.ours / longest


@dataclass(frozen=True)
class Entry:
    """One folded row of a graph: ``modules`` are all the places that the row stands for."""

    row: render.Row
    modules: tuple[str, ...]
    quote: tuple[Line, ...]
    times: Times | None


@dataclass(frozen=True)
class Bar:
    """The sites of a fusion by status: (status, how many, percent of the longest bar)."""

    fusion: str
    parts: tuple[tuple[str, int, float], ...]


def page(report: Report) -> str:
    """The report as the text of an HTML page."""
    statuses = tuple(render.STYLE)
    graphs = [
        (number, _entries([s for s in report.sites if s.graph == number]))
        for number in sorted({s.graph for s in report.sites})
    ]
    missed = _entries(report.with_status("rejected", "near-miss"))
    breaks = [(b, render.short(b.file, b.line), quote(b.file, b.line)) for b in report.breaks]
    return _template().render(
        headline=render.headline(report).removeprefix("dsv4fuse: "),
        bars=bars(report),
        statuses=[s for s in statuses if report.with_status(s)],  # type: ignore[arg-type]
        missed=missed,
        graphs=graphs,
        breaks=breaks,
        notes=report.notes,
        version=__version__,
    )


def bars(report: Report) -> list[Bar]:
    """One bar for each fusion that has a site, in the order of their names."""
    tally = render.tally(report)
    longest = max((sum(of.values()) for of in tally.values()), default=1)
    return [
        Bar(name, tuple((s, of[s], 100 * of[s] / longest) for s in render.STYLE if s in of))
        for name, of in sorted(tally.items())
    ]


def quote(file: str, line: int) -> tuple[Line, ...]:
    """The line of a file and some around it, without common indentation; empty if not there."""
    lines = linecache.getlines(file) if file else []
    if not 1 <= line <= len(lines):
        return ()
    first, last = max(1, line - AROUND), min(len(lines), line + AROUND)
    while last > line and not lines[last - 1].strip():
        last -= 1
    texts = [lines[n - 1].rstrip().expandtabs(4) for n in range(first, last + 1)]
    margin = min((len(t) - len(t.lstrip()) for t in texts if t), default=0)
    return tuple(
        Line(number, text[margin:], number == line) for number, text in enumerate(texts, first)
    )


def _entries(sites: Sequence[Site]) -> list[Entry]:
    """The folded rows of some sites, each with what its first site knows."""
    same: dict[tuple[str, str, str, str], list[Site]] = {}
    for site in sites:
        key = (site.fusion, site.status, render.short(site.file, site.line), site.reason)
        same.setdefault(key, []).append(site)
    found = []
    for row in render.fold(sites):
        of = same[row.fusion, row.status, row.where, row.reason]
        modules = tuple(dict.fromkeys(s.module for s in of if s.module))
        found.append(Entry(row, modules, quote(of[0].file, of[0].line), _times(of[0])))
    return found


def _times(site: Site) -> Times | None:
    known = site.detail.get("µs")
    if not known:
        return None
    return Times(known["inductor"], known["ours"], str(known.get("measured", "")))


def _breakable(path: str) -> Markup:
    """A path that may go on in the next line behind its separators."""
    return Markup(re.sub(r"([./])(?=\w)", r"\1<wbr>", str(escape(path))))


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("dsv4fuse")
    made = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    made.filters["breakable"] = _breakable
    return made.get_template("report.html")
