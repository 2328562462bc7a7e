"""Times of a call as its user has them: wall clock, the device waited for; as a CUDA graph; and
where those of compiling went."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import compilation_time_metrics

from dsv4fuse import compat

CALLS, WARM_UP = 20, 3


def milliseconds(call: Callable[[], Any], on_gpu: bool, patience: float = 5.0) -> float:
    """Median time of a call, after three calls that do not count; 20 calls, or fewer once they
    have taken ``patience`` seconds."""
    for _ in range(WARM_UP):
        call()
    taken: list[float] = []
    while len(taken) < CALLS and sum(taken) < patience:
        taken.append(seconds(call, on_gpu)[0])
    return 1e3 * statistics.median(taken)


def seconds(call: Callable[[], Any], on_gpu: bool) -> tuple[float, Any]:
    """The time of one call, and what it returned."""
    wait(on_gpu)
    started = time.perf_counter()
    result = call()
    wait(on_gpu)
    return time.perf_counter() - started, result


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as a CUDA graph. What the call reads must stay where it is; RuntimeError where
    something in it waits for the GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with compat.capturing(), torch.cuda.graph(graph):
        call()
    return graph.replay


def wait(on_gpu: bool) -> None:
    """Until the GPU has done what it was given."""
    if on_gpu:
        torch.cuda.synchronize()


def compile_seconds() -> dict[str, float]:
    """Where the seconds of all compiling in this process went, by torch's own clocks; a pass like
    ours is among those of the joint graph."""
    clocks = {name: sum(seconds) for name, seconds in compilation_time_metrics.items()}
    frames, backend, joint, inner, kernels = (clocks.get(name, 0.0) for name in (
        "_compile.compile_inner", "OutputGraph.call_user_compiler",
        "_recursive_joint_graph_passes", "compile_fx_inner", "async_compile.wait",
    ))  # fmt: skip
    return {
        "Dynamo": frames - backend,
        "AOTAutograd": max(0.0, backend - joint - inner),
        "joint graph's passes": joint,
        "Inductor": inner - kernels,
        "waiting for its kernels": kernels,
    }
