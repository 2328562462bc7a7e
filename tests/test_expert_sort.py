"""Pairs sorted by expert: what the pass leaves of a graph, on a pretended GPU and on a real one."""

from __future__ import annotations

import operator

import pytest
import torch
from dsv4fuse.kernels import _common as common

from dsv4fuse import backend
from dsv4fuse.bench.launches import launched
from dsv4fuse.fusion import Sizes, registry

from .spellings.expert_sort import SPELLINGS, E, compared, inverse, offsets
from .test_host_sync import reports

aten = torch.ops.aten
SORTED = {aten.sort.default, aten.sort.stable, aten.histc.default, aten.cumsum.default,
          aten.index_put.default, aten.searchsorted.Tensor}  # fmt: skip


def targets(graph):
    return {n.target for n in graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("name", ["transformers", "plain", "transformers: of a choice"])
def test_nothing_of_it_is_left(name):
    case = SPELLINGS[name]
    _, (graph,) = reports(case.build(), *case.inputs(), device="cpu", select="always")
    assert not targets(graph) & SORTED and torch.ops.dsv4fuse.expert_sort.default in targets(graph)


def test_rather_than_a_sort_of_fewer_bits(monkeypatch):
    """Both find the sort; on a GPU a longer one is sorted by fewer bits where this is declined."""
    monkeypatch.setattr(common, "use_reference", lambda _: True)  # no GPU to launch anything on

    def fn(s):
        best, chosen = s.topk(6)
        ids, order = chosen.flatten().sort()
        return order, offsets(ids, 64, high=63), best.flatten().masked_fill(ids >= 64, 0.0)

    found = [reports(fn, torch.empty(100, 64), select="always", exclude=names)[0].counts()
             for names in ([], ["expert_sort"])]  # fmt: skip
    assert found == [{"expert_sort": 1, "known_range": 1}, {"known_range": 2}]


def test_what_leaves_twice_is_two_tensors():
    """Whoever writes into one of them does not change the other."""
    def fn(ids):
        order = ids.argsort(stable=True)
        return order.argsort(), inverse(order), compared(ids).cumsum(0)

    options = {"select": "always", "inner": "eager", "expect": {"expert_sort": 1}}
    ids = torch.arange(12) % E
    first, second, _ = torch.compile(fn, backend=backend.dsv4fuse, options=options)(ids)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_too_many_experts_are_declined():
    def fn(ids):
        held, order = ids.sort()
        return order, torch.searchsorted(held, torch.arange(1025), right=True)

    report, _ = reports(fn, torch.zeros(9, dtype=torch.int64), device="cpu", select="always")
    (site,) = report.with_status("declined")
    assert "1025 experts are not 1 to 1024" in site.reason


@pytest.mark.parametrize(
    "fn, width",
    [
        # A sort of fewer bits makes the order alone in as few launches.
        (lambda s: s.topk(2).indices.flatten().sort()[1], 8),
        (lambda s: s.topk(2).indices.flatten().argsort().argsort(), 8),
        (lambda s: inverse(s.topk(2).indices.flatten().argsort() * 1), 8),
        # Indices of entries, not of experts: nothing is to be said of them.
        (lambda s: (lambda o: (o, inverse(o)))(s.topk(2).indices.flatten().argsort()), 1025),
    ],
    ids=["order", "ranks", "made of the order", "many"],
)
def test_no_site(fn, width):
    report, _ = reports(fn, torch.empty(9, width), device="cpu", select="always")
    assert not report.sites, str(report)


@pytest.mark.parametrize("variant", ["histc", "searchsorted"])
def test_examples(variant):
    torch.manual_seed(0)
    made = registry()["expert_sort"].examples[variant](9, Sizes(experts=E, top_k=3), "cpu")
    options = {"select": "always", "inner": "eager", "expect": {"expert_sort": 1}}
    fused = torch.compile(made.fn, backend=backend.dsv4fuse, options=options)
    assert all(map(torch.equal, fused(*made.inputs), made.fn(*made.inputs)))
    report, (graph,) = reports(made.fn, *made.inputs, device="cpu", select="always")
    (op,) = (n for n in graph.nodes if n.target is torch.ops.dsv4fuse.expert_sort.default)
    assert {n.args[1] for n in op.users if n.target is operator.getitem} == {0, 1, 2, 3}


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["histc", "searchsorted"])
@pytest.mark.parametrize("tokens", [1, 4, 2048])
def test_one_launch(variant, tokens):
    made = registry()["expert_sort"].examples[variant](tokens, Sizes(), "cuda")
    options = {"select": "always", "expect": {"expert_sort": 1}}
    compiled = torch.compile(made.fn, backend=backend.dsv4fuse, options=options, fullgraph=True)
    assert all(map(torch.equal, compiled(*made.inputs), made.fn(*made.inputs)))
    found = launched(lambda: compiled(*made.inputs), on_gpu=True)
    assert {name: count for name, (count, _) in found.items()} == {"expert_sort_kernel": 1}
