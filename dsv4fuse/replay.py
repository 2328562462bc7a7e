"""What a call takes under a CUDA graph, where nothing is waited for but the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
REPLAYS = 9
SHORT = 50  # of calls that take the span together, or more, each is short


def times(
    call: Call, *, span: float, most: int, others: Callable[[], Sequence[Call]] = tuple,
    warm: float = 0.0,
) -> list[float]:  # fmt: skip
    """µs of a call in each replay of a graph with as many calls as take ``span`` µs, at most
    ``most``; RuntimeError for what no graph holds, as it waits for the host.

    Triton's ``do_bench_cudagraph`` counts by what launching takes: of short calls there were a few
    hundred or a few dozen, as the host was free, and what a replay costs is shared among them.

    others: the same call of other inputs, asked for if calls are short; each has a graph, too.
    Where inputs and results lie in memory makes up to 20 % of what a short call takes. warm: µs of
    replays that do not count, if calls are long, until a GPU that multiplies has the clock that it
    keeps.
    """
    count = max(1, min(most, int(span / min(of([call], 1)))))
    return of([call, *others()], count) if count >= SHORT else of([call], count, warm)


def of(calls: Sequence[Call], count: int, warm: float = 0.0) -> list[float]:
    """µs of one of ``count`` times the same call, of each in a graph of its own, for each replay
    behind the ``warm``; as many of one graph as of another."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    made = [_captured(call, count) for call in calls]
    for graph in made:
        graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    while 1e6 * (time.perf_counter() - started) < warm:
        made[0].replay()
        torch.cuda.synchronize()
    found = []
    for number in range(-(-REPLAYS // len(made)) * len(made)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        made[number % len(made)].replay()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end) / count)
    return found


def _captured(call: Call, count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph
