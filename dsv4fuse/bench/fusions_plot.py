"""Measurements as pictures: time against tokens, one panel for each variant.

An SVG lies on the page's own ground: its colours have enough contrast on white and on near black.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv4fuse.bench.fusions import Row

TEXT = "#7a7f87"
BEFORE, AFTER, FLOOR = "#d0702e", "#2f81f7", TEXT
# column of Row → (label, line style, colour); the floor is a line without points
LINES = {"eager": ("eager", ":o", "#8f6fd8"), "inductor": ("Inductor", "--s", BEFORE),
         "ours": ("dsv4fuse", "-o", AFTER), "floor": ("floor", "-", FLOOR)}  # fmt: skip
_STYLE = {
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT,
    "ytick.color": TEXT, "grid.color": TEXT, "grid.alpha": 0.4, "legend.frameon": False,
    "svg.hashsalt": "dsv4fuse", "svg.fonttype": "none", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def draw(rows: Sequence[Row], made_on: Mapping[str, Any], path: pathlib.Path) -> None:
    """A log-log panel for each (fusion, variant, model); ImportError without matplotlib."""
    with styled(path) as pyplot:
        panels: dict[tuple[str, str, str], list[Row]] = {}
        for row in sorted(rows, key=lambda r: r.tokens):
            panels.setdefault((row.fusion, row.variant, row.model), []).append(row)
        across = min(3, len(panels))
        down = -(-len(panels) // across)
        figure, axes = pyplot.subplots(
            down, across, figsize=(1 + 3.2 * across, 0.5 + 2.6 * down), squeeze=False
        )
        for axis, (name, own) in zip(axes.flat, panels.items(), strict=False):
            _panel(axis, ", ".join(name), own)
        for axis in list(axes.flat)[len(panels) :]:
            axis.remove()
        days = sorted({row.date or made_on["date"] for row in rows})
        when = " to ".join(dict.fromkeys((days[0], days[-1])))
        figure.suptitle(f"{made_on['gpu']}, torch {made_on['torch']}, {when}")
        save(figure, path, made_of(rows))


def made_of(rows: Sequence[Row]) -> str:
    """The digest of what is drawn of these rows."""
    drawn = ("fusion", "variant", "model", "tokens", *LINES)
    return digest([[getattr(row, column) for column in drawn] for row in rows])


def digest(figures: Any) -> str:
    """What a picture was made of, kept in an SVG so that a stale one can be told."""
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()[:16]


def save(figure: Any, path: pathlib.Path, made_of: str, bottom: float = 0.0) -> None:
    """Writes the figure; an SVG is the same whenever it is made and says what it was made of."""
    figure.tight_layout(rect=(0, bottom, 1, 1))
    svg = path.suffix == ".svg"
    more = {"metadata": {"Date": None, "Description": made_of}} if svg else {"dpi": 120}
    figure.savefig(path, **more)


@contextlib.contextmanager
def styled(path: pathlib.Path) -> Iterator[Any]:
    """pyplot without a display, in these colours; only an SVG has no ground of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {**_STYLE, "savefig.transparent": path.suffix == ".svg"}
    with matplotlib.rc_context(style):
        yield pyplot
        pyplot.close("all")


def _panel(axis: Any, title: str, rows: Sequence[Row]) -> None:
    for column, (label, style, colour) in LINES.items():
        points = [(r.tokens, y) for r in rows if (y := getattr(r, column)) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=3,
                      linewidth=1.2)  # fmt: skip
    axis.set(xlabel="tokens", ylabel="µs", xscale="log", yscale="log")
    axis.set_title(title, fontsize=9)
    axis.grid(True, which="major", linewidth=0.4)
    axis.legend(fontsize=8)
