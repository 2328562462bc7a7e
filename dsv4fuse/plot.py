"""Measurements of ``bench`` as pictures: time against tokens, one panel for each variant."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4fuse.bench import Row

# column of Row → (label, line style); the floor is a line without points
LINES = {"eager": ("eager", ":o"), "inductor": ("Inductor", "--s"), "ours": ("dsv4fuse", "-o"),
         "floor": ("floor", "-")}  # fmt: skip


def draw(rows: Sequence[Row], made_on: Mapping[str, Any], path: pathlib.Path) -> None:
    """A log-log panel for each (fusion, variant, model); ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.tokens):
        panels.setdefault((row.fusion, row.variant, row.model), []).append(row)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 3.6 * down), squeeze=False)
    for axis, (name, own) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, ", ".join(name), own)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.suptitle(f"{made_on['gpu']}, torch {made_on['torch']}, {made_on['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: Any, title: str, rows: Sequence[Row]) -> None:
    for column, (label, style) in LINES.items():
        points = [(r.tokens, y) for r in rows if (y := getattr(r, column)) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
    axis.set(title=title, xlabel="tokens", ylabel="µs", xscale="log", yscale="log")
    axis.title.set_size(9)
    axis.grid(True, which="major", linewidth=0.3)
    axis.legend(fontsize=7)
