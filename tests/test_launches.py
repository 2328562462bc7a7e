"""What Inductor does for launches, in less time: the same comes of it."""

from __future__ import annotations

import inspect
import operator
from types import SimpleNamespace

import pytest
import torch
from torch import fx
from torch._higher_order_ops import triton_kernel_wrap as wrap
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import pattern_matcher
from torch._inductor.async_compile import (
    AsyncCompile,
    CompiledTritonKernels,
    shutdown_compile_workers,
)
from torch._inductor.codegen import wrapper
from torch._inductor.fx_passes import post_grad
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4fuse import compat, launches
from dsv4fuse.backend import dsv4fuse
from dsv4fuse.fusion import Sizes, registry

from ._kernels import GPU

SOURCE = "\nimport triton\n\n@user_autotune(custom_kernel=True)\n@jit\ndef f(x):\n    r'\\n'\n"
DEFINITION = f"async_compile.triton('f', '''{SOURCE}''', device_str='cuda')\n"
DEFINITION = DEFINITION.replace("\\", "\\\\")


@pytest.fixture
def started(monkeypatch):
    """What workers that are there were given."""
    given = []
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: True)
    monkeypatch.setattr(AsyncCompile, "triton", lambda _, *args, **kw: given.append((args, kw)))
    with V.set_graph_handler(SimpleNamespace(cpp_wrapper=False)):
        yield given


def test_what_torch_writes():
    written = inspect.getsource(wrapper.PythonWrapperCodegen.define_user_defined_triton_kernel)
    for part in ("async_compile.triton({", "custom_kernel=True", "self.define_kernel("):
        assert part in written
    assert hasattr(wrapper, launches.SOURCE)


def test_workers_get_what_the_code_will_ask_for(started):
    launches.start(DEFINITION)
    asked = SimpleNamespace(triton=lambda *args, **kw: (args, kw))
    assert started == [eval(DEFINITION, {"async_compile": asked})]
    assert started == [(("f", SOURCE), {"device_str": "cuda"})]


def test_what_is_not_given_to_them(started, monkeypatch):
    launches.start(DEFINITION.replace("custom_kernel=True", ""))  # Inductor does it itself
    with V.set_aot_compilation(True):  # packages compile in their own way
        launches.start(DEFINITION)
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: False)  # no workers yet
    launches.start(DEFINITION)
    assert started == []


def test_a_definition_stays_as_it_is(started):
    defined = launches._started(lambda *args, **kw: (args, kw))
    assert defined("code", "f", DEFINITION, "# a comment", gpu=True) == (
        ("code", "f", DEFINITION, "# a comment"), {"gpu": True}
    )  # fmt: skip
    assert len(started) == 1
    odd = "custom_kernel=True, but no Python"
    assert defined("code", "f", odd) == (("code", "f", odd), {}) and len(started) == 1


def test_a_source_is_read_once():
    read = []
    source = launches._once(lambda kernel, *changed: read.append(kernel) or f"{changed}")
    ours, other = SimpleNamespace(stores={}), SimpleNamespace()
    assert [source(ours), source(ours), source(ours, None)] == ["()"] * 3 and len(read) == 1
    assert source(ours, "an epilogue") == "('an epilogue',)"
    assert source(other) == source(other) == "()" and len(read) == 4


def graph_of_launches(clones):
    """Two launches that write to ``out``, which the first clones or not."""
    graph, idx = fx.Graph(), kernel_side_table.add_kernel(graph_of_launches)
    with FakeTensorMode():
        x, out = (graph.placeholder(n) for n in ("x", "out"))
        for node in (x, out):
            node.meta["val"] = torch.empty(4, 8)
        for cloned in (clones, []):
            kwargs = {"x": x, "out": out}
            how = dict(kernel_idx=idx, constant_args_idx=0, grid=[(4, 1, 1)],
                       tma_descriptor_metadata={}, kwargs=kwargs,
                       tensors_to_clone=cloned)  # fmt: skip
            launch = graph.call_function(wrap.triton_kernel_wrapper_functional, (), how)
            launch.meta["val"] = {n: kwargs[n].meta["val"] for n in cloned}
            if cloned:
                out = graph.call_function(operator.getitem, (launch, "out"))
                out.meta["val"] = launch.meta["val"]["out"]
        graph.output(out)
    fx.GraphModule({}, graph)
    return graph


@pytest.mark.parametrize("clones", [[], ["out"]])
def test_what_is_written_in_place(clones, monkeypatch):
    ours, theirs = graph_of_launches(clones), graph_of_launches(clones)
    traced, fwd_only = [], pattern_matcher.fwd_only
    monkeypatch.setattr(pattern_matcher, "fwd_only",
                        lambda *a, **k: traced.append(1) or fwd_only(*a, **k))  # fmt: skip
    plain = inspect.unwrap(post_grad.decompose_triton_kernel_wrapper_functional)
    with V.set_fake_mode(ours.find_nodes(op="placeholder")[0].meta["val"].fake_mode):
        launches._in_place(plain)(ours)
    assert len(traced) == len(clones)
    with V.set_fake_mode(theirs.find_nodes(op="placeholder")[0].meta["val"].fake_mode):
        plain(theirs)

    def shown(graph):
        place = {n: i for i, n in enumerate(graph.nodes)}
        return [
            (str(n.target), repr(fx.node.map_arg((n.args, n.kwargs), place.get)))
            for n in graph.nodes
        ]

    found = [target for target, _ in shown(ours)]
    assert found.count("triton_kernel_wrapper_mutation") == 2 and shown(ours) == shown(theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_the_code_finds_them_when_it_is_loaded(monkeypatch):
    """Each kernel's source twice: as it is defined, and as the code is loaded; then it is there."""
    met, triton = [], AsyncCompile.triton

    def noted(self, name, source, *args, **kwargs):
        if "custom_kernel=True" in source:
            met.append((source, CompiledTritonKernels.get(source) is not None))
        return triton(self, name, source, *args, **kwargs)

    monkeypatch.setattr(AsyncCompile, "triton", noted)
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 2)
    AsyncCompile.wait_pool_ready()
    made = registry()["hyper_connection_pre"].examples["norm"](64, Sizes(), "cuda")
    with compat.fresh_caches(), torch.no_grad():
        torch.compile(made.fn, backend=dsv4fuse, options={"select": "always"})(*made.inputs)
    shutdown_compile_workers()
    sources = dict.fromkeys(source for source, _ in met)
    assert sources and met == [(s, False) for s in sources] + [(s, True) for s in sources]
