"""A top-k is not sorted where its order shows nowhere; on a GPU that spares the sort."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dsv4fuse import backend

from .spellings.unsorted_topk import SPELLINGS, K, inputs, mask, seen
from .test_host_sync import reports


def topk(graph):
    return [n for n in graph.nodes if n.target is torch.ops.aten.topk.default]


@pytest.mark.parametrize(
    "name, dim, largest",
    [("a mask", -1, True), ("behind a threshold", -1, True), ("two masks", -1, True),
     ("the first axis", 1, True), ("the least", -1, False)],
)  # fmt: skip
def test_the_graph_asks_for_no_order(name, dim, largest):
    report, (graph,) = reports(SPELLINGS[name].build(), *inputs(), device="cpu")
    assert report.counts() == {"unsorted_topk": 1}, str(report)
    (args,) = (n.args[2:] for n in topk(graph))
    assert args == (dim, largest, False) and type(args[1]) is bool


def test_nothing_is_left_to_do():
    report, (graph,) = reports(lambda s, n: mask(s.topk(K, sorted=False).indices), *inputs(),
                               device="cpu")  # fmt: skip
    assert report.counts() == {} and [n.args[4] for n in topk(graph)] == [False]


def test_as_many_as_a_symbol_says():
    """The number of entries, and how many of them are chosen."""
    def fn(s):
        at = s.topk(min(6, s.shape[1]), dim=1).indices
        return s.new_zeros(s.shape).scatter(1, at, 1.0)

    options = {"inner": "eager", "expect": {"unsorted_topk": 1}}
    compiled = torch.compile(fn, backend="dsv4fuse", dynamic=True, options=options)
    for n in (13, 17, 4):
        s = torch.randn(3, n)
        assert torch.equal(compiled(s), fn(s))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [13, 500, 5000])
def test_the_same_are_chosen_without_a_sort(length):
    """Among equals too: torch chooses first and sorts then."""
    def fn(s, limit):
        at = torch.where((at := s.topk(6).indices) < limit, at, length)
        return s.new_zeros(7, length + 1).scatter(-1, at, 1.0)

    s, limit = torch.randn(7, length, device="cuda").mul(3).round(), length - 2
    options = {"expect": {"unsorted_topk": 1}}
    compiled = torch.compile(fn, backend=backend.dsv4fuse, options=options, fullgraph=True)
    assert torch.equal(compiled(s, limit), fn(s, limit))
    launched = []
    for call in (fn, compiled):
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call(s, limit)
            torch.cuda.synchronize()
        launched.append([e.key for e in found.key_averages() if "ort" in e.key])
    assert launched[0] and not launched[1], launched


def test_equal_scores():
    s = torch.zeros(2, 5, 13)
    compiled = torch.compile(seen, backend="dsv4fuse", options={"inner": "eager"})
    limit = torch.full((2, 5), 9)
    assert torch.equal(compiled(s, limit), seen(s, limit))
