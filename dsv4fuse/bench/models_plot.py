"""Whole models as a picture: launches and GPU time of a step, without and with dsv4fuse."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4fuse.bench.fusions_plot import AFTER, BEFORE, TEXT, digest, save, styled
from dsv4fuse.bench.launches import INDUCTOR, MATRIX, OURS
from dsv4fuse.bench.runs import Profile, Run

WAYS = {"inductor": "torch.compile", "dsv4fuse": "with dsv4fuse"}
COLOURS = {MATRIX: "#8f6fd8", OURS: AFTER, INDUCTOR: BEFORE, "others": TEXT}
LABELS = {INDUCTOR: "Inductor's kernels", OURS: "dsv4fuse's"}


def parts(profile: Profile, column: int) -> dict[str, float]:
    """Launches (column 0) or ms (1) of each family; the small ones as one."""
    found = dict.fromkeys(COLOURS, 0.0)
    for name, figures in profile.families.items():
        # Before its kernels were told by their full names, others were counted as dsv4fuse's.
        known = name in COLOURS and not (name == OURS and profile.name != "dsv4fuse")
        found[name if known else "others"] += figures[column]
    return found


def made_of(runs: Sequence[Run]) -> str:
    """The digest of what is drawn of these runs."""
    profiles = [[run.of(way) or Profile(way) for way in WAYS] for run in runs]
    drawn = [[(parts(p, 0), parts(p, 1)) for p in ways] for ways in profiles]
    return digest([[run.title for run in runs], drawn])


def draw(runs: Sequence[Run], made_on: Mapping[str, Any], path: pathlib.Path) -> None:
    """A row for each run; ImportError without matplotlib."""
    with styled(path) as pyplot:
        size = (9.6, 0.7 + 1.25 * len(runs))
        figure, axes = pyplot.subplots(len(runs), 2, figsize=size, squeeze=False)
        for (launches, times), run in zip(axes, runs, strict=True):
            for axis, column, unit in ((launches, 0, "launches"), (times, 1, "ms of GPU time")):
                _bars(axis, run, column, unit)
            launches.set_title(run.title, loc="left", fontsize=9)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
        labels = [LABELS.get(family, family) for family in COLOURS]
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8)
        where = f"{made_on['gpu']}, torch {made_on['torch']}"
        figure.suptitle(where, x=0.99, ha="right", fontsize=8)
        figure.subplots_adjust(bottom=0.2)
        save(figure, path, made_of(runs), bottom=0.09)


def _bars(axis: Any, run: Run, column: int, unit: str) -> None:
    for row, way in enumerate(WAYS):
        left = 0.0
        profile = run.of(way) or Profile(way)
        for family, size in parts(profile, column).items():
            axis.barh(row, size, left=left, color=COLOURS[family], height=0.7)
            left += size
        axis.text(left, row, f" {left:.0f}" if column == 0 else f" {left:.2f}", va="center")
    axis.set_yticks(range(len(WAYS)), WAYS.values())
    axis.invert_yaxis()
    axis.set_xlabel(unit, fontsize=8)
    axis.margins(x=0.12)
    axis.tick_params(axis="x", labelsize=7)
