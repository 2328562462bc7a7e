"""Take a site or leave it to Inductor: never slower is a promise.

``kernels/<stem>.json`` holds what ``python -m dsv4fuse bench`` measured on one GPU; with
``select="auto"`` a site is taken where its variant was faster there at the nearest token counts.
Where nothing was measured, and for ``select="measure"``, the site itself is timed (``measure``).
So it is where the time hangs on more than tokens (``Fusion.varied``) and the table's is not far
from Inductor's.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv4fuse import compat
from dsv4fuse.fusion import Candidate, has_kernel, registry
from dsv4fuse.options import Options

SLOWER = 1.02  # two runs of one benchmark differ by about as much
CLEAR = 0.7  # of Inductor's time: other sizes than those measured do not turn that round


@dataclass(frozen=True)
class Verdict:
    """Take the site or leave it (None: measure it), why, and the µs it rests on."""

    take: bool | None
    why: str = ""
    times: Mapping[str, object] = field(default_factory=dict)


def decide(candidate: Candidate, options: Options) -> Verdict:
    """The verdict on a site before anything is run."""
    if options.select == "always":
        return Verdict(True)
    if options.select == "never":
        return Verdict(False, "select='never' leaves every site to Inductor.")
    if not has_kernel(candidate.fusion):
        return Verdict(True)
    if options.select == "measure":
        return Verdict(None)
    tensors = [n.meta["val"] for n in candidate.inputs]
    devices = {t.device for t in tensors if isinstance(t, torch.Tensor)}
    if {d.type for d in devices} != {"cuda"}:
        why = "There is no GPU here: on a CPU the fused op is its plain PyTorch reference."
        return Verdict(False, why)
    data = measured(candidate.fusion)
    capability = list(torch.cuda.get_device_capability(next(iter(devices))))
    if data is None or data["capability"] != capability:
        return Verdict(None)
    return _by_table(data, candidate)


def compare(times: tuple[float, float]) -> Verdict:
    """The verdict on a site whose (Inductor's, our) µs were measured on the spot."""
    inductor, ours = times
    shown = {"inductor": inductor, "ours": ours, "measured": "here"}
    if ours > SLOWER * inductor:
        why = f"Inductor is faster here: {inductor:.2f} µs against {ours:.2f} µs, just measured."
        return Verdict(False, why, shown)
    return Verdict(True, f"{ours:.2f} µs against Inductor's {inductor:.2f}, just measured.", shown)


@functools.cache
def measured(fusion: str) -> dict[str, Any] | None:
    """The measurements beside a fusion's kernel: where, when, and rows of µs."""
    folder = importlib.import_module("dsv4fuse.kernels").__path__[0]
    path = pathlib.Path(folder) / f"{fusion}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _by_table(data: dict[str, Any], candidate: Candidate) -> Verdict:
    """What was measured of the site's variant at the nearest sizes."""
    tokens = max(1, compat.hint(candidate.tokens))
    rows = sorted(
        (r for r in data["rows"] if r["variant"] == candidate.variant), key=lambda r: r["tokens"]
    )
    if not rows:
        return Verdict(None)
    below = [r for r in rows if r["tokens"] <= tokens][-1:]
    above = [r for r in rows if r["tokens"] >= tokens][:1]
    near = [*below, *above]
    worst = max(near, key=lambda r: r["ours"] / r["inductor"])
    at = f"at {worst['tokens']} tokens ({data['gpu']}, {data['date']})"
    shown = {k: worst[k] for k in ("inductor", "ours", "tokens")} | {"measured": data["date"]}
    inductor, ours = worst["inductor"], worst["ours"]
    if registry()[candidate.fusion].varied and ours > CLEAR * inductor:
        return Verdict(None)
    if ours > SLOWER * inductor:
        why = f"Inductor is faster here: {inductor:.2f} µs against {ours:.2f} µs {at}."
        return Verdict(False, why, shown)
    return Verdict(True, f"{ours:.2f} µs against Inductor's {inductor:.2f} {at}.", shown)
