"""The pass itself: one functional graph in, the same graph with fused ops out, and its sites."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter

from torch import fx

from dsv4fuse import chaining, clock, compat, garbage, rewrite, select, trial, tuning, verify
from dsv4fuse.front import in_front
from dsv4fuse.fusion import Candidate, registry
from dsv4fuse.nearmiss import near_misses
from dsv4fuse.options import Options, only
from dsv4fuse.plans import Declined, Plans
from dsv4fuse.report import Report, Site
from dsv4fuse.scene import Scene

numbers: Counter[str] = Counter()  # of each fusion, how many sites this process has seen


def run(graph: fx.Graph, options: Options) -> Report:
    """Fuse what can be fused in ``graph``, in place."""
    started = time.perf_counter()
    with clock.collecting() as spent, garbage.passed_by():
        sites = _fused(graph, options)
    return Report(sites=sites, graphs=1, seconds=time.perf_counter() - started, spent=spent)


def _fused(graph: fx.Graph, options: Options) -> list[Site]:
    # A rule's numbers need not be fake tensors.
    with clock.step("matching"), garbage.growing(), compat.outside_compilation():
        scene = Scene(graph)
        regions = candidates(scene, options)
    fusions = list(registry().values())
    allowed = only()
    covered = {node for _, region in regions for node in region}
    sites: list[Site] = []
    gone: list[tuple[Candidate, set[fx.Node]]] = []
    newer: dict[fx.Node, fx.Node] = {}
    # The largest first: where it cannot be taken, the smaller ones inside it get their turn.
    waiting = sorted(regions, key=lambda cr: -len(cr[1]))
    waiting = [(c, region) for c, region in waiting if options.wants(c.fusion)]
    if allowed is not None:
        waiting = [cr for cr in waiting if {cr[0].fusion, cr[0].site} & set(allowed)]
    with clock.step("planning"):
        plans = Plans(shared=not options.autotune)  # its shapes are chosen inside of an op
        if not options.autotune:
            _plan_ahead(waiting, options, plans)
    with clock.step("matching"), garbage.growing():
        nearly = near_misses(scene, covered)  # before the graph is touched, should this fail
    while waiting:
        planned, waiting = _planned(scene, waiting, gone, options, sites, plans)
        refused = [c for c, traced in planned if not _applied(graph, c, traced, newer, sites)]
        if not refused:
            break
        gone = [g for g in gone if not any(g[0] is c for c in refused)]
    for near in nearly:
        fusion = next((f.name for f in fusions if near.atom in f.atoms), "")
        if not options.wants(fusion) or not fusion:
            continue
        module, file, line = compat.place(near.difference.node)
        sites.append(Site(fusion, "near-miss", module, file, line, near.sentence))
    if newer:
        graph.eliminate_dead_code()
        graph.lint()
    return sites


def candidates(scene: Scene, options: Options) -> list[tuple[Candidate, list[fx.Node]]]:
    """Every place where a fusion applies, in the graph's order, with the nodes it replaces."""
    found = [c for f in registry().values() for c in f.find(scene, options.numerics)]
    found = chaining.chained(scene, [(c, _region(scene, c)) for c in found])
    found = [dataclasses.replace(c, like=_like(scene, c)) for c in found]
    return [(c, _region(scene, c)) for c in _named(scene, found)]


def _plan_ahead(
    waiting: list[tuple[Candidate, list[fx.Node]]], options: Options, plans: Plans
) -> None:
    """The sites that will be run on a GPU are planned, but those inside a larger one."""
    covered, run = set[fx.Node](), list[Candidate]()
    for candidate, region in waiting:
        on_gpu = candidate.root.meta["val"].is_cuda and candidate.unsupported is None
        if on_gpu and not covered.issuperset(region):
            front = in_front(candidate, region, covered)
            take = select.decide(candidate, options, front).take
            run += [candidate] if take is None or take and options.verify else []
        covered.update(region)
    if run:
        plans.ahead(run, run[0].root.meta["val"].device)


def _planned(
    scene: Scene,
    waiting: list[tuple[Candidate, list[fx.Node]]],
    gone: list[tuple[Candidate, set[fx.Node]]],
    options: Options,
    sites: list[Site],
    plans: Plans,
) -> tuple[list[tuple[Candidate, fx.Graph]], list[tuple[Candidate, list[fx.Node]]]]:
    """The plans of what is taken, in the graph's order, and what lies inside that and waits.

    What is taken is added to ``gone``, what is declined to ``sites``; not what lies inside
    something that was declined for the same reason.
    """
    planned, inside, refused = [], [], list[tuple[set[fx.Node], str]]()
    taken = set().union(*(nodes for _, nodes in gone))
    for candidate, region in waiting:
        if _swallowed(scene, candidate, gone):
            inside.append((candidate, region))
            continue
        revived = _revived(scene, candidate, gone)
        if revived:
            sites.append(_site(candidate, "declined", revived))
            continue
        front = in_front(candidate, region, taken)
        candidate, status, reason, traced = _decide(candidate, region, front, options, plans)
        if traced is not None:
            planned.append((candidate, traced))
            gone.append((candidate, set(region)))
            taken.update(region)
        elif not any(reason == why and left.issuperset(region) for left, why in refused):
            refused.append((set(region), reason))
            sites.append(_site(candidate, status, reason))
    return sorted(planned, key=lambda ct: scene.order[ct[0].root]), inside


def _applied(
    graph: fx.Graph,
    candidate: Candidate,
    traced: fx.Graph,
    newer: dict[fx.Node, fx.Node],
    sites: list[Site],
) -> bool:
    """Puts a plan into the graph, unless that turns out to be illegal."""
    try:
        rewrite.apply(graph, candidate, traced, newer)
    except Declined as error:
        sites.append(_site(candidate, "declined", str(error)))
        return False
    sites.append(_site(candidate, "taken", _how(candidate)))
    return True


def _named(scene: Scene, found: list[Candidate]) -> list[Candidate]:
    """The candidates in the graph's order, each with its site's name."""
    ordered = sorted(found, key=lambda c: scene.order[c.root])
    names = []
    for candidate in ordered:
        names.append(f"{candidate.fusion}#{numbers[candidate.fusion]}")
        numbers[candidate.fusion] += 1
    return [dataclasses.replace(c, site=n) for c, n in zip(ordered, names, strict=True)]


def _region(scene: Scene, candidate: Candidate) -> list[fx.Node]:
    """The nodes that compute the candidate's outputs from its inputs, in the graph's order."""
    nodes: set[fx.Node] = set()
    leaves = {*candidate.inputs, *_like(scene, candidate)}
    for root in (*candidate.outputs, *candidate.updates):
        nodes |= scene.region(root, leaves)
    return sorted(nodes, key=scene.order.__getitem__)


def _like(scene: Scene, candidate: Candidate) -> dict[fx.Node, fx.Node]:
    """Nodes that hold what an input holds: other slices and casts of one tensor."""
    inputs = [n for n in candidate.inputs if n not in candidate.caches]
    ends = {*candidate.inputs, *candidate.outputs, *candidate.updates}
    return {like: n for n in inputs for like in scene.alike(n) if like not in ends}


def _swallowed(
    scene: Scene, candidate: Candidate, gone: list[tuple[Candidate, set[fx.Node]]]
) -> bool:
    """Does nobody need what the candidate computes, once the planned ones are taken?"""
    replaced = [n for c, _ in gone for n in (*c.outputs, *c.updates)]
    inside = set().union(*(region for _, region in gone))
    return all(
        node in replaced or (node in inside and not scene.live_without(node, replaced))
        for node in (*candidate.outputs, *candidate.updates)
    )


def _revived(
    scene: Scene, candidate: Candidate, gone: list[tuple[Candidate, set[fx.Node]]]
) -> str:
    """A sentence where the candidate reads what the planned ones compute inside and do not return:
    all that leads to it would be computed once more."""
    replaced = [n for c, _ in gone for n in (*c.outputs, *c.updates)]
    read = {n for c, _ in gone for n in c.inputs}
    for taken, region in gone:
        for node in region.difference(replaced, read).intersection(candidate.inputs):
            if not scene.live_without(node, [*replaced, *candidate.outputs, *candidate.updates]):
                return f"{node.name}, which it reads, is a value inside of {taken.site}."
    return ""


def _decide(
    candidate: Candidate, region: list[fx.Node], front: list[fx.Node], options: Options,
    plans: Plans,
) -> tuple[Candidate, str, str, fx.Graph | None]:  # fmt: skip
    """The candidate (with the times it was chosen by), its status, the reason, the plan."""
    verdict = select.decide(candidate, options, front)
    if verdict.take is False:
        return _timed(candidate, verdict), "declined", verdict.why, None
    if options.autotune:
        with clock.step("tuning"):
            candidate = tuning.tuned(candidate, region)
    try:
        with clock.step("planning"):
            traced = plans.of(candidate)
    except Declined as error:
        return candidate, "declined", str(error), None
    if not options.verify and verdict.take:
        return _timed(candidate, verdict), "taken", "", traced
    plans.wait(candidate)
    found, record = trial.run(candidate, region, front, options, verdict.take is None)
    detail = {**candidate.detail, "found": record}
    if found.large:
        detail["check"] = verify.UNCHECKED
    candidate = dataclasses.replace(candidate, detail=detail)
    if found.wrong:
        return candidate, "rejected", found.wrong, None
    if isinstance(found.times, str):
        return candidate, "declined", found.times, None
    if found.times is not None:
        verdict = select.compare(found.times)
    status, why = ("declined", verdict.why) if verdict.take is False else ("taken", "")
    return _timed(candidate, verdict), status, why, None if why else traced


def _timed(candidate: Candidate, verdict: select.Verdict) -> Candidate:
    """The candidate with the times that the verdict rests on, if there are any."""
    if not verdict.times:
        return candidate
    detail = {**candidate.detail, "µs": dict(verdict.times), "why": verdict.why}
    return dataclasses.replace(candidate, detail=detail)


def _how(candidate: Candidate) -> str:
    how = str(candidate.detail.get("parts", "")).strip()
    loose = f" Equal up to rounding by: {', '.join(sorted(candidate.loose))}." * bool(
        candidate.loose
    )
    said = (candidate.detail.get(k) for k in ("why", "check", "launch"))
    more = "".join(f" {sentence}" for sentence in said if sentence)
    return f"{how[:1].upper()}{how[1:]}.{loose}{more}" if how else f"Fused.{loose}{more}"


def _site(candidate: Candidate, status: str, reason: str) -> Site:
    module, file, line = compat.place(candidate.root)
    detail = {
        "site": candidate.site, "result_bytes": select.result_bytes(candidate), **candidate.detail,
    }  # fmt: skip
    return Site(candidate.fusion, status, module, file, line, reason, detail=detail)  # type: ignore[arg-type]


