"""Integers of a known range: fewer bits to sort by on a GPU, and comparisons that are settled."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dsv4fuse import backend

from .spellings.known_range import SPELLINGS
from .test_host_sync import reports

aten = torch.ops.aten
SORTS = (aten.sort.default, aten.sort.stable)


def sort_of(fn, *inputs, device="cuda", **more):
    """The dtype that is sorted in the graph behind the pass, on a pretended GPU."""
    report, (graph,) = reports(fn, *inputs, device=torch.device(device), **more)
    (node,) = (n for n in graph.nodes if n.target in SORTS)
    return node.args[0].meta["val"].dtype, report


@pytest.mark.parametrize(
    "experts, dtype",
    [(256, torch.uint8), (257, torch.int16), (1 << 15, torch.int16), (1 << 16, torch.int32)],
)
def test_as_many_bits_as_it_takes(experts, dtype):
    def fn(s):
        ids, order = s.topk(6).indices.flatten().sort()
        return ids + 1, order

    found, report = sort_of(fn, torch.empty(100, experts))
    assert found == dtype and report.counts() == {"known_range": 1}, str(report)
    assert f"{8 * dtype.itemsize} bits" in report.sites[0].reason


@pytest.mark.parametrize("how", [dict(stable=True), dict(descending=True), dict(dim=0), {}])
def test_any_sort(how):
    found, _ = sort_of(lambda s: torch.sort(s.topk(6).indices.flatten(), **how)[1],
                       torch.empty(100, 64))  # fmt: skip
    assert found == torch.uint8


@pytest.mark.parametrize(
    "fn, rows, device",
    [
        (lambda s: s.topk(6).indices.flatten().sort()[1], 85, "cuda"),  # Inductor's own
        (lambda s: s.topk(6).indices.flatten().sort()[1], 100, "cpu"),
        (lambda s: (s.topk(6).indices.flatten() - 1).sort()[1], 100, "cuda"),
        (lambda s: s.topk(6).indices.flatten().mul(2).sort()[1], 100, "cuda"),
    ],
    ids=["few", "CPU", "negative", "twice as large"],
)
def test_sorted_as_it_is(fn, rows, device):
    found, report = sort_of(fn, torch.empty(rows, 64), device=device)
    assert found == torch.int64 and report.counts() == {}


def test_as_many_bits_as_it_has():
    found, _ = sort_of(lambda s: s.topk(6).indices.flatten().to(torch.uint8).sort()[1],
                       torch.empty(100, 64))  # fmt: skip
    assert found == torch.uint8


def test_how_many_there_are_is_a_symbol():
    found, report = sort_of(lambda s: s.topk(6).indices.flatten().sort()[1],
                            torch.empty(100, 64), dynamic=True)  # fmt: skip
    assert found == torch.int64 and report.counts() == {}


def test_no_mask_is_left():
    """Of transformers' experts: nothing reads the comparison."""
    case = SPELLINGS["sorted"]
    report, (graph,) = reports(case.build(), *case.inputs(), device="cpu")
    assert report.counts() == {"known_range": 1}
    assert aten.ge.Scalar not in {n.target for n in graph.nodes}


@pytest.mark.gpu
@pytest.mark.parametrize("experts, launches", [(256, 1), (384, 2), (100_000, 4)])
def test_sorted_alike_in_fewer_launches(experts, launches):
    """Stable or not: equal numbers are where int64 has them. torch sorts 8 bits a launch."""
    def fn(s):
        ids, order = s.topk(6).indices.flatten().sort()
        return ids, order, s.flatten()[: ids.shape[0]].masked_fill(ids >= experts, 0.0)

    s = torch.randn(2048, experts, device="cuda")
    options = {"expect": {"known_range": 2}}
    compiled = torch.compile(fn, backend=backend.dsv4fuse, options=options, fullgraph=True)
    assert all(map(torch.equal, compiled(s), fn(s)))
    found = []
    for call in (fn, compiled):
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call(s)
            torch.cuda.synchronize()
        found.append(sum(e.count for e in seen.key_averages() if "SortOnesweep" in e.key))
    assert found == [8, launches], found
