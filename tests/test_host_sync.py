"""Constants of the host become fills on the device; what makes the host wait is reported."""

from __future__ import annotations

import pytest
import torch
import torch.fx.experimental.proxy_tensor as proxies
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from dsv4fuse import Report, backend, compat, decompositions, options, pipeline, select
from dsv4fuse.fusion import Candidate, registry

from .spellings._case import Case
from .spellings.host_sync import MUTANTS, SPELLINGS

CUDA = torch.device("cuda", 0)


def reports(
    fn, *inputs, dynamic=False, device=CUDA, **more
) -> tuple[Report, list[torch.fx.Graph]]:
    """The report on fn for inputs on a pretended GPU, and its graphs after the pass."""
    found, graphs = Report(), list[torch.fx.Graph]()
    chosen = options.Options.parse({"verify": False, **more}, registry())

    def run(gm, _):
        nonlocal found
        found += pipeline.run(gm.graph, chosen)
        graphs.append(gm.graph)
        return gm

    from torch._dynamo.backends.common import aot_autograd

    how = dict(decompositions=decompositions.table(), keep_inference_input_mutations=True)
    compiler = aot_autograd(fw_compiler=run, **how)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
                 for t in inputs]  # fmt: skip
        torch.compile(fn, backend=compiler, dynamic=dynamic)(*fakes)
    return found, graphs


@pytest.fixture
def pretended(monkeypatch):
    """Tracing would compute constants of one element, on a GPU that is not there."""
    monkeypatch.setattr(proxies, "CONSTANT_NUMEL_LIMIT", 0)
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)  # as if there were none


def copies(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The nodes that bring a value of the host to the GPU."""
    return [n for n in graph.nodes if n.target is torch.ops.prims.device_put.default
            and n.args[0].meta["val"].device.type == "cpu"]  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, id=k) for k, c in SPELLINGS.items()])
def test_filled_on_the_device(case: Case, pretended):
    report, (graph,) = reports(case.build(), *case.inputs())
    assert report.counts() == {"host_sync": 1}, str(report)
    assert not copies(graph)
    made = [n for n in graph.nodes if n.op == "call_function" and not n.all_input_nodes]
    assert made and all(n.meta["val"].device == CUDA for n in made)


@pytest.mark.parametrize("case", [pytest.param(c, id=k) for k, c in MUTANTS.items()])
def test_not_a_constant(case: Case, pretended):
    report, _ = reports(case.build(), *case.inputs())
    assert report.counts() == {}, str(report)


def test_a_dynamic_range(pretended):
    def fn(x):
        return x + torch.arange(x.shape[0]).to(x.device).view(-1, 1)

    report, (graph,) = reports(fn, torch.ones(4, 3), dynamic=True)
    assert any(n.op == "placeholder" and not isinstance(n.meta["val"], torch.Tensor)
               for n in graph.nodes)  # fmt: skip
    assert report.counts() == {"host_sync": 1} and not copies(graph)


def test_what_is_only_reported(pretended):
    def table(x):
        return x + torch.tensor([1.0, 2.0, 4.0], device=x.device)

    def back(x):
        return x + x.sum().cpu()

    for fn, says in ((table, "make it a buffer"), (back, "reads a value off the GPU")):
        report, _ = reports(fn, torch.ones(4, 3))
        (site,) = report.sites
        assert site.status == "declined" and says in site.reason
        assert site.file == __file__ and site.line > 0


@pytest.mark.parametrize("select_as, taken", [("auto", 1), ("measure", 1), ("never", 0)])
def test_taken_without_a_measurement(select_as, taken, pretended):
    report, _ = reports(lambda x: x * torch.tensor(2.5).to(x.device), torch.ones(3),
                        select=select_as)  # fmt: skip
    assert sum(report.counts().values()) == taken
    none = Candidate("host_sync", None, (), lambda: (), ())  # type: ignore[arg-type]
    wanted = options.Options.parse({"select": select_as}, registry())
    assert select.decide(none, wanted).take is bool(taken)


def item(x):
    return x[: int(x[0].item())] + 1


def branch(x):
    return x + 1 if x.sum() > 0 else x - 1


def words(x):
    x = x * 2
    print("no constant")
    return x + 1


@pytest.mark.parametrize("fn, line, says", [(item, 2, "keep the value a tensor"),
                                            (branch, 1, "torch.where"), (words, None, "")])
def test_graph_breaks_that_wait(fn, line, says):
    report = backend.explain(fn, torch.full((3,), 2.0))
    sites = [s for s in report.sites if s.fusion == "host_sync"]
    assert report.breaks
    assert len(sites) == (0 if line is None else 1)
    for site in sites:
        assert site.status == "declined" and says in site.reason
        assert (site.file, site.line) == (__file__, fn.__code__.co_firstlineno + 1)
    without = backend.explain(fn, torch.full((3,), 2.0), options={"exclude": ["host_sync"]})
    assert not without.sites


def test_a_constant_is_read_back_from_the_graph():
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    gm.register_buffer("held", torch.tensor(3.0))
    with gm.graph.inserting_before():
        node = gm.graph.get_attr("held")
    assert compat.constant(node) == 3.0


# Where torch sees a GPU while it traces, it makes these there, once: nothing is left to replace.
MADE_THERE = {"tensor on the device", "as_tensor", "new_tensor", "equal elements"}


@pytest.mark.gpu
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_on_a_gpu(name, inner):
    """No copy from the host when the compiled function runs, and the numbers of eager.

    Inductor's are not asked for: it leaves the rounding of a cast out that it fuses with its use.
    """
    case, sites = SPELLINGS[name], int(name not in MADE_THERE)
    inputs = [t.cuda() for t in case.inputs()]
    options = {"inner": inner, "expect": {"host_sync": sites}}
    eager = case.build()
    fused = torch.compile(case.build(), backend=backend.dsv4fuse, options=options)
    with torch.no_grad():
        wanted, found = eager(*inputs), fused(*inputs)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            fused(*inputs)
            torch.cuda.synchronize()
    wanted, found = ([t] if isinstance(t, torch.Tensor) else t for t in (wanted, found))
    for a, b in zip(wanted, found, strict=True):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        assert inner == "inductor" or torch.equal(a, b), f"{b} instead of {a}"
    assert not [e.name for e in seen.events() if "HtoD" in e.name]
