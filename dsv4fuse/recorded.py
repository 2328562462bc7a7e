"""A function as the functional ATen graph that Inductor would be given. Nothing is computed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4fuse import compat, decompositions

Inputs = Sequence[tuple[Sequence[int | torch.SymInt], torch.dtype]]


def graph(fn: Callable[..., Any], inputs: Inputs) -> fx.Graph:
    """fn of tensors of these shapes and dtypes."""
    sizes = (n for shape, _ in inputs for n in shape if isinstance(n, torch.SymInt))
    env = next((n.node.shape_env for n in sizes), None)
    with compat.outside_compilation(), FakeTensorMode(shape_env=env):
        fakes = [torch.empty(tuple(shape), dtype=dtype) for shape, dtype in inputs]
        try:
            with _Recorder(fakes) as recorder:
                results = fn(*fakes)
            return recorder.returning(results)
        except _Foreign:
            table = decompositions.table()
            return make_fx(dispatch_functionalize(fn), table, tracing_mode="real")(*fakes).graph


class _Foreign(Exception):
    """Something is written, or a tensor is none that was made of the inputs."""


class _Recorder(TorchDispatchMode):
    """Notes operations as ``make_fx`` does, in a third of its time, where nothing is written."""

    def __init__(self, fakes: Sequence[Tensor]) -> None:
        super().__init__()
        self._graph, self._table = fx.Graph(), decompositions.table()
        self._nodes: dict[int, fx.Node] = {}
        self._tensors: list[Tensor] = []  # alive, for the sake of their ids
        for i, fake in enumerate(fakes):
            self._keep(self._graph.placeholder(f"arg{i}_1"), fake)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        with self:
            found = decompositions.spelled(func, args, kwargs, self._table)
        if found is not NotImplemented:
            return found
        if func._schema.is_mutable:
            raise _Foreign
        results = func(*args, **kwargs)
        self._keep(self._graph.call_function(func, *self._shown((args, kwargs))), results)
        return results

    def returning(self, results: Any) -> fx.Graph:
        """What was noted, with that output."""
        self._graph.output(self._shown(results))
        return self._graph

    def _keep(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        if isinstance(value, Tensor):
            self._tensors.append(value)
            self._nodes[id(value)] = node
        elif isinstance(value, tuple | list):
            for i, part in enumerate(value):
                self._keep(self._graph.call_function(operator.getitem, (node, i)), part)

    def _shown(self, values: Any) -> Any:
        return _pytree.tree_map(self._node, values)

    def _node(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            raise _Foreign
        return self._nodes[id(value)]
