"""Graphs of fused ops: as text, to compare two, and what torch reads that their launches write."""

from __future__ import annotations

from typing import Any

from dsv4fuse.kernels._stores import written
from torch import Tensor, fx
from torch._higher_order_ops import triton_kernel_wrap as wrap
from torch.utils._pytree import tree_map

from dsv4fuse import accesses

NAME = next(n for n in accesses.ANSWERS if hasattr(wrap, n))
READ = getattr(wrap, NAME)  # torch's own, before it is told what to answer


def shown(graph: fx.Graph) -> list[str]:
    """Of each node what it does and what is known of its value: shape, strides, dtype, device, and
    the first node that has the same storage."""
    names: dict[fx.Node, str] = {}
    homes: dict[int, str] = {}
    lines = []

    def value(v: object) -> object:
        if not isinstance(v, Tensor):
            return v
        home = homes.setdefault(v.untyped_storage()._cdata, names[node])
        return f"{v.dtype} {tuple(v.shape)} {v.stride()} {v.storage_offset()} {v.device} in {home}"

    for i, node in enumerate(graph.nodes):
        names[node] = f"%{i}"
        kwargs = dict(node.kwargs)
        if "constant_args_idx" in kwargs:  # each trace has a number of its own
            kwargs["constants"] = repr(constants(node))
            del kwargs["constant_args_idx"]
        args = fx.map_arg((node.args, kwargs), names.__getitem__)
        known = tree_map(value, node.meta.get("val"))
        lines.append(f"{names[node]} {node.op} {node.target} {args} {known}")
    return lines


def constants(node: fx.Node) -> dict[str, Any]:
    """Those of a launch."""
    return wrap.kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])


def launches(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is wrap.triton_kernel_wrapper_functional]


def misreadings(graph: fx.Graph) -> list[str]:
    """The launches of kernels that do not say what they write, or of which torch would read that
    they write something else."""
    found = []
    for node in launches(graph):
        kernel = wrap.kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        given = fx.map_arg(node.kwargs["kwargs"], lambda n: n.meta["val"]) | constants(node)
        if written(kernel, given) is None:
            found.append(f"{node.name} does not say")
        read, told = (_names(ask(kernel, dict(given), {}), given)
                      for ask in (READ, getattr(wrap, NAME)))  # fmt: skip
        if read != told:
            found.append(f"{node.name}: {sorted(read)}, and it is told {sorted(told)}")
    return found


def _names(found: Any, given: dict[str, Any]) -> set[str]:
    """An answer as names of tensors: some versions count numbers in."""
    found = [d.name for d in found.read_writes.writes] if hasattr(found, "read_writes") else found
    return {n for n in found if isinstance(given[n], Tensor)}
