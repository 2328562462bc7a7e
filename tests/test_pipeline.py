"""Everything around a graph that torch.compile may do to it: modes, sizes, threads, subclasses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from dsv4fuse.kernels import _common as common
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from dsv4fuse import Report, backend, compat, ops
from dsv4fuse.fusion import Sizes, registry

TAKE = {"select": "always", "inner": "eager"}
ONE = {"clamp_swiglu_quant": 1}


@pytest.fixture(autouse=True)
def _references(monkeypatch, request):
    """Fused ops run their references, where no GPU is asked for."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(common, "INTERPRETED", False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)


class Expert(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(16, width, bias=False) for _ in "gu")

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(self.gate_proj(x), self.up_proj(x))


def compiled(target, **more):
    return torch.compile(target, backend=backend.dsv4fuse, options=TAKE, **more)


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


# ---- what a site consists of ---------------------------------------------------------------------


def _all_rows(base: Tensor, x: Tensor) -> Tensor:
    base = base.unsqueeze(0).clone()
    base[:, 0:] = x
    return base


def _the_only_row(base: Tensor, x: Tensor) -> Tensor:
    base = base.unsqueeze(0).clone()
    base[0] = x
    return base


@pytest.mark.parametrize("written", [_all_rows, _the_only_row])
def test_what_is_overwritten_whole_is_no_part_of_it(written, monkeypatch):
    """A product that cannot be run in fp64, and only lends its shape, is not asked for."""
    regions = []

    def check(candidate, region, numerics):
        regions.extend(region)

    monkeypatch.setattr("dsv4fuse.verify.check", check)

    def fn(a: Tensor, x: Tensor, up: Tensor) -> Tensor:
        return swiglu(written(a @ a, x * 2), up)

    a, x, up = (torch.randn(16, 16) for _ in range(3))
    with torch.no_grad():
        near(compiled(fn)(a, x, up), fn(a, x, up))
    assert regions and torch.ops.aten.mm.default not in {n.target for n in regions}


# ---- modes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    expert, x = Expert(), torch.randn(5, 16)
    fused = compiled(expert)
    with mode():
        near(fused(x), expert(x))
        near(fused(torch.ones(5, 16)), expert(torch.ones(5, 16)))  # made in this mode
    graphs = Report.of(expert).graphs  # torch sets inference tensors apart from others
    assert Report.of(expert).counts() == {"clamp_swiglu_quant": graphs} and graphs <= 2


def test_the_mode_is_the_callers():
    """Compiled without gradients, called with them: those come, and the mode stays as it was."""
    expert, x = Expert(), torch.randn(5, 16)
    fused = compiled(expert)
    with torch.no_grad():
        out = fused(x)
        assert not out.requires_grad and not torch.is_grad_enabled()
    out = fused(x)
    assert out.requires_grad and torch.is_grad_enabled()
    out.sum().backward()
    found = [p.grad.clone() for p in expert.parameters()]
    expert.zero_grad()
    expert(x).sum().backward()
    for p, g in zip(expert.parameters(), found, strict=True):
        near(g, p.grad)
    with torch.no_grad():
        assert not fused(x).requires_grad
    with torch.inference_mode():
        assert fused(x).is_inference()
    report = Report.of(expert)
    assert set(report.counts()) == set(ONE) and any("gradient" in n for n in report.notes)


def test_the_mode_changes_inside():
    """What a model computes without gradients is still part of a graph that has some."""
    expert, other = Expert(), nn.Linear(32, 3)

    def fn(x):
        with torch.no_grad():
            y = expert(x)
        return other(y)

    x = torch.randn(5, 16)
    compiled(fn)(x).sum().backward()
    found, other.weight.grad = other.weight.grad, None
    fn(x).sum().backward()
    near(found, other.weight.grad)
    assert all(p.grad is None for p in expert.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The check runs the user's nodes with the dtypes that they have, not those of autocast."""
    expert, x = Expert(), torch.randn(5, 16)
    fused = compiled(expert)
    with torch.autocast("cpu", dtype=dtype):
        found, wanted = fused(x), expert(x)
    assert found.dtype == wanted.dtype == dtype
    torch.testing.assert_close(found, wanted)
    assert Report.of(expert).counts() == ONE
    near(fused(x), expert(x))  # and without


@pytest.mark.parametrize("grad", [False, True])
def test_activation_checkpointing(grad):
    expert, x = Expert(), torch.randn(5, 16)

    def fn(x):
        return checkpoint(expert, x, use_reentrant=False) + 1

    with torch.set_grad_enabled(grad):
        found = compiled(fn)(x)
        near(found, fn(x))
    report = Report.of(expert)
    if not grad:
        assert report.counts() == ONE
        return
    assert not report.counts() and any("gradient" in n for n in report.notes)
    found.sum().backward()
    got = [p.grad.clone() for p in expert.parameters()]
    expert.zero_grad()
    fn(x).sum().backward()
    for p, g in zip(expert.parameters(), got, strict=True):
        near(g, p.grad)


# ---- sizes ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("how", ["dynamic", "marked"])
def test_sizes_that_change_compile_once(how):
    """Whatever number a symbol stood for when it was traced; of sizes of one torch is wary."""
    expert, seen = Expert(), []

    def counting(gm, inputs, **kwargs):
        seen.append(gm)
        return backend.dsv4fuse(gm, inputs, options=TAKE)

    for first in (7, 300):
        torch._dynamo.reset()
        seen.clear()
        fused = torch.compile(
            expert, backend=counting, fullgraph=True, dynamic=True if how == "dynamic" else None
        )
        for rows in (first, 2, 65, 64, 1024, 3):
            x = torch.randn(2, rows, 16)
            if how == "marked":
                torch._dynamo.mark_dynamic(x, 1)
            near(fused(x), expert(x))
        assert len(seen) == 1
    assert Report.of(expert).counts() == {"clamp_swiglu_quant": 2}


# ---- several at once --------------------------------------------------------------------------


@torch.no_grad()
def test_two_models_in_one_process():
    """Each has its own report, whatever the other compiles."""
    first, second, x = Expert(32), Expert(48), torch.randn(5, 16)
    a, b = compiled(first), compiled(second)
    near(a(x), first(x))
    assert not Report.of(second).graphs
    near(b(x), second(x))
    near(a(x), first(x))
    assert Report.of(first).counts() == Report.of(second).counts() == ONE
    assert not set(map(id, Report.of(first).sites)) & set(map(id, Report.of(second).sites))


def test_threads_compile_at_once():
    models = [Expert(16 * k) for k in (2, 3, 4, 5)]
    x, barrier = torch.randn(5, 16), threading.Barrier(len(models))
    wrong: list[BaseException] = []

    def run(expert: Expert) -> None:
        try:
            fused = compiled(expert)
            barrier.wait(60)
            with torch.no_grad():
                for _ in range(2):
                    near(fused(x), expert(x))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(m,)) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert all(Report.of(m).counts() == ONE for m in models)


# ---- tensors that are more than tensors ---------------------------------------------------------


@torch.no_grad()
def test_a_wrapper_subclass():
    """What wraps two tensors is two graphs' worth of plain ones: right, and of its type."""
    a, b = (torch.randn(5, 32) for _ in "ab")
    gate, up = TwoTensor(a, a * 2), TwoTensor(b, b * 3)
    found = compiled(swiglu)(gate, up)
    assert type(found) is TwoTensor
    near(found.a, swiglu(a, b))
    near(found.b, swiglu(a * 2, b * 3))


class Codes(Tensor):
    """A quantised tensor as libraries make them: codes and a scale, made wide where it is used."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Codes(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def wide(x):
            return x.codes.to(x.scale.dtype) * x.scale if isinstance(x, Codes) else x

        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Codes(args[0].codes, args[0].scale)
        return func(*torch.utils._pytree.tree_map(wide, args), **(kwargs or {}))


@torch.no_grad()
def test_a_quantised_subclass():
    codes = torch.randint(-127, 127, (5, 32), dtype=torch.int8)
    gate, up = Codes(codes, torch.tensor(0.1)), torch.randn(5, 32)
    wanted = swiglu(codes.float() * 0.1, up)
    near(swiglu(gate, up), wanted)
    near(compiled(swiglu)(gate, up), wanted)


@pytest.fixture
def mesh(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
@torch.no_grad()
def test_dtensors(mesh):
    """Sharded inputs: local tensors in the graph, a DTensor of the same placement out."""
    from torch.distributed.tensor import Shard, distribute_tensor

    a, b = (torch.randn(6, 32) for _ in "ab")
    gate, up = (distribute_tensor(t, mesh, [Shard(0)]) for t in (a, b))
    found = compiled(swiglu)(gate, up)
    assert found.placements == (Shard(0),)
    near(found.full_tensor(), swiglu(a, b))


# ---- ops by themselves ------------------------------------------------------------------------


@torch.no_grad()
def test_ops_in_eager_in_an_export_and_compiled():
    """One node of an exported program, which runs without this backend."""

    class Direct(nn.Module):
        def forward(self, gate, up):
            return ops.clamp_swiglu(gate, up, None, limit=1.0, rounding="once")

    args = tuple(torch.randn(5, 32) for _ in "gu")
    program = torch.export.export(Direct(), args)
    assert "dsv4fuse.clamp_swiglu" in str(program.graph)
    wanted = swiglu(*args)
    for run in (Direct(), program.module(), torch.compile(Direct(), backend="aot_eager")):
        near(run(*args), wanted)
    assert not Report.of(program.module()).graphs


@torch.no_grad()
def test_a_model_is_exported_as_it_is():
    """Compiling a model changes nothing of what torch.export sees of it."""
    expert, x = Expert(), torch.randn(5, 16)
    near(compiled(expert)(x), expert(x))
    program = torch.export.export(expert, (x,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
    assert "dsv4fuse" not in str(program.graph)
    near(program.module()(torch.cat((x, x))), expert(torch.cat((x, x))))


# ---- Inductor's caches ------------------------------------------------------------------------

PROCESS = """
import json, torch
from torch._dynamo.utils import counters
from dsv4fuse import Report
from dsv4fuse.backend import dsv4fuse

def f(gate, up):
    return torch.nn.functional.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)

x = torch.ones(5, 32)
with torch.no_grad():
    torch.compile(f, backend=dsv4fuse, options={"select": "always"})(x, x)
holder = torch.nn.Module()
holder.register_buffer("x", x)
print(json.dumps([Report.of(holder).counts(), counters["inductor"]["fxgraph_cache_hit"]]))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "file", ["kernels/clamp_swiglu_quant.py", "dsv4fuse/rules.py", "patterns/norm_quant.py",
             "kernels/norm_rope_cache.json"],
)  # fmt: skip
def test_a_changed_source_is_another_program(file, checkout, tmp_path):
    """Of kernels, patterns, rules, measured data: what was compiled before is not used."""
    tree = tmp_path / "tree"
    for part in ("dsv4fuse", "kernels", "patterns"):
        shutil.copytree(checkout / part, tree / part)
    shutil.copy(checkout / "pyproject.toml", tree)
    env = os.environ | {"PYTHONPATH": str(tree), "TRITON_INTERPRET": "0",
                        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # fmt: skip

    def process():
        run = dict(env=env, cwd=tree, capture_output=True, text=True, timeout=600)
        done = subprocess.run([sys.executable, "-c", PROCESS], **run)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    assert process() == [ONE, 0]
    assert process() == [ONE, 1]
    with (tree / file).open("a") as out:
        out.write("\n")
    assert process() == [ONE, 0]


# ---- on a GPU ---------------------------------------------------------------------------------

VARIANTS = [(f, v) for f, made in registry().items() for v in made.examples]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name, variant", VARIANTS)
def test_a_cuda_graph_replayed_twice(name, variant):
    """New inputs at the old addresses: every replay computes on what is there now."""
    made = registry()[name].examples[variant](5, Sizes(), "cuda")
    again = registry()[name].examples[variant](5, Sizes(), "cuda")
    options = {"select": "always", "expect": {name: 1}}
    with compat.without_caches():
        fused = torch.compile(made.fn, backend=backend.dsv4fuse, options=options, dynamic=False)
        fused(*made.inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(*made.inputs)
    out = [out] if isinstance(out, Tensor) else list(out)
    for source in (made.inputs, again.inputs):
        kept = [t.clone() for t in source]
        for t, s in zip(made.inputs, kept, strict=True):
            t.copy_(s)
        wanted = fused(*kept)  # not replayed, on copies
        graph.replay()
        torch.cuda.synchronize()
        wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
        ours, theirs = (*out, *made.read(made.inputs)), (*wanted, *made.read(kept))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.float().nan_to_num(), b.float().nan_to_num())
