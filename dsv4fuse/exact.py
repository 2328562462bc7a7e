"""A region run with little memory, in exact arithmetic (fp64), and how much memory a run needs."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from dsv4fuse import compat
from dsv4fuse.views import VIEWS

aten, prims = torch.ops.aten, torch.ops.prims
CASTS = (prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype)
SPARE = 0.8  # the part of the free memory that a check may take


def run(
    region: Iterable[fx.Node], env: dict[fx.Node, Any], keep: Iterable[fx.Node],
    step: Callable[[fx.Node, Any, Any], Any] | None = None,
) -> dict[fx.Node, Any]:  # fmt: skip
    """The nodes of a region by their own targets; a value goes after its last use."""
    region, step = list(region), step or (lambda n, args, kwargs: n.target(*args, **kwargs))
    last = {source: node for node in region for source in node.all_input_nodes}
    kept = set(keep)
    for node in region:
        args = fx.node.map_arg(node.args, env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
        env[node] = step(node, args, kwargs)
        for source in node.all_input_nodes:
            if last[source] is node and source not in kept:
                del env[source]
    return env


def truth(
    region: Iterable[fx.Node], env: dict[fx.Node, Any], keep: Iterable[fx.Node]
) -> dict[fx.Node, Any]:
    """The same in fp64 from the same inputs: nothing is rounded to a narrower float on the way."""
    return run(region, {n: _wide(v) for n, v in env.items()}, keep, _exactly)


def _exactly(node: fx.Node, args: Any, kwargs: Any) -> Any:
    floating = isinstance(args[0], Tensor) and args[0].is_floating_point() if args else False
    value = node.meta["val"]
    if node.target is aten.view.dtype:  # bytes are those of the dtype that is viewed
        args = (args[0].to(node.args[0].meta["val"].dtype), *args[1:])
    if node.target in CASTS and floating and value.dtype.is_floating_point:
        return args[0]
    return _wide(node.target(*args, **{**kwargs, **_summed_wide(kwargs)}))


def _summed_wide(kwargs: dict[str, Any]) -> dict[str, Any]:
    dtype = kwargs.get("dtype")
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return {"dtype": torch.float64} if floating else {}


def _wide(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_wide(v) for v in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def fits(
    region: list[fx.Node], leaves: Iterable[fx.Node], device: torch.device, wide: bool
) -> bool:
    """Does a run of the region (wide: in fp64) fit into the device's free memory?"""
    return _peak(region, leaves, wide) <= SPARE * _free(device)


def _peak(region: list[fx.Node], leaves: Iterable[fx.Node], wide: bool) -> int:
    """Bytes held at most at a time. A view is nothing and holds its base to the end."""
    last = {source: i for i, node in enumerate(region) for source in node.all_input_nodes}
    held = most = sum(_bytes(n, wide) for n in leaves)
    shown = {n.all_input_nodes[0] for n in region if n.target in VIEWS and n.all_input_nodes}
    for i, node in enumerate(region):
        held += 0 if node.target in VIEWS else _bytes(node, wide)
        most = max(most, held)
        for source in node.all_input_nodes:
            if last[source] == i and source in region and source not in shown:
                held -= 0 if source.target in VIEWS else _bytes(source, wide)
    return most


def _bytes(node: fx.Node, wide: bool) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    count = math.prod(compat.hint(n) if isinstance(n, torch.SymInt) else n for n in value.shape)
    return count * (8 if wide and value.is_floating_point() else value.element_size())


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(v.split()[1]) << 10 for v in lines if v.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: let the run itself say
        return 1 << 62
