"""``autotune``: a site's launch shapes chosen by timing it, among those of its kernels' tables.

A kernel's table holds what was fastest at some sizes on one GPU. Here each of a table's shapes is
tried on the site's own sizes; results stay what they promise to be under any of them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from dsv4fuse import compat, measure, samples, verify
from dsv4fuse.fusion import Candidate

log = logging.getLogger("dsv4fuse")
_known: dict[object, dict[int, Any]] = {}  # of a site, by the number of a launch in it, its shape


def tuned(candidate: Candidate, region: list[fx.Node]) -> Candidate:
    """The candidate with the launch shapes that were fastest here; itself on a CPU, or where
    nothing can be timed."""
    if not _on_gpu(candidate) or candidate.unsupported is not None:
        return candidate
    key = (candidate.fusion, verify.signature(candidate, region))
    if key not in _known:
        try:
            with compat.outside_compilation():
                _known[key] = _fastest(candidate, region)
        except Exception:  # the check runs into it too, and says so
            log.info("tuning %s", candidate.fusion, exc_info=True)
            _known[key] = {}
    if not (shapes := _known[key]):
        return candidate
    detail = {**candidate.detail, "launch": f"Launched here with {_listed(shapes)}."}
    return dataclasses.replace(candidate, call=_with(shapes, candidate.call), detail=detail)


def forget() -> None:
    """Tune every site anew, as a new process does."""
    _known.clear()


def _on_gpu(candidate: Candidate) -> bool:
    return candidate.root.meta["val"].is_cuda


def _listed(shapes: dict[int, Any]) -> str:
    return ", ".join(str(shape) for _, shape in sorted(shapes.items()))


def _with(shapes: dict[int, Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with those shapes, each in the place of the table's at its launch."""
    from dsv4fuse.kernels._common import picking

    def shaped(*tensors: Any) -> Any:
        count = iter(range(1 << 30))
        with picking(lambda _, found: shapes.get(next(count), found)):
            return call(*tensors)

    return shaped


def _fastest(candidate: Candidate, region: list[fx.Node]) -> dict[int, Any]:
    """The shapes other than the tables' with which a call takes less time, launch by launch."""
    from dsv4fuse.kernels._common import picking

    leaves = samples.leaves(candidate, region)
    made = samples.draw(candidate, leaves) or {}
    inputs = [made[n] for n in candidate.inputs]
    tables = list[tuple[Sequence[Any], Any]]()

    def noted(shapes: Sequence[Any], found: Any) -> Any:
        tables.append((shapes, found))
        return found

    with picking(noted):
        candidate.call(*inputs)
    chosen: dict[int, Any] = {}
    best = _time({}, candidate, inputs)
    for number, (shapes, found) in enumerate(tables):
        for shape in dict.fromkeys(s for s in shapes if s != found):
            tried = {**chosen, number: shape}
            if (spent := _time(tried, candidate, inputs)) < best:
                chosen, best = tried, spent
    return chosen


def _time(shapes: dict[int, Any], candidate: Candidate, inputs: list[Any]) -> float:
    """The median µs of the bare op so launched; infinite for a shape that does not launch."""
    call = _with(shapes, candidate.call)
    try:
        return measure.replayed(lambda: call(*inputs))
    except Exception:
        log.debug("%s with %s", candidate.fusion, shapes, exc_info=True)
        return math.inf
