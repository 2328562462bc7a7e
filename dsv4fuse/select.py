"""Take a site or leave it to Inductor: never slower is a promise.

``kernels/<stem>.json`` holds what ``python -m dsv4fuse bench`` measured on one GPU; with
``select="auto"`` a site is taken where its variant was faster there at the nearest token counts.
Where nothing was measured, and for ``select="measure"``, the site itself is timed (``measure``).
So it is where the time hangs on more than tokens (``Fusion.varied``), or on what is in front of the
site (``front``), or nothing was measured of sizes like the site's, and the table's time is not far
from Inductor's. Nor is it timed where the memory that the front alone takes leaves no doubt.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dsv4fuse import compat
from dsv4fuse.front import traffic
from dsv4fuse.fusion import Candidate, has_kernel, registry
from dsv4fuse.options import Options

SLOWER = 1.02  # of Inductor's time, where both are timed in one run
AS_FAST = 1.0  # of it in the table, for two runs differ by about that much
CLEAR = 0.7  # of Inductor's time: other sizes than those measured do not turn that round
ALIKE = 1.3  # by so much the results for a token may differ in size, and are a model of that kind


@dataclass(frozen=True)
class Verdict:
    """Take the site or leave it (None: measure it), why, and the µs it rests on."""

    take: bool | None
    why: str = ""
    times: Mapping[str, object] = field(default_factory=dict)


def decide(
    candidate: Candidate, options: Options, front: Collection[fx.Node] = ()
) -> Verdict:
    """The verdict on a site before anything is run; ``front``: what Inductor would inline."""
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
    return _by_table(data, candidate, front)


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


def _by_table(
    data: dict[str, Any], candidate: Candidate, front: Collection[fx.Node]
) -> Verdict:
    """What was measured of the site's variant at the nearest sizes."""
    tokens = max(1, compat.hint(candidate.tokens))
    rows = [r for r in data["rows"] if r["variant"] == candidate.variant]
    if not rows:
        return Verdict(None)
    rows, alike = _of_model(rows, result_bytes(candidate))
    rows.sort(key=lambda r: r["tokens"])
    below = [r for r in rows if r["tokens"] <= tokens][-1:]
    above = [r for r in rows if r["tokens"] >= tokens][:1]
    near = [*below, *above]
    worst = max(near, key=lambda r: r["ours"] / r["inductor"])
    date = worst.get("date") or data["date"]
    at = f"at {worst['tokens']} tokens ({data['gpu']}, {date})"
    shown = {k: worst[k] for k in ("inductor", "ours", "tokens")} | {"measured": date}
    inductor, ours = worst["inductor"], worst["ours"]
    if front and worst.get("floor"):
        read, written = (part * worst["floor"] for part in traffic(candidate, front))
        least, theirs = ours + read + written, inductor + max(0.0, read - written)
        if CLEAR * least > theirs:
            why = f"Inductor computes what is in front of it in the same kernel: {theirs:.2f} µs"
            return Verdict(False, f"{why} against {least:.2f} µs at least, in two, {at}.")
    if (registry()[candidate.fusion].varied or front or not alike) and ours > CLEAR * inductor:
        return Verdict(None)
    if ours > AS_FAST * inductor:
        why = f"Inductor is faster here: {inductor:.2f} µs against {ours:.2f} µs {at}."
        return Verdict(False, why, shown)
    return Verdict(True, f"{ours:.2f} µs against Inductor's {inductor:.2f} {at}.", shown)


def _of_model(
    rows: Sequence[Mapping[str, Any]], size: float
) -> tuple[list[Mapping[str, Any]], bool]:
    """The rows of the model whose results are nearest in size, and whether they are alike."""
    sizes: dict[Any, float] = {r.get("model"): r.get("result_bytes", 0.0) for r in rows}
    if not size or not all(sizes.values()):
        return list(rows), True
    far = {model: abs(math.log(own / size)) for model, own in sizes.items()}
    nearest = min(far, key=lambda model: far[model])
    return [r for r in rows if r.get("model") == nearest], far[nearest] <= math.log(ALIKE)


def result_bytes(candidate: Candidate) -> float:
    """Bytes of results for each token; 0 where there are none but what is written to caches."""
    values = [n.meta["val"] for n in candidate.outputs]
    sizes = (math.prod(map(compat.hint, v.shape)) * v.element_size() for v in values)
    return sum(sizes) / max(1, compat.hint(candidate.tokens))
