"""A plain function as the graph that the pass is given, without Dynamo: for many programs a minute.

What AOTAutograd adds for a call without gradients is one thing: an input that was written in place
is copied back at the end. ``tests/test_generated.py`` holds the two ways against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd import functional_utils as functional
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from dsv4fuse import decompositions, exact

from .._same import copied, difference

_TABLE = decompositions.table()


def traced(
    fn: Callable[..., Any], args: Sequence[Any], device: torch.device | None = None
) -> fx.GraphModule:
    """The functional ATen graph of ``fn(*args)``; numbers among the arguments are constants.

    ``device``: as if the tensors were there, whether it is or not.
    """
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def body(*tensors: Tensor) -> Any:
        with FunctionalTensorMode():
            given = list(args)
            wrapped = [functional.to_fun(t) for t in tensors]
            for i, t in zip(places, wrapped, strict=True):
                given[i] = t
            result = fn(*given)
            for t in wrapped:
                functional.sync_functional_tensor(t)
            found = tree_map_only(Tensor, _plain, result)
            new = [functional.from_fun(t) for t in wrapped]
            written = [functional.has_data_mutation(t) for t in wrapped]
        for t, update, changed in zip(tensors, new, written, strict=True):
            if changed:
                t.copy_(update)
        return found

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(args[i], static_shapes=True) for i in places]
    if device is not None:
        with mode:
            fakes = [torch.empty_strided(f.shape, f.stride(), dtype=f.dtype, device=device)
                     for f in fakes]  # fmt: skip
    with torch.no_grad(), mode:
        module = make_fx(body, _TABLE, tracing_mode="real")(*fakes)
    module.graph.eliminate_dead_code()
    return module


def _plain(t: Tensor) -> Tensor:
    functional.sync_functional_tensor(t)
    return functional.from_fun(t)


def truth(fn: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
    """Every tensor that ``fn(*args)`` returns and leaves in its arguments, in exact arithmetic."""
    module = traced(fn, args)
    env: dict[fx.Node, Any] = {}
    given = iter(a for a in args if isinstance(a, Tensor))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given).clone()
        elif node.op == "get_attr":
            env[node] = getattr(module, node.target)
    inputs = [n for n in env if n.op == "placeholder"]
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    ends = tree_leaves(module.graph.output_node().args[0])
    kept = [n for n in (*ends, *inputs) if isinstance(n, fx.Node)]
    with torch.no_grad():
        env = exact.truth(nodes, env, kept)
    return [env[n] for n in kept if isinstance(env[n], Tensor)]


def run(module: fx.GraphModule, args: Sequence[Any]) -> Any:
    with torch.no_grad():
        return module(*(a for a in args if isinstance(a, Tensor)))


class _Filled(fx.Interpreter):
    """Runs a graph with a number in all memory that is allocated and not written."""

    def __init__(self, module: fx.GraphModule, number: int) -> None:
        super().__init__(module)
        self.number = number

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().call_function(target, args, kwargs)
        return found.fill_(self.number) if "empty" in str(target) else found


def reads_unwritten(module: fx.GraphModule, args: Sequence[Any]) -> bool:
    """Do the results, or what is left in the arguments, hang on memory that nobody wrote?"""
    if not any("empty" in str(n.target) for n in module.graph.nodes):
        return False
    ends = []
    for number in (0, 1):
        given = [a for a in copied(args) if isinstance(a, Tensor)]
        with torch.no_grad():
            ends.append(tree_leaves((_Filled(module, number).run(*given), given)))
    pairs = zip(*ends, strict=True)
    return any(isinstance(a, Tensor) and difference(a, b, exact=True) for a, b in pairs)
