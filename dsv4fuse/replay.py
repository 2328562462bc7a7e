"""What a call takes under a CUDA graph, where nothing is waited for but the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

REPLAYS = 9


def times(call: Callable[[], object], *, span: float, most: int) -> list[float]:
    """µs of a call in each replay of a graph with as many calls as take ``span`` µs, at most
    ``most``; RuntimeError for what no graph holds, as it waits for the host.

    Triton's ``do_bench_cudagraph`` counts by what launching takes: of short calls there were a few
    hundred or a few dozen, as the host was free, and what a replay costs is shared among them.
    """
    return of(call, max(1, min(most, int(span / min(of(call, 1))))))


def of(call: Callable[[], object], count: int) -> list[float]:
    """µs of one of ``count`` calls in a graph, for each replay but the first."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    found = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end) / count)
    return found
