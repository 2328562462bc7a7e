"""Mutants: a program with one wrong edit, by its terms and by the check on random inputs.

Two promises are tested, each without the other. The terms alone (``verify=False``) must not take
what computes something else: the fused mutant still equals the unfused one. And where the mutant's
own nodes are put in the place of the original's for the original's fused op, as a matcher would
that overlooked the edit, the check on random inputs must refuse.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from dsv4fuse import compat, exact, pipeline, samples, verify
from dsv4fuse.backend import parse
from dsv4fuse.fusion import Candidate
from dsv4fuse.plans import Declined, Plans
from dsv4fuse.scene import Scene

from . import _check, _edits, _graphs
from ._hand import Site

UNVERIFIED = parse(_check.OPTIONS | {"verify": False})


@dataclass
class Mutant:
    """``void``: the edit changes nothing on these inputs. ``taken``: it was fused all the same,
    as what it is. ``wrong``: fused to something else. ``forced``: what the check on random inputs
    says of the mutant's nodes for the original's op: "rejected", "equal" (it computes the same
    there), "rounded" (in exact arithmetic it does, to a rounding of the result), "close" (within
    what the check allows), "" where nothing was forced."""

    program: str
    edit: str
    fusion: str = ""
    void: bool = False
    taken: bool = False
    wrong: str = ""
    crash: str = ""
    forced: str = ""


def of_pieces(original: Site, changed: Site) -> Mutant:
    """One piece exchanged in the source."""
    what = next(k for k, v in changed.words.items() if v.startswith("MUTANT"))
    result = Mutant(repr(changed), f"{what}: {changed.words[what][7:]}", changed.family)
    base, args, left = (_check.copied(s.inputs) for s in (original, changed, changed))
    try:
        with torch.no_grad():
            wanted = changed.fn(*args)
            other = original.fn(*base)
    except Exception:
        result.void = True
        return result
    result.void = not _check.unequal((other, base), (wanted, args), exact=True)
    try:
        module = _graphs.traced(changed.fn, left)
        report = pipeline.run(module.graph, UNVERIFIED)
        module.recompile()
        found = _graphs.run(module, left)
        result.taken = bool(report.with_status("taken"))
        if result.taken:
            ends = (wanted, args), (found, left)
            result.wrong = _check.unequal(*ends, exact=False) and _check.further_off(changed, *ends)
    except Exception:
        result.crash = traceback.format_exc()
    return result


def of_graph(site: Site, draw: Callable[[Any], Any]) -> Mutant | None:
    """One edit at a node of what the pass would replace; None where no edit applies."""
    module = _graphs.traced(site.fn, _check.copied(site.inputs))
    places = _places(module)
    if not places:
        return None
    candidate, region = places[draw(st.integers(0, len(places) - 1))]
    ways = [(n, name, e) for n in region for name, e in _edits.edits_of(n)]
    if not ways:
        return None
    kind = draw(st.sampled_from(sorted({name for _, name, _ in ways})))
    ways = [w for w in ways if w[1] == kind]
    way = ways[draw(st.integers(0, len(ways) - 1))]
    return _mutant(site, module, candidate, way)


def every(site: Site, kinds: Collection[str]) -> Iterator[Mutant]:
    """Every edit of these kinds at every node of what the pass would replace."""
    module = _graphs.traced(site.fn, _check.copied(site.inputs))
    for candidate, region in _places(module):
        for node in region:
            for name, edit in _edits.edits_of(node):
                made = (
                    _mutant(site, module, candidate, (node, name, edit)) if name in kinds else None
                )
                if made is not None:
                    yield made


def _mutant(
    site: Site, module: fx.GraphModule, candidate: Candidate, way: tuple[fx.Node, str, _edits.Edit]
) -> Mutant | None:
    node, name, edit = way
    try:
        copy, copies = _edits.edited(module, node, edit)
    except _edits.Void:
        return None
    result = Mutant(repr(site), f"{name} at {node.name} = {node.target}", candidate.fusion)
    try:
        _by_terms(result, site, module, copy)
        if not result.void:
            result.forced = _forced(candidate, copies, copy.graph)
    except Exception:
        result.crash = traceback.format_exc()
    return result


def _places(module: fx.GraphModule) -> list[tuple[Candidate, list[fx.Node]]]:
    """What the pass could take, with the nodes that it would replace."""
    found = pipeline.candidates(Scene(module.graph), UNVERIFIED)
    return [(c, r) for c, r in found if r and _planned(c)]


def _planned(candidate: Candidate) -> bool:
    try:
        Plans().of(candidate)
    except Declined:
        return False
    return True


def _by_terms(result: Mutant, site: Site, module: fx.GraphModule, copy: fx.GraphModule) -> None:
    """Does the pass, by its terms alone, make of the mutant something else?"""
    args = [_check.copied(site.inputs) for _ in range(3)]
    original = _graphs.run(module, args[0])
    try:
        wanted = _graphs.run(copy, args[1])
    except Exception:  # an edited index may point outside: no program
        result.void = True
        return
    result.void = not _check.unequal((original, args[0]), (wanted, args[1]), exact=True)
    if _graphs.reads_unwritten(copy, site.inputs):
        result.void = True
        return
    graph = fx.Graph()
    graph.output(graph.graph_copy(copy.graph, {}))
    fused = fx.GraphModule(copy, graph)
    report = pipeline.run(fused.graph, UNVERIFIED)
    fused.recompile()
    result.taken = bool(report.with_status("taken"))
    if result.taken:
        found = _graphs.run(fused, args[2])
        ends = (wanted, args[1]), (found, args[2])
        mutant = dataclasses.replace(site, fn=copy)
        result.wrong = _check.unequal(*ends, exact=False) and _check.further_off(mutant, *ends)


def _forced(candidate: Candidate, copies: dict[fx.Node, fx.Node], graph: fx.Graph) -> str:
    """The check's verdict on the mutant's nodes in the place of the original's."""
    moved = _moved(candidate, copies)
    ends = (*moved.outputs, *moved.updates)
    region = _between(graph, moved.inputs, ends)
    if any(e not in region for e in ends):
        return ""
    if verify.check(moved, region, "faithful") is not None:
        return "rejected"
    with compat.outside_compilation():
        made = samples.draw(moved, samples.leaves(moved, region))
        was = _between(
            candidate.root.graph, candidate.inputs, (*candidate.outputs, *candidate.updates)
        )
        back = {copies[n]: n for n in copies}
        if made is None or any(n not in back for n in made):
            return "close"
        given, olds = {back[n]: v for n, v in made.items()}, tuple(back[e] for e in ends)
        for verdict, way in (("equal", exact.run), ("rounded", exact.truth)):
            own, old = way(region, dict(made), ends), way(was, dict(given), olds)
            if all(_same(own[e], old[back[e]], e.meta["val"].dtype) for e in ends):
                return verdict
    return "close"


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal bits, or in fp64 no rounding step of the result apart."""
    if a.dtype != torch.float64:
        return _check.difference(a, b, exact=True) is None
    return torch.equal(a.isnan(), b.isnan()) and verify._steps(a, b, dtype) <= 1


def _moved(candidate: Candidate, copies: dict[fx.Node, fx.Node]) -> Candidate:
    """The candidate with every node of it replaced by its copy."""

    def moved(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return copies[value]
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if isinstance(value, dict):
            return {moved(k): moved(v) if isinstance(v, fx.Node) else v for k, v in value.items()}
        return value

    names = (
        "root",
        "inputs",
        "outputs",
        "caches",
        "updates",
        "places",
        "pieces",
        "reads",
        "spread",
        "like",
    )
    return dataclasses.replace(candidate, **{n: moved(getattr(candidate, n)) for n in names})


def _between(
    graph: fx.Graph, inputs: tuple[fx.Node, ...], ends: tuple[fx.Node, ...]
) -> list[fx.Node]:
    """The nodes that compute the ends from the inputs, in the graph's order."""
    inside, waiting = set[fx.Node](), list(ends)
    while waiting:
        node = waiting.pop()
        if node in inside or node in inputs or node.op in ("placeholder", "get_attr"):
            continue
        inside.add(node)
        waiting += node.all_input_nodes
    return [n for n in graph.nodes if n in inside]
