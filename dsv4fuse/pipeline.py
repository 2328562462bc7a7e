"""The pass itself: one functional graph in, the same graph with fused ops out, and its sites."""

from __future__ import annotations

import logging
import time

from torch import fx

from dsv4fuse import compat, rewrite, select, verify
from dsv4fuse.fusion import Candidate, registry
from dsv4fuse.nearmiss import near_misses
from dsv4fuse.options import Options
from dsv4fuse.report import Report, Site
from dsv4fuse.scene import Scene

log = logging.getLogger(__name__)


def run(graph: fx.Graph, options: Options) -> Report:
    """Fuse what can be fused in ``graph``, in place."""
    started = time.perf_counter()
    scene = Scene(graph)
    fusions = list(registry().values())
    candidates = [c for f in fusions for c in f.find(scene, options.numerics)]
    covered: set[fx.Node] = set()
    planned, sites = [], []
    for candidate in candidates:
        region = _region(scene, candidate)
        covered.update(region)
        if not options.wants(candidate.fusion):
            continue
        status, reason, traced = _decide(candidate, region, options)
        if traced is None:
            sites.append(_site(candidate, status, reason))
        else:
            planned.append((candidate, traced))
    newer: dict[fx.Node, fx.Node] = {}
    for candidate, traced in planned:
        try:
            rewrite.apply(graph, candidate, traced, newer)
            sites.append(_site(candidate, "taken", _how(candidate)))
        except rewrite.Declined as error:
            sites.append(_site(candidate, "declined", str(error)))
    for near in near_misses(scene, covered):
        fusion = next((f.name for f in fusions if near.atom in f.atoms), "")
        if not options.wants(fusion) or not fusion:
            continue
        module, file, line = compat.place(near.difference.node)
        sites.append(Site(fusion, "near-miss", module, file, line, near.sentence))
    if newer:
        graph.eliminate_dead_code()
        graph.lint()
    return Report(sites=sites, graphs=1, seconds=time.perf_counter() - started)


def _region(scene: Scene, candidate: Candidate) -> list[fx.Node]:
    """The nodes that compute the candidate's outputs from its inputs, in the graph's order."""
    nodes: set[fx.Node] = set()
    for root in (*candidate.outputs, *candidate.updates):
        nodes |= scene.region(root, candidate.inputs)
    return sorted(nodes, key=scene.order.__getitem__)


def _decide(
    candidate: Candidate, region: list[fx.Node], options: Options
) -> tuple[str, str, fx.GraphModule | None]:
    reason = select.decline(candidate, options)
    if reason:
        return "declined", reason, None
    try:
        traced = rewrite.plan(candidate)
    except rewrite.Declined as error:
        return "declined", str(error), None
    if options.verify:
        wrong = verify.check(candidate, region, options.numerics)
        if wrong:
            log.warning("%s: %s", candidate.fusion, wrong)
            return "rejected", wrong, None
    return "taken", "", traced


def _how(candidate: Candidate) -> str:
    how = str(candidate.detail.get("parts", "")).strip()
    loose = f" Equal up to rounding by: {', '.join(sorted(candidate.loose))}." * bool(
        candidate.loose
    )
    return f"{how[:1].upper()}{how[1:]}.{loose}" if how else f"Fused.{loose}"


def _site(candidate: Candidate, status: str, reason: str) -> Site:
    module, file, line = compat.place(candidate.root)
    return Site(
        candidate.fusion, status, module, file, line, reason, detail=dict(candidate.detail)
    )  # type: ignore[arg-type]


