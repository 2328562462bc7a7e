"""A top-k is not sorted where its order shows nowhere; on a GPU that spares the sort."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from dsv4fuse import Report, backend
from dsv4fuse.backend import collecting
from examples import models

from .spellings.unsorted_topk import SPELLINGS, K, inputs, mask, seen
from .test_host_sync import reports

aten = torch.ops.aten


def topk(graph):
    return [n for n in graph.nodes if n.target is aten.topk.default]


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


def left(fn, *inputs):
    """What is called in the graph when the sites are fused."""
    report, (graph,) = reports(fn, *inputs, device="cpu")
    assert report.counts() == {"unsorted_topk": 1}, str(report)
    return {n.target for n in graph.nodes if n.op == "call_function"}


def test_no_scores_where_all_are_chosen():
    def all_of(x, w, k):
        return x.new_zeros(5, 13).scatter(1, (x @ w).relu().topk(k).indices, 1.0)

    x, w = torch.randn(5, 7), torch.randn(7, 13)
    made = {aten.mm.default, aten.relu.default, aten.topk.default}
    assert not left(lambda x, w: all_of(x, w, 13), x, w) & made
    assert left(lambda x, w: all_of(x, w, 12), x, w) >= made


def test_one_number():
    def fn(x):
        return torch.zeros((), dtype=torch.bool).scatter(0, x.topk(1).indices, True)

    report, _ = reports(fn, torch.tensor(3.0), device="cpu")
    assert report.counts() == {}


@pytest.mark.parametrize("make", [models.hf, models.plain])
def test_a_short_prompt_has_no_indexer(make):
    """16 tokens have four entries, of which an indexer of the tiny models chooses four."""
    model, args, kwargs = make(length=16)
    report = Report()
    with torch.no_grad(), collecting(report):
        wanted = model(*args, **kwargs)
        made = torch.compile(model, backend=backend.dsv4fuse, options={"inner": "eager"})(
            *args, **kwargs
        )
    names = {site.fusion for site in report.sites}
    assert report.counts()["unsorted_topk"] == 2 and "indexer_logits" not in names, str(report)
    for a, b in zip(tree_leaves(wanted), tree_leaves(made), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


def test_scores_that_are_read_stay():
    def fn(x, w):
        scores = x @ w
        return scores.scatter(1, (scores + 1).topk(13).indices, 1.0), scores.sum()

    found = left(fn, torch.randn(5, 7), torch.randn(7, 13))
    assert aten.mm.default in found and not found & {aten.add.Tensor, aten.topk.default}


def test_random_numbers_are_drawn():
    """What is drawn behind them is what it was."""
    def fn(x):
        at = (x + torch.rand_like(x)).topk(13).indices
        return torch.zeros_like(x).scatter(1, at, 1.0), torch.rand_like(x)

    options = {"inner": "eager", "expect": {"unsorted_topk": 1}}
    results = []
    for call in (fn, torch.compile(fn, backend="dsv4fuse", options=options)):
        torch.manual_seed(0)
        results.append(call(torch.ones(5, 13)))
    assert all(map(torch.equal, *results))


def test_all_by_a_symbol_are_made():
    """How many there are is known to the graph as a symbol: they are not sorted."""
    def fn(s):
        return torch.zeros_like(s).scatter(1, s.topk(s.shape[1], dim=1).indices, 1.0)

    options = {"inner": "eager", "expect": {"unsorted_topk": 1}}
    compiled = torch.compile(fn, backend="dsv4fuse", dynamic=True, options=options)
    for n in (13, 17):
        s = torch.randn(3, n)
        assert torch.equal(compiled(s), fn(s))


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
