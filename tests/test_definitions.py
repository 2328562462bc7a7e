"""Kernels of launches in Inductor's code: given to the workers as they are defined, read once."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels
from torch._inductor.codegen import wrapper
from torch._inductor.virtualized import V

from dsv4fuse import compat, definitions
from dsv4fuse.fusion import Sizes, registry

from ._kernels import GPU

SOURCE = "\nimport triton\n\n@user_autotune(custom_kernel=True)\n@triton.jit\ndef f(x):\n    r'\\n'\n"
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
    assert hasattr(wrapper, definitions.SOURCE)


def test_workers_get_what_the_code_will_ask_for(started):
    definitions.start(DEFINITION)
    asked = SimpleNamespace(triton=lambda *args, **kw: (args, kw))
    assert started == [eval(DEFINITION, {"async_compile": asked})]
    assert started == [(("f", SOURCE), {"device_str": "cuda"})]


def test_what_is_not_given_to_them(started, monkeypatch):
    definitions.start(DEFINITION.replace("custom_kernel=True", ""))  # Inductor does it itself
    with V.set_aot_compilation(True):  # packages compile in their own way
        definitions.start(DEFINITION)
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: False)  # no workers yet
    definitions.start(DEFINITION)
    assert started == []


def test_a_definition_stays_as_it_is(started):
    defined = definitions._started(lambda *args, **kw: (args, kw))
    assert defined("code", "f", DEFINITION, "# a comment", gpu=True) == (
        ("code", "f", DEFINITION, "# a comment"), {"gpu": True}
    )  # fmt: skip
    assert len(started) == 1
    odd = "custom_kernel=True, but no Python"
    assert defined("code", "f", odd) == (("code", "f", odd), {}) and len(started) == 1


def test_a_source_is_read_once():
    read = []
    source = definitions._once(lambda kernel, *changed: read.append(kernel) or f"{changed}")
    ours, other = SimpleNamespace(stores={}), SimpleNamespace()
    assert [source(ours), source(ours), source(ours, None)] == ["()"] * 3 and len(read) == 1
    assert source(ours, "an epilogue") == "('an epilogue',)"
    assert source(other) == source(other) == "()" and len(read) == 4


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
    AsyncCompile.wait_pool_ready()
    made = registry()["hyper_connection_pre"].examples["norm"](64, Sizes(), "cuda")
    with compat.fresh_caches(), torch.no_grad():
        torch.compile(made.fn, backend="dsv4fuse", options={"select": "always"})(*made.inputs)
    sources = dict.fromkeys(source for source, _ in met)
    assert sources and met == [(s, False) for s in sources] + [(s, True) for s in sources]
