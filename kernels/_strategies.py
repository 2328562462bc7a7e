"""Which way a fused op computes: the fastest of those that a site allows, by measurement.

``kernels/<fusion>_strategies.json`` holds µs by kind of site, groups and tokens, on one GPU.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from dsv4fuse import compat

LANES = 512  # of a group by itself, or a multiple: cuBLAS reads the scales of four blocks at once


@functools.cache
def measured(fusion: str) -> dict[str, Any]:
    """The file's content; no rows where nothing was measured."""
    path = pathlib.Path(__file__).with_name(f"{fusion}_strategies.json")
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def choose(
    fusion: str, kind: str, groups: int, tokens: int | torch.SymInt, allowed: Sequence[str]
) -> tuple[str, dict[str, float]]:
    """The fastest of the allowed strategies at the nearest sizes, and the µs of each there.

    The first of them where nothing was measured.
    """
    count = max(1, compat.hint(tokens))
    rows = [r for r in measured(fusion)["rows"] if r["kind"] == kind]

    def far(row: dict[str, Any]) -> tuple[float, float]:
        return (abs(math.log(row["groups"] / groups)), abs(math.log(row["tokens"] / count)))

    near = min(rows, key=far)["us"] if rows else {}
    times = {name: us for name, us in near.items() if name in allowed}
    return (min(times, key=lambda name: times[name]) if times else allowed[0]), times
