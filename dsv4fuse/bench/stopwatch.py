"""Times of a call as its user has them: wall clock, the device waited for; and as a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

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
