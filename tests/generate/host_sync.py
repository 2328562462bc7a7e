"""Constants that the host builds and copies, on a GPU that need not be there: graphs alone.

What the pass makes of a graph is run on the CPU, every device in it replaced by that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental.proxy_tensor as proxies
from hypothesis import strategies as st
from torch import Tensor, fx

from dsv4fuse import Report, pipeline
from dsv4fuse.backend import parse

from ..spellings._case import BF16, FP16, FP32
from . import _check, _graphs
from ._hand import Hand, Site
from ._mutants import Mutant

NAME = "host_sync"
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
OPTIONS = parse({"select": "always", "inner": "eager", "verify": False})
Make = Callable[[Any, Tensor], Tensor]

NUMBERS = (2.5, -1, 0, True, float("-inf"), 1e-20)
HOST: dict[str, Make] = {
    "tensor": lambda v, x: torch.tensor(v),
    "as_tensor": lambda v, x: torch.as_tensor(v),
    "scalar_tensor": lambda v, x: torch.scalar_tensor(v),
    "equal elements": lambda v, x: torch.tensor([v] * 3),
    "full": lambda v, x: torch.full((3,), v),
    "full, dtype": lambda v, x: torch.full((1, 3), v, dtype=FP32),
    "zeros": lambda v, x: torch.zeros(3),
    "ones": lambda v, x: torch.ones(4, 1),
    "arange": lambda v, x: torch.arange(3),
    "arange, steps": lambda v, x: torch.arange(6, 0, -2),
    "arange of a size": lambda v, x: torch.arange(x.shape[0])[:, None],
}
EDITS: dict[str, Make] = {
    "changed before": lambda v, x: torch.tensor(1.0).add_(0.5),
    "a product": lambda v, x: torch.tensor(2.5) * 3,
    "different elements": lambda v, x: torch.tensor([7.0, 8.0, 7.0]),
    "random": lambda v, x: torch.zeros(3).bernoulli_(0.5),
    "a power": lambda v, x: 0.5 ** torch.arange(3),
    "two joined": lambda v, x: torch.cat((torch.zeros(2), torch.ones(1))),
}
THROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda t: t,
    "float": lambda t: t.float(),
    "bf16": lambda t: t.to(BF16),
    "view": lambda t: t.unsqueeze(0),
    "reshape": lambda t: t.reshape(1, -1),
    "clone": lambda t: t.clone(),
    "cast and view": lambda t: t.to(FP16).view(1, *t.shape),
}
MOVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "to the device": lambda t, x: t.to(x.device),
    "to a tensor": lambda t, x: t.to(x),
    "to the device, a dtype": lambda t, x: t.to(x.device, FP32),
    "not blocking": lambda t, x: t.to(x.device, non_blocking=True),
}
USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda x, t: x + t,
    "product": lambda x, t: x * t,
    "maximum": lambda x, t: torch.maximum(x, t.to(x.dtype)),
    "where": lambda x, t: torch.where(x > 0, x, t.to(x.dtype)),
    "returned": lambda x, t: t,
    "changed afterwards": lambda x, t: t.clone().mul_(2) + x,
}


def constants(hand: Hand) -> Site:
    """One to three constants, each a site of its own."""
    steps = []
    for i in range(hand.number("constants", (1, 2, 3))):
        number = hand.number(f"{i} number", NUMBERS)
        made = hand.pick(f"{i} made", HOST, mutants=EDITS if i == 0 else None, of="tensor")
        through, moved = hand.pick(f"{i} through", THROUGH), hand.pick(f"{i} moved", MOVED)
        steps.append((number, made, through, moved, hand.pick(f"{i} use", USES)))

    def fn(x: Tensor) -> list[Any]:
        return [use(x, moved(through(made(v, x)), x)) for v, made, through, moved, use in steps]

    x = hand.random(4, 3, dtype=hand.dtype())
    return hand.site(NAME, fn, (x,), {NAME: len(steps)})


def mutant(draw: Callable[[Any], Any]) -> Mutant | None:
    """The first constant is none: it must still be computed as it was."""
    first = Hand(draw)
    constants(first)
    edit = draw(st.sampled_from(sorted(EDITS)))
    site = constants(Hand(draw, {**first.words, "0 made": f"MUTANT {edit}"}))
    outcome = check(site)
    if outcome.invalid:
        return None
    taken = outcome.taken[NAME] == sum(site.counts.values())
    return Mutant(repr(site), f"made: {edit}", NAME, taken=taken, wrong=outcome.wrong)


def check(site: Site) -> _check.Outcome:
    """Each copy is a fill on the device, and everything still computes the same."""
    outcome = _check.Outcome(repr(site))
    outcome.sites.update(site.counts)
    try:
        site.fn(*_check.copied(site.inputs))
    except Exception as error:  # shapes that do not broadcast
        outcome.invalid = repr(error)
        return outcome
    module = _pretended(site)
    before = _on_cpu(module, site.inputs)
    report: Report = pipeline.run(module.graph, OPTIONS)
    module.recompile()
    outcome.taken.update(report.counts())
    left = len(list(copies(module.graph)))
    outcome.wrong = _check.unequal(before, _on_cpu(module, site.inputs), exact=True)
    wanted = sum(site.counts.values())
    if (sum(outcome.taken.values()), left) != (wanted, 0):
        outcome.missed = [(NAME, f"{outcome.taken[NAME]} of {wanted}, {left} copies left")]
    return outcome


def _pretended(site: Site) -> fx.GraphModule:
    """The graph for inputs on a GPU. Tracing would compute constants of one element there."""
    with mock.patch.object(proxies, "CONSTANT_NUMEL_LIMIT", 0):
        return _graphs.traced(site.fn, site.inputs, GPU)


def copies(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes that bring a value of the host to the GPU."""
    for n in graph.nodes:
        value = n.meta.get("val")
        sources = [a.meta["val"] for a in n.all_input_nodes if isinstance(a.meta["val"], Tensor)]
        if isinstance(value, Tensor) and sources and value.device == GPU:
            if n.target in (torch.ops.prims.device_put.default, torch.ops.aten._to_copy.default):
                if sources[0].device == CPU:
                    yield n


def _on_cpu(module: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    here = fx.GraphModule(module, graph)
    for n in graph.nodes:
        args = tuple(CPU if isinstance(a, torch.device) else a for a in n.args)
        kwargs = {k: CPU if isinstance(a, torch.device) else a for k, a in n.kwargs.items()}
        n.args, n.kwargs = args, kwargs
    here.recompile()
    torch.manual_seed(0)
    return _graphs.run(here, _check.copied(inputs))
