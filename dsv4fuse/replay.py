"""What a call takes under a CUDA graph, where nothing is waited for but the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

REPLAYS = 9
SHORT = 50  # of calls that take the span together, or more, each is short


def times(
    call: Callable[[], object], *, span: float, most: int, graphs: int = 1, warm: float = 0.0
) -> list[float]:
    """µs of a call in each replay of a graph with as many calls as take ``span`` µs, at most
    ``most``; RuntimeError for what no graph holds, as it waits for the host.

    Triton's ``do_bench_cudagraph`` counts by what launching takes: of short calls there were a few
    hundred or a few dozen, as the host was free, and what a replay costs is shared among them.

    graphs: so many of them, if calls are short. Where a graph's results lie in memory makes up to
    7 % of what they take; each has a place of its own. warm: µs of replays that do not count, if
    calls are long, until a GPU that multiplies has the clock that it keeps.
    """
    count = max(1, min(most, int(span / min(of(call, 1)))))
    return of(call, count, graphs) if count >= SHORT else of(call, count, warm=warm)


def of(
    call: Callable[[], object], count: int, graphs: int = 1, warm: float = 0.0
) -> list[float]:
    """µs of one of ``count`` calls in each of some graphs, for each replay behind the ``warm``."""
    call()
    torch.cuda.synchronize()
    made = [_captured(call, count) for _ in range(graphs)]
    for graph in made:
        graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    while 1e6 * (time.perf_counter() - started) < warm:
        made[0].replay()
        torch.cuda.synchronize()
    found = []
    for number in range(-(-REPLAYS // graphs) * graphs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        made[number % graphs].replay()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end) / count)
    return found


def _captured(call: Callable[[], object], count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph
