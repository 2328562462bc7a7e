"""What compat.py relies on inside torch: if one of these fails, that module is where to look."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import fx, nn
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dsv4fuse
from dsv4fuse import compat, decompositions, pipeline, recorded, trace
from dsv4fuse.bench import stopwatch
from dsv4fuse.fusion import Sizes, registry
from dsv4fuse.options import Options
from dsv4fuse.scene import Scene

from .generate._graphs import traced

config = torch._inductor.config
VERSION = tuple(int(v) for v in torch.__version__.split(".")[:2])


class Spy(CustomGraphPass):
    """Keeps what it is called with, and changes nothing."""

    def __init__(self) -> None:
        self.graphs: list[list[tuple[object, dict]]] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append([(n.target, dict(n.meta)) for n in graph.nodes])

    def uuid(self):
        return None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x):
        y = torch.view_as_real(torch.view_as_complex(self.inner(x).view(-1, 4, 2)) * 1j)
        y = y.flatten(1)
        self.cache[: y.shape[0]] = y
        y.mul_(2)
        return y


@pytest.fixture
def inductor():
    """Compiling with Inductor from scratch, or a skip that says what is missing."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"Inductor finds no C++ compiler: {error}")
    with compat.without_caches():
        yield


def _hooked(value: object) -> Spy:
    """The hook as Inductor calls it, set to what ``value`` makes of a spy."""
    spy = Spy()
    layer, x = Layer().requires_grad_(False), torch.randn(3, 8)
    with config.patch(joint_custom_pre_pass=value(spy)), torch.no_grad():  # type: ignore[operator]
        torch.compile(layer)(x)
    return spy


def test_the_hook_has_its_name():
    assert hasattr(config, "joint_custom_pre_pass")
    assert "joint_custom_pre_pass" in inspect.getsource(
        importlib.import_module("torch._inductor.fx_passes.joint_graph")
    )


@pytest.mark.slow
def test_the_hook_gets_functional_aten_before_inductors_passes(inductor):
    spy = _hooked(lambda spy: spy)
    assert len(spy.graphs) == 1
    targets = [t for t, _ in spy.graphs[0]]
    aten = torch.ops.aten
    # Complex arithmetic is still there, and linear is a plain product.
    assert aten.view_as_complex.default in targets and aten.view_as_real.default in targets
    assert not {aten.mul_.Tensor, aten.linear.default} & set(targets)
    # The one mutation left is the epilogue that brings the new cache home.
    mutating = [t for t in targets if getattr(getattr(t, "_schema", None), "is_mutable", False)]
    assert mutating == [aten.copy_.default]


@pytest.mark.parametrize("shapes", [((2, 3, 1), (2, 1, 4)), ((2, 3, 2), (2, 2, 4))])
@pytest.mark.parametrize("theirs", [True, False], ids=["torch's", "older"])
def test_an_outer_product_is_pointwise(monkeypatch, shapes, theirs):
    """In every version; a product of more stays what it is."""
    if not theirs:
        monkeypatch.setattr(decompositions, "outer_products_are_pointwise", lambda: False)
    a, b = (torch.randn(shape) for shape in shapes)
    graph = make_fx(torch.bmm, decompositions.table())(a, b)
    called = {n.target for n in graph.graph.nodes if n.op == "call_function"}
    assert (torch.ops.aten.bmm.default in called) == (shapes[0][2] > 1)
    found = graph(a, b)
    assert torch.equal(found, torch.bmm(a, b)) and found.is_contiguous()


def test_outer_products_by_version():
    assert decompositions.outer_products_are_pointwise() == (VERSION >= (2, 12))


@pytest.mark.slow
def test_nodes_know_their_module_and_their_line(inductor):
    spy = _hooked(lambda spy: spy)
    calls = [m for t, m in spy.graphs[0] if isinstance(t, torch._ops.OpOverload)]
    assert all("stack_trace" in m for m in calls)
    assert any(__file__ in m["stack_trace"] for m in calls)
    stacks = [m["nn_module_stack"] for m in calls if "nn_module_stack" in m]
    assert any("inner" in str(entry) for stack in stacks for entry in stack.values())


@pytest.mark.slow
def test_one_callable_or_a_list(inductor):
    """2.11 and 2.12 take one callable, which is why ours runs the earlier ones itself."""
    assert len(_hooked(lambda spy: spy).graphs) == 1
    if VERSION >= (2, 13):
        torch._dynamo.reset()
        assert len(_hooked(lambda spy: [spy]).graphs) == 1


def test_earlier_passes_are_composed():
    first, second = Spy(), Spy()
    with config.patch(joint_custom_pre_pass=None):
        assert compat.configured_passes() == []
    with config.patch(joint_custom_pre_pass=first):
        assert compat.configured_passes() == [first]
        ours = dsv4fuse.inductor_pass({"select": "never"})
    with config.patch(joint_custom_pre_pass=[first, second]):
        assert compat.configured_passes() == [first, second]
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    ours(graph)
    assert len(first.graphs) == 1 and not second.graphs
    assert ours.uuid() is None  # the earlier pass has no identity, so nothing may be cached


def test_the_switch_that_keeps_triton_ops_whole_exists():
    from torch.export._trace import _disable_custom_triton_op_functional_decomposition as switch

    with switch():
        pass


def test_torch_reads_nothing_of_its_own_for_the_kernels_of_an_op(monkeypatch):
    """When an op is registered torch reads the source of what its own calls by a bare name, the
    decorator's too: of "@triton_op" all that triton_op calls, which took most of the time."""
    from torch._library import custom_ops, triton

    from dsv4fuse.fusion import register_ops

    register_ops()
    read, source = [], inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda fn: read.append(fn.__module__) or source(fn))
    ours = {n: k for n, k in triton.triton_ops_to_kernels.items() if n.startswith("dsv4fuse")}
    for name, kernels in ours.items():
        own = inspect.getclosurevars(custom_ops.OPDEFS[name]._init_fn).nonlocals["fn"]
        assert set(kernels) <= set(triton.get_inner_triton_kernels(own))
    assert read and not any(module.startswith("torch") for module in read)


def test_config_patches_reach_the_hook_without_a_global():
    compile_fx = importlib.import_module("torch._inductor.compile_fx").compile_fx
    assert {"config_patches", "decompositions"} <= set(inspect.signature(compile_fx).parameters)


def test_a_reference_is_traced_to_functional_aten_without_computing():
    def fn(x):
        y = x.clone()
        y[..., ::2] = 0
        return y.mul_(2)

    graph = recorded.graph(fn, [((1 << 20, 1 << 20), torch.float32)])  # 4 TB if it were computed
    targets = {n.target for n in graph.nodes if n.op == "call_function"}
    assert not any(t._schema.is_mutable for t in targets)
    assert torch.ops.aten.slice_scatter.default in targets


def test_a_reference_with_a_tensor_of_its_own():
    graph = recorded.graph(lambda x: x * torch.tensor([0.5, 2.0]), [((3, 2), torch.float32)])
    (product,) = (n for n in graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    assert product.args[0].op == "placeholder" and product.args[1].meta["val"].shape == (2,)


def test_what_writes_nothing_is_traced_as_if_made_functional(monkeypatch):
    """Each reference that is looked for in the fusions' own sequences: one graph either way."""
    short, long = [], []

    def nodes(graph):
        place = {n: i for i, n in enumerate(graph.nodes)}
        return [
            (n.op, n.target, fx.node.map_arg((n.args, n.kwargs), place.get), n.meta.get("val"))
            for n in graph.nodes
        ]

    def both(fn, inputs, traced=recorded.graph):
        short.append(traced(fn, inputs))
        with FakeTensorMode():
            fakes = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
            made = make_fx(recorded.dispatch_functionalize(fn), decompositions.table())
            long.append(made(*fakes).graph)
        return short[-1]

    trace.pattern.cache_clear()
    monkeypatch.setattr(recorded, "graph", both)
    sizes = Sizes(heads=16, groups=2, inter=256)
    for fusion in registry().values():
        for make in fusion.examples.values():
            made = make(3, sizes, "cpu")
            with torch.no_grad():
                pipeline.candidates(Scene(traced(made.fn, made.inputs).graph), Options())
    assert len(short) > 50
    for a, b in zip(short, long, strict=True):
        assert repr(nodes(a)) == repr(nodes(b))


def test_a_reference_runs_as_graphs_are_spelled(monkeypatch):
    """To the last bit, inside an op as well; what is written in place is written, and what is only
    asked for its shape is left alone."""
    from dsv4fuse.kernels import _common

    from dsv4fuse.fusion import register_ops

    register_ops()
    monkeypatch.setattr(_common, "INTERPRETED", False)
    logits, ids = torch.randn(500, 8), torch.zeros(500, dtype=torch.int64)
    spelled = torch.where(logits > 20, logits, logits.exp().log1p()).sqrt()
    assert not torch.equal(torch.nn.functional.softplus(logits).sqrt(), spelled)
    wide = dict.fromkeys(("scores", "sums", "out"), torch.float32)
    how = dict(func="sqrt_softplus", normalise=False, **wide)
    table, x = torch.arange(8).expand(1, 8), torch.zeros(3)
    fake = torch._subclasses.FakeTensorMode().from_tensor(logits)
    with torch.no_grad(), compat.as_in_graphs(logits.device):
        weights, _ = torch.ops.dsv4fuse.moe_router_hash(logits, table, ids, **how)
        x.add_(1)
        assert fake.softmax(-1).shape == logits.shape
    assert torch.equal(weights, spelled) and x.tolist() == [1.0] * 3


def test_tracing_works_inside_a_compilation():
    """The pass runs under AOTAutograd's modes, and must not see them."""
    seen = []

    def backend(gm, inputs):
        from torch._functorch.aot_autograd import aot_module_simplified

        def inner(graph_module, _):
            seen.append(recorded.graph(lambda x: x.exp(), [((3,), torch.float32)]))
            with compat.outside_compilation():
                assert torch.ones(2).add(1).tolist() == [2.0, 2.0]
            return graph_module

        return aot_module_simplified(gm, inputs, fw_compiler=inner)

    with torch.no_grad():
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    assert len(seen) == 1


def test_a_symbol_has_a_hint_and_no_guard_is_added():
    found = []

    def backend(gm, inputs):
        symbols = [s for x in inputs if isinstance(x, torch.Tensor) for s in x.shape]
        values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
        values = [s for v in values if isinstance(v, torch.Tensor) for s in v.shape]
        for s in (*symbols, *values):
            if isinstance(s, torch.SymInt):
                before = len(s.node.shape_env.guards)
                found.append(compat.hint(s))
                assert len(s.node.shape_env.guards) == before
        return gm.forward

    x = torch.ones(6, 2)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: x + 1, backend=backend)(x)
    assert set(found) == {6}


def test_a_launch_with_a_large_number(monkeypatch):
    """Inductor of 2.11 fails on it, "'int' object has no attribute 'xreplace'": no plan has one."""
    assert compat.takes_large_numbers() == (VERSION > (2, 11))
    graph = fx.Graph()
    for number in (7, 1 << 31):
        index = kernel_side_table.add_constant_args({"step": number, "scale": 1e30})
        graph.call_function(triton_kernel_wrapper_functional, kwargs={"constant_args_idx": index})
    monkeypatch.setattr(compat, "takes_large_numbers", lambda: False)
    assert compat.large_number(graph) == 1 << 31
    monkeypatch.setattr(compat, "takes_large_numbers", lambda: True)
    assert compat.large_number(graph) is None


def test_where_compiling_takes_its_time():
    """Torch keeps a clock for each part under these names."""
    before = stopwatch.compile_seconds()
    with compat.fresh_caches():
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(3))
    spent = {part: s - before[part] for part, s in stopwatch.compile_seconds().items()}
    parts = ("Dynamo", "joint graph's passes", "Inductor")  # for kernels it waits on a GPU
    assert all(spent[part] > 0 for part in parts), spent


def test_a_process_may_tune_for_itself():
    """What Inductor writes into its code, and that no choice of a kernel is kept or read then."""
    from torch._inductor import config
    from torch._inductor.runtime.autotune_cache import AutotuneCache, inductor_meta_from_config

    with compat.tuned_anew():
        assert not inductor_meta_from_config()["autotune_local_cache"]
        cache = AutotuneCache.create(inductor_meta_from_config(), "/tmp/kernel.py", "0")
        assert cache is None or cache.local_cache is None
    assert config.autotune_local_cache and inductor_meta_from_config()["autotune_local_cache"]


def test_a_break_is_told_with_its_line():
    found = []

    def backend(gm, inputs):
        found.append(compat.graph_break(gm))
        return gm.forward

    def fn(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch.compile(fn, backend=backend)(torch.ones(2))
    assert found[-1] is None
    reason, file, line = found[0]
    assert reason and file == __file__
    assert line == inspect.getsourcelines(fn)[1] + 2
