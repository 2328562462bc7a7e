"""One edit of a functional ATen graph that changes what it computes.

Most edits are the mistakes that people make: a constant, an axis, an order, a rounding, a sign, the
wrong one of two tensors. They are made on the graph, so every fusion has them at every node.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

aten = torch.ops.aten
Edit = Callable[[fx.Graph, fx.Node], None]
EXCHANGED = {
    "another operation": (
        (aten.add.Tensor, aten.sub.Tensor),
        (aten.sub.Tensor, aten.add.Tensor),
        (aten.mul.Tensor, aten.add.Tensor),
        (aten.div.Tensor, aten.mul.Tensor),
        (aten.rsqrt.default, aten.reciprocal.default),
        (aten.sqrt.default, aten.abs.default),
        (aten.exp.default, aten.exp2.default),
        (aten.exp2.default, aten.exp.default),
        (aten.log2.default, aten.log.default),
        (aten.log1p.default, aten.log.default),
        (aten.ceil.default, aten.floor.default),
        (aten.neg.default, aten.abs.default),
        (aten.abs.default, aten.neg.default),
        (aten.sigmoid.default, aten.tanh.default),
        (aten.relu.default, aten.abs.default),
        (aten.amax.default, aten.amin.default),
        (aten.cos.default, aten.sin.default),
        (aten.minimum.default, aten.maximum.default),
        (aten.maximum.default, aten.minimum.default),
        (aten.clamp_min.default, aten.clamp_max.default),
        (aten.clamp_max.default, aten.clamp_min.default),
        (aten.mean.dim, aten.amax.default),
    ),
    "another comparison": (
        (aten.lt.Scalar, aten.le.Scalar),
        (aten.gt.Scalar, aten.ge.Scalar),
        (aten.ge.Scalar, aten.gt.Scalar),
        (aten.lt.Tensor, aten.gt.Tensor),
        (aten.ge.Tensor, aten.gt.Tensor),
        (aten.gt.Tensor, aten.ge.Tensor),
        (aten.lt.Scalar, aten.gt.Scalar),
        (aten.eq.Scalar, aten.ne.Scalar),
    ),
}
# Arguments that are numbers of the computation, not axes: by position.
CONSTANTS = {
    aten.add.Tensor: (1,), aten.mul.Tensor: (1,), aten.div.Tensor: (1,), aten.sub.Tensor: (1,),
    aten.clamp_min.default: (1,), aten.clamp_max.default: (1,), aten.full.default: (1,),
    aten.pow.Tensor_Scalar: (1,), aten.pow.Scalar: (0,), aten.ge.Scalar: (1,),
    aten.lt.Scalar: (1,), aten.gt.Scalar: (1,), aten.le.Scalar: (1,), aten.eq.Scalar: (1,),
    aten.remainder.Scalar: (1,), aten.clamp.default: (1, 2), aten.rsub.Scalar: (1,),
}  # fmt: skip
AXES = {
    aten.amax.default: 1, aten.mean.dim: 1, aten.sum.dim_IntList: 1, aten.cumsum.default: 1,
    aten.topk.default: 2, aten.gather.default: 1,
}  # fmt: skip


def edits_of(node: fx.Node) -> Iterator[tuple[str, Edit]]:
    """Every edit that fits the node."""
    if node.op != "call_function" or node.target is aten.copy_.default:
        return
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return
    for name, pairs in EXCHANGED.items():
        for old, new in pairs:
            if node.target is old:
                yield name, _target(new)
    for i in CONSTANTS.get(node.target, ()):
        if (
            i < len(node.args)
            and isinstance(node.args[i], int | float)
            and node.args[i] is not True
        ):
            odd = node.target is aten.pow.Tensor_Scalar  # a root of odd powers is NaN of any sign
            other = node.args[i] + 2 if odd else _other(node.args[i])
            yield "another number", _argument(i, other)
    if node.target in AXES and isinstance(axis := node.args[AXES[node.target]], int | list):
        other = axis - 1 if isinstance(axis, int) else [a - 1 for a in axis]
        yield "another axis", _argument(AXES[node.target], other)
    if node.target is aten.slice.Tensor and len(node.args) > 3 and value.shape[node.args[1]] > 1:
        yield from _slices(node)
    if node.target is aten.cat.default and len(node.args[0]) > 1:
        yield "pieces in another order", _turned
    if node.target is aten.index_put.default:
        yield "accumulated", lambda g, n: setattr(n, "args", (*n.args[:3], True))
    operands = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and not unset(a)]
    if len(operands) > 1 and node.target not in COMMUTES:
        yield "operands exchanged", _swapped(*operands[-2:])
    if len(operands) > 1:
        for i in operands:
            yield "another tensor", _replaced(i)
    yield from _behind(value)


def unset(node: fx.Node) -> bool:
    """Memory that holds anything: what is made of it is no function of the inputs."""
    return node.op == "call_function" and "empty" in str(node.target)


COMMUTES = (aten.add.Tensor, aten.mul.Tensor, aten.minimum.default, aten.maximum.default)


def _slices(node: fx.Node) -> Iterator[tuple[str, Edit]]:
    _, dim, start, end, *step = node.args
    extent = node.args[0].meta["val"].shape[dim]
    if start > 0 and end > start:
        yield (
            "a slice one early",
            lambda g, n: setattr(
                n, "args", (n.args[0], dim, start - 1, min(end, extent) - 1, *step)
            ),
        )


def _behind(value: Tensor) -> Iterator[tuple[str, Edit]]:
    """Something done to the value before anybody reads it."""
    if value.is_complex():
        yield "conjugated", _after(aten.conj_physical.default)
    if value.dtype == torch.float32:
        yield "rounded", _cast(torch.bfloat16, torch.float32)
        yield "a factor near one", _after(aten.mul.Tensor, 1.0625)
    if value.dtype in (torch.bfloat16, torch.float16):
        yield "rounded", _cast(torch.float8_e4m3fn, value.dtype)
        yield "a factor near one", _after(aten.mul.Tensor, 1.0625)
    if value.is_floating_point() and value.element_size() > 1:
        yield "negated", _after(aten.neg.default)
        yield "absolute", _after(aten.abs.default)
    if value.dim() and value.shape[-1] > 1:
        yield "lanes rolled", _after(aten.roll.default, [1], [value.dim() - 1])
        if value.dtype != torch.float8_e4m3fn:  # a CPU has no flip of it
            yield "lanes reversed", _after(aten.flip.default, [value.dim() - 1])
    if value.dim() > 1 and value.shape[0] > 1:
        yield "rows rolled", _after(aten.roll.default, [1], [0])
    for i, j in itertools.combinations(range(value.dim()), 2):
        if value.shape[i] == value.shape[j] > 1:
            yield "axes exchanged", _exchanged(i, j)


def _other(number: Any) -> Any:
    return number + 1 if isinstance(number, int) else number * 1.5 + 0.001


def _target(new: Any) -> Edit:
    def edit(graph: fx.Graph, node: fx.Node) -> None:
        node.target = new

    return edit


def _argument(i: int, new: Any) -> Edit:
    return lambda graph, node: node.update_arg(i, new)


def _turned(graph: fx.Graph, node: fx.Node) -> None:
    node.update_arg(0, [*node.args[0][1:], node.args[0][0]])


def _swapped(i: int, j: int) -> Edit:
    def edit(graph: fx.Graph, node: fx.Node) -> None:
        a, b = node.args[i], node.args[j]
        node.update_arg(i, b)
        node.update_arg(j, a)

    return edit


def _replaced(i: int) -> Edit:
    """The operand, for the nearest earlier tensor of its shape and dtype."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        old = node.args[i].meta["val"]
        held = [n for n in _before(graph, node) if n is not node.args[i] and not unset(n)]
        for other in reversed(held):
            value = other.meta.get("val")
            if isinstance(value, Tensor) and (value.shape, value.dtype) == (old.shape, old.dtype):
                node.update_arg(i, other)
                return
        raise Void

    return edit


def _before(graph: fx.Graph, node: fx.Node) -> Iterator[fx.Node]:
    for n in graph.nodes:
        if n is node:
            return
        yield n


def _after(target: Any, *args: Any) -> Edit:
    return lambda graph, node: _insert(graph, node, (target, args, {}))


def _exchanged(i: int, j: int) -> Edit:
    """Two axes of one length, the value lying in memory as before."""
    steps = ((aten.transpose.int, (i, j), {}), (aten.clone.default, (), CONTIGUOUS))
    return lambda graph, node: _insert(graph, node, *steps)


CONTIGUOUS = {"memory_format": torch.contiguous_format}


def _cast(there: torch.dtype, back: torch.dtype) -> Edit:
    def edit(graph: fx.Graph, node: fx.Node) -> None:
        _insert(graph, node, *((aten._to_copy.default, (), {"dtype": d}) for d in (there, back)))

    return edit


def _insert(graph: fx.Graph, node: fx.Node, *steps: tuple[Any, tuple[Any, ...], Any]) -> None:
    """The steps behind the node, and all its readers behind them."""
    users, last = list(node.users), node
    for target, args, kwargs in steps:
        with graph.inserting_after(last):
            last = graph.call_function(target, (last, *args), kwargs)
    for user in users:
        user.replace_input_with(node, last)


class Void(Exception):
    """The edit does not apply, or not to a graph that runs."""


def edited(
    module: fx.GraphModule, node: fx.Node, edit: Edit
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of the graph with the edit made, and each node's copy. Raises Void."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    output = graph.graph_copy(module.graph, copies, return_output_node=True)
    graph.output(output[0])
    copy = fx.GraphModule(module, graph)
    try:
        edit(graph, copies[node])
        fakes = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
        mode = next(f.fake_mode for f in fakes if isinstance(f, Tensor))
        before = copies[node].meta["val"]
        FakeTensorProp(copy, mode).propagate_dont_convert_inputs(*fakes)
        graph.lint()
    except Exception as error:
        raise Void(str(error)) from error
    if isinstance(before, Tensor) and copies[node].meta["val"].shape != before.shape:
        raise Void("another shape")
    copy.recompile()
    return copy, copies
