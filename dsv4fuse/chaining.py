"""One site's output as another's input, where copies and transposes stand between the two.

A hole binds to the node nearest to the graph's inputs, so that no copy is made for a kernel that
reads strides. Where that node lies inside of another candidate's region, which ends in such a copy,
the two would exclude each other: the copy shows the same value, and is read instead.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, fx

from dsv4fuse import maps
from dsv4fuse.fusion import Candidate
from dsv4fuse.scene import Scene

Axes = tuple[int | None, ...]
Sited = tuple[Candidate, list[fx.Node]]


def chained(scene: Scene, sited: Iterable[Sited]) -> list[Candidate]:
    """The candidates, each reading the ends of the others rather than their insides."""
    sited = list(sited)
    ends: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for candidate, region in sited:
        for node in region:
            if node not in candidate.outputs:
                ends[node] += candidate.outputs
    found = []
    for candidate, region in sited:
        own = set(region) - set(candidate.outputs)
        for source in candidate.inputs:
            options = (end for end in ends[source] if end in own)
            end = next((e for e in options if _axes(scene, e, source) is not None), None)
            if end is not None and source not in candidate.caches:
                candidate = _reading(scene, candidate, source, end)
        found.append(candidate)
    return found


def _axes(scene: Scene, end: fx.Node, source: fx.Node) -> Axes | None:
    """The axes of ``source`` as axes of ``end`` (None: of size one), if both show one value."""
    a, b = end.meta["val"], source.meta["val"]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype:
        return None
    term = scene.low.term(end)
    for node, m in scene.places(term, maps.sizes_of(a)):  # type: ignore[arg-type]
        if node is not source:
            continue
        axes = tuple(None if i == maps.ZERO else i.whole() for i in m)
        broken = any(i != maps.ZERO and x is None for i, x in zip(m, axes, strict=True))
        held = sorted(x for x in axes if x is not None)
        every = [k for k, n in enumerate(maps.sizes_of(a)) if n != 1]
        if not broken and held == every and maps.whole_axes(m, maps.sizes_of(b)):
            return axes
    return None


def _reading(scene: Scene, candidate: Candidate, source: fx.Node, end: fx.Node) -> Candidate:
    """The candidate with ``end`` in the place of its input ``source``."""
    place, call = candidate.inputs.index(source), candidate.call
    axes = _axes(scene, end, source)
    assert axes is not None

    def through(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors)
        given[place] = _shown(given[place], axes)
        return call(*given)

    inputs = (*candidate.inputs[:place], end, *candidate.inputs[place + 1 :])
    return dataclasses.replace(candidate, inputs=inputs, call=through)


def _shown(t: Tensor, axes: Axes) -> Tensor:
    """t with its axes in this order, those of size one added where None stands; no data moves."""
    kept = [a for a in axes if a is not None]
    units = [a for a in range(t.dim()) if a not in kept]
    t = t.permute(*kept, *units)
    for _ in units:
        t = t.squeeze(-1)
    for place, a in enumerate(axes):
        if a is None:
            t = t.unsqueeze(place)
    return t
