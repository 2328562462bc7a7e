"""What a step launches: kernels by family on a GPU; on a CPU, the operations that it calls."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Figures = tuple[int, float]  # launches, ms
OURS, INDUCTOR, MATRIX = "dsv4fuse", "Inductor", "matrix products"
# The first family of which a name holds a word.
_WORDS = {
    MATRIX: ("gemm", "cutlass", "nvjet", "cublas", "grouped_mm", "bmm", "gemv", "aten::mm",
             "aten::addmm", "aten::matmul", "aten::linear", "aten::einsum"),
    "sort and top-k": ("sort", "topk", "TopK", "radix", "scan", "cub::", "bitonic"),
    "copies and fills": ("memcpy", "memset", "Memcpy", "Memset", "copy", "fill", "CatArray",
                         "aten::cat", "aten::clone"),
    "other ATen": ("at::native", "elementwise", "reduce", "index", "aten::"),
}  # fmt: skip
_LONGEST = 120  # characters of a name that are kept: those of templates fill a page


@cache
def kernel_names() -> frozenset[str]:
    """The Triton functions of kernels/. Ours is what bears one of these names and nothing else:
    ATen and CUTLASS have names that end in ``_kernel`` too."""
    package = importlib.import_module("dsv4fuse.kernels")
    stems = [m.name for m in pkgutil.iter_modules(package.__path__)]
    names = set()
    for stem in stems:
        with contextlib.suppress(ImportError):  # without Triton nothing is launched
            values = vars(importlib.import_module(f"dsv4fuse.kernels.{stem}")).values()
            names |= {v.fn.__name__ for v in values if type(v).__module__.startswith("triton.")
                      and hasattr(v, "fn")}  # fmt: skip
    return frozenset(names)


def family(name: str) -> str:
    """The family of a kernel or an operation.

    What Inductor writes is named after the operations in it (``triton_poi_fused_bmm_add``), so
    its names are told by how they begin; its templates are matrix products.
    """
    if name.startswith("triton_"):
        return MATRIX if name.startswith("triton_tem") else INDUCTOR
    if name.startswith("dsv4fuse::") or re.sub(r"_\d+$", "", name) in kernel_names():
        return OURS
    return next((f for f, words in _WORDS.items() if any(w in name for w in words)), "other")


def multiplying_or_ours() -> frozenset[str]:
    """Words of which one is in the name of each matrix product's kernel and of each of ours."""
    products = {word for word in _WORDS[MATRIX] if not word.startswith("aten::")}
    ours = {name for name in kernel_names() if name.endswith("_kernel")}
    return frozenset({*products, "triton_tem", *ours})


def families(kernels: Mapping[str, Figures]) -> dict[str, Figures]:
    """The sums of each family, the slowest first."""
    return _summed((family(name), figures) for name, figures in kernels.items())


def launched(call: Callable[[], Any], on_gpu: bool) -> dict[str, Figures]:
    """Launches and ms by name in one call; on a CPU the operations that no other one called."""
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    if on_gpu:
        return _summed(
            (event.key[:_LONGEST], (event.count, event.self_device_time_total / 1e3))
            for event in seen.key_averages()
            if event.device_type != torch.autograd.DeviceType.CPU
        )
    events = (event for event in seen.events() if _operation(event) and not _inside(event))
    return _summed((event.name, (1, event.cpu_time_total / 1e3)) for event in events)


def _operation(event: Any) -> bool:
    return event.name.startswith(("aten::", "dsv4fuse::"))


def _inside(event: Any) -> bool:
    """Was it called by another operation?"""
    while (event := event.cpu_parent) is not None:
        if _operation(event):
            return True
    return False


def _summed(found: Iterable[tuple[str, Figures]]) -> dict[str, Figures]:
    totals: dict[str, Figures] = {}
    for name, (count, ms) in found:
        before = totals.get(name, (0, 0.0))
        totals[name] = (before[0] + count, before[1] + ms)
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))
