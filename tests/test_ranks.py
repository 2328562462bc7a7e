"""What ranks agree on: the first answer counts, nobody waits, and a warm cache is asked too."""

from __future__ import annotations

import operator
import threading

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import dsv4fuse
from dsv4fuse import backend, cache, measure, ranks, trial, verify
from dsv4fuse.fusion import Candidate, Sizes, registry

SIZES = Sizes(inter=128)


@pytest.fixture(params=["hash", "file", "tcp"])
def store(request, tmp_path, monkeypatch):
    made = {
        "hash": lambda: dist.HashStore(),
        "file": lambda: dist.FileStore(str(tmp_path / "store"), 2),
        "tcp": lambda: dist.TCPStore("localhost", 0, 1, True),
    }[request.param]()
    joined(monkeypatch, made)
    return made


@pytest.fixture(autouse=True)
def _fresh_warnings():
    ranks._warn.cache_clear()


def joined(monkeypatch, store):
    """This process as one of two ranks. The other ones are played by whoever writes to store."""
    monkeypatch.setattr(ranks, "several", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)


@pytest.fixture
def job(monkeypatch, tmp_path):
    """One rank of a job, with a cache of its own and no memory of what was timed before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(dsv4fuse.verify, "_verified", {})

    def start(store, inductor: float, ours: float):
        answers = [inductor, ours]
        joined(monkeypatch, store)
        monkeypatch.setattr(measure, "_known", {})
        monkeypatch.setattr(cache, "load_times", lambda key: None)  # the caches of two machines
        monkeypatch.setattr(measure, "_time", lambda fn, inputs: answers.pop(0))
        torch._dynamo.reset()
        return answers

    return start


def explained():
    made = registry()["clamp_swiglu_quant"].examples["plain"](3, SIZES, "cpu")
    with torch.no_grad():
        report = dsv4fuse.explain(made.fn, *made.inputs, options={"select": "measure"})
    return report.sites[0]


def test_the_first_answer_is_everybodys(store):
    assert not ranks.known("site")
    assert ranks.agreed("site", {"times": [1.5, 2.25]}) == {"times": [1.5, 2.25]}
    assert ranks.known("site")
    assert ranks.agreed("site", {"times": None}) == {"times": [1.5, 2.25]}
    assert ranks.agreed("another", None) is None
    assert ranks.agreed("another", "x") is None, "null is an answer too"


def test_ranks_that_answer_at_once_agree(monkeypatch):
    joined(monkeypatch, dist.HashStore())
    found, gate = [], threading.Barrier(8)

    def rank(number):
        gate.wait()
        found.append(ranks.agreed("site", number))

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 8 and len(set(found)) == 1


def test_alone_there_is_nobody_to_ask(monkeypatch):
    def broken():
        raise AssertionError("nobody is to be asked")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", broken)
    assert ranks.agreed("site", 3) == 3 and not ranks.known("site")


def test_without_its_store_a_rank_decides_for_itself(monkeypatch, caplog):
    class Gone:
        def compare_set(self, *_):
            raise RuntimeError("connection refused")

    joined(monkeypatch, Gone())
    assert ranks.agreed("site", 3) == 3 and not ranks.known("site")
    assert "connection refused" in caplog.text


def test_a_rank_takes_what_another_one_timed(job):
    """The second rank would have found otherwise; it does not even look."""
    store = dist.HashStore()
    job(store, 10.0, 2.5)
    first = explained()
    unasked = job(store, 2.5, 10.0)
    second = explained()
    assert first.status == second.status == "taken" and first.reason == second.reason
    assert unasked == [2.5, 10.0]
    job(dist.HashStore(), 2.5, 10.0)
    assert explained().status == "declined", "another job asks anew"


def test_a_site_is_the_same_on_every_ranks_gpu():
    """Whose numbers differ, in values, inside of lists of them, and in what makes tensors there."""

    def of(gpu: str) -> object:
        graph, device = fx.Graph(), torch.device(gpu)
        with FakeTensorMode():
            value = torch.empty(4, 8, device="meta")
        value.fake_device = device
        x = graph.placeholder("x")
        rows = graph.call_function(torch.ops.aten.split.Tensor, (x, 2))
        part = graph.call_function(operator.getitem, (rows, 0))
        ones = graph.call_function(torch.ops.aten.ones.default, ([2, 8],), {"device": device})
        out = graph.call_function(torch.ops.aten.mul.Tensor, (part, ones))
        for node, val in ((x, value), (rows, [value, value]), (part, value), (ones, value)):
            node.meta["val"] = val
        site = Candidate("f", out, [x], [out], lambda *_: [])
        return verify.signature(site, [rows, part, ones, out])

    assert of("cuda:0") == of("cuda:1") != of("cpu")


def test_a_rank_whose_kernel_is_wrong_leaves_the_site_alone(job, monkeypatch):
    store = dist.HashStore()
    job(store, 10.0, 2.5)
    assert explained().status == "taken"
    job(store, 10.0, 2.5)
    monkeypatch.setattr(dsv4fuse.verify, "check", lambda *_: "It differs.")
    assert explained().status == "rejected"
    monkeypatch.setattr(dsv4fuse.verify, "check", lambda *_: dsv4fuse.verify.NO_MEMORY)
    torch._dynamo.reset()
    assert explained().status == "taken", "another rank had the memory to check it"


def test_what_a_warm_cache_holds_is_the_jobs_choice_or_compiled_again(job):
    """Rank 0 finds its graph in a cache from an earlier job, where the site was taken. It says so
    to a rank that comes later, and bows to one that was first."""
    job(dist.HashStore(), 10.0, 2.5)
    record = explained().detail["found"]
    later = dist.HashStore()
    job(later, 2.5, 10.0)
    assert not trial.stale([record])
    assert explained().status == "taken"
    earlier = dist.HashStore()
    job(earlier, 2.5, 10.0)
    assert explained().status == "declined"
    assert trial.stale([record])


def test_the_bare_pass_is_not_cached_where_another_rank_may_time_otherwise(monkeypatch):
    alone = dsv4fuse.inductor_pass().uuid()
    joined(monkeypatch, dist.HashStore())
    assert alone is not None and dsv4fuse.inductor_pass().uuid() is None
    assert dsv4fuse.inductor_pass({"select": "always"}).uuid() is not None
    assert backend.FusionPass(backend.parse(None), alone=False).uuid() == alone


@pytest.mark.slow
def test_a_stale_graph_is_not_run(job, monkeypatch):
    """The whole way: Inductor's cache is warm with a graph that took the site, another rank of
    this job left it, so the graph is compiled again; the cache's own report stays."""
    made = registry()["clamp_swiglu_quant"].examples["plain"](3, SIZES, "cpu")

    def compiled(store):
        job(store, 10.0, 2.5)
        holder = torch.nn.Module()
        holder.register_buffer("gate", made.inputs[0].clone())
        run = torch.compile(
            made.fn, backend=backend.dsv4fuse, options={"select": "measure"}, fullgraph=True
        )
        with torch.no_grad():
            run(holder.gate, *made.inputs[1:])
        (site,) = dsv4fuse.Report.of(holder).sites
        return site

    first = compiled(dist.HashStore())
    assert first.status == "taken"
    other = dist.HashStore()
    joined(monkeypatch, other)
    ranks.agreed(first.detail["found"]["key"], {**first.detail["found"], "times": [2.5, 10.0]})
    assert compiled(other).status == "declined"
    assert compiled(dist.HashStore()).status == "taken", "read back, as the cache has it"
