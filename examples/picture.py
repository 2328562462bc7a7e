"""What ``examples/profile_model.py --json`` wrote, as a picture: launches and time of a step.

    python -m examples.picture docs/pictures/launches.svg examples/results/*.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from dsv4fuse.plot import AFTER, BEFORE, TEXT, digest, save, styled

WAYS = {"inductor": "torch.compile", "dsv4fuse": "with dsv4fuse"}
FAMILIES = {"matrix products": "#8f6fd8", "dsv4fuse": AFTER, "Inductor": BEFORE,
            "others": TEXT}  # fmt: skip


def parts(profile: dict[str, Any], column: int) -> dict[str, float]:
    """Launches (column 0) or ms (1) of each family; the small ones as one."""
    found = dict.fromkeys(FAMILIES, 0.0)
    for name, figures in profile["families"].items():
        # In a run without dsv4fuse no kernel is its own, whatever the kernel's name looks like.
        known = name in FAMILIES and not (name == "dsv4fuse" and profile["name"] != "dsv4fuse")
        found[name if known else "others"] += figures[column]
    return found


def draw(files: list[pathlib.Path], path: pathlib.Path) -> None:
    figures = [json.loads(file.read_text()) for file in files]
    with styled(path) as pyplot:
        size = (9.6, 0.7 + 1.25 * len(figures))
        figure, axes = pyplot.subplots(len(figures), 2, figsize=size, squeeze=False)
        for (launches, times), run in zip(axes, figures, strict=True):
            for axis, column, unit in ((launches, 0, "launches"), (times, 1, "ms of GPU time")):
                _bars(axis, run, column, unit)
            launches.set_title(run["title"], loc="left", fontsize=9)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in FAMILIES.values()]
        labels = [{"Inductor": "Inductor's kernels", "dsv4fuse": "dsv4fuse's"}.get(f, f)
                  for f in FAMILIES]  # fmt: skip
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8)
        made_on = f"{figures[0]['gpu']}, torch {figures[0]['torch']}"
        figure.suptitle(made_on, x=0.99, ha="right", fontsize=8)
        figure.subplots_adjust(bottom=0.2)
        save(figure, path, digest(figures), bottom=0.09)


def _bars(axis: Any, run: dict[str, Any], column: int, unit: str) -> None:
    by_name = {p["name"]: p for p in run["profiles"]}
    for row, name in enumerate(WAYS):
        left = 0.0
        for family, size in parts(by_name[name], column).items():
            axis.barh(row, size, left=left, color=FAMILIES[family], height=0.7)
            left += size
        axis.text(left, row, f" {left:.0f}" if column == 0 else f" {left:.2f}", va="center")
    axis.set_yticks(range(len(WAYS)), WAYS.values())
    axis.invert_yaxis()
    axis.set_xlabel(unit, fontsize=8)
    axis.margins(x=0.12)
    axis.tick_params(axis="x", labelsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument("results", type=pathlib.Path, nargs="+")
    args = parser.parse_args()
    draw(args.results, args.picture)


if __name__ == "__main__":
    main()
