"""Take a site or leave it to Inductor: never slower is a promise.

``kernels/<stem>.json`` holds what ``python -m dsv4fuse bench`` measured on one GPU; with
``select="auto"`` a site is taken where its variant was faster there at the nearest token counts.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
from typing import Any

import torch

from dsv4fuse import compat
from dsv4fuse.fusion import Candidate
from dsv4fuse.options import Options

SLOWER = 1.02  # two runs of one benchmark differ by about as much


def decline(candidate: Candidate, options: Options) -> str | None:
    """None to take the site, else the sentence why not."""
    if options.select == "always":
        return None
    if options.select == "never":
        return "select='never' leaves every site to Inductor."
    tensors = [n.meta["val"] for n in candidate.inputs]
    devices = {t.device for t in tensors if isinstance(t, torch.Tensor)}
    if {d.type for d in devices} != {"cuda"}:
        return "There is no GPU here: on a CPU the fused op is its plain PyTorch reference."
    data = measured(candidate.fusion)
    capability = list(torch.cuda.get_device_capability(next(iter(devices))))
    if data is None or data["capability"] != capability:
        return (
            f"{candidate.fusion} was not measured on a GPU like this one; "
            "select='always' takes it all the same."
        )
    return _slower(data, candidate)


@functools.cache
def measured(fusion: str) -> dict[str, Any] | None:
    """The measurements beside a fusion's kernel: where, when, and rows of µs."""
    folder = importlib.import_module("dsv4fuse.kernels").__path__[0]
    path = pathlib.Path(folder) / f"{fusion}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _slower(data: dict[str, Any], candidate: Candidate) -> str | None:
    """The measurement that speaks against a site: of its variant, at the nearest sizes."""
    tokens = max(1, compat.hint(candidate.tokens))
    rows = sorted(
        (r for r in data["rows"] if r["variant"] == candidate.variant), key=lambda r: r["tokens"]
    )
    if not rows:
        return f"The variant {candidate.variant!r} was not measured."
    below = [r for r in rows if r["tokens"] <= tokens][-1:]
    above = [r for r in rows if r["tokens"] >= tokens][:1]
    for row in (*below, *above):
        if row["ours"] > SLOWER * row["inductor"]:
            return (
                f"Inductor is faster here: {row['inductor']:.2f} µs against {row['ours']:.2f} µs "
                f"at {row['tokens']} tokens ({data['gpu']}, {data['date']})."
            )
    return None
