"""A call of fused ops as a functional graph; what such a call does, to compare it with others; and
its graph once more, of other inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dsv4fuse import compat, decompositions

Call = Callable[..., Any]


@contextlib.contextmanager
def _among(fakes: Sequence[Any]) -> Iterator[None]:
    """No mode but that of the fakes, and no gradients."""
    modes = {x.fake_mode for x in fakes if hasattr(x, "fake_mode")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        for mode in modes:
            stack.enter_context(mode)
        yield


def graph(fn: Call, fakes: Sequence[Any], like: Sequence[Any] = (), *, keep_ops: bool) -> fx.Graph:
    """fn, which calls fused ops, as a functional graph over the fakes' (or like's) fake mode.

    ``keep_ops`` leaves each op one node; otherwise an op becomes the launch of its Triton kernel,
    which Inductor's wrapper then makes itself instead of going through the dispatcher.
    """
    kept = compat.kept_ops if keep_ops else contextlib.nullcontext
    with _among((*fakes, *like)), kept():
        table = decompositions.table()
        traced = make_fx(dispatch_functionalize(fn), table, tracing_mode="real")(*fakes)
    return traced.graph


def steps(fn: Call, fakes: Sequence[Any], like: Sequence[Any] = ()) -> object:
    """Equal for calls that do the same with inputs that are alike: the operations, what each is
    given, what is returned. Equal to nothing where a tensor comes from elsewhere."""
    with _among((*fakes, *like)), _Steps(fakes) as seen:
        results = fn(*fakes)
    made = (*seen.inputs, *seen.made, seen.shown(results))
    return object() if seen.foreign else made


def again(known: fx.Graph, fakes: Sequence[Any], like: Sequence[Any] = ()) -> fx.Graph:
    """The graph of a call whose ``steps`` are those of another one, for that one's fakes: what is
    a view there is a view of these."""
    copy, values, given = fx.Graph(), dict[fx.Node, Any](), iter(fakes)
    copy.output(copy.graph_copy(known, {}))
    with _among((*fakes, *like)):
        for node in copy.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
            if "val" in node.meta:
                node.meta["val"] = values[node]
    return copy


class _Steps(TorchDispatchMode):
    """Notes what is called; a tensor goes by its number, in the order in which they appear."""

    def __init__(self, fakes: Sequence[Any]) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}
        self._tensors: list[Tensor] = []  # alive, for the sake of their ids
        self.foreign = False
        self.made: list[tuple[object, str]] = []
        self.inputs = [(_described(x), self._new(x)) for x in fakes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shown = self.shown((args, kwargs or {}))
        results = func(*args, **(kwargs or {}))
        _pytree.tree_map(self._new, results)
        self.made.append((func, shown))
        return results

    def _new(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self._tensors.append(value)
        return self._numbers.setdefault(id(value), len(self._tensors))

    def shown(self, values: Any) -> str:
        return repr(_pytree.tree_map(self._show, values))

    def _show(self, value: Any) -> str:
        if not isinstance(value, Tensor):
            return f"{type(value).__name__} {value!r}"
        self.foreign |= id(value) not in self._numbers
        return f"#{self._numbers.get(id(value))}"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    laid = value.shape, value.stride(), value.storage_offset()
    return repr((laid, value.dtype, value.device))
