"""The ways in, and what each of them promises: the backend's name, the decorator, the pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from dsv4fuse.kernels import _common
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import dsv4fuse
from dsv4fuse import FusionError, OptionError, Report, backend

TAKE = {"select": "always", "inner": "eager"}


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """Fused ops run their references: what is tested here is how one gets to them."""
    monkeypatch.setattr(_common, "INTERPRETED", False)
    monkeypatch.delenv("DSV4FUSE_DISABLE", raising=False)


def swiglu(gate, up):
    return torch.nn.functional.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)


class Expert(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, width), nn.Linear(16, width)

    def forward(self, x):
        return swiglu(self.gate_proj(x), self.up_proj(x))


def inputs():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 32, generator=generator) for _ in "ab")


def taken(report):
    return report.counts() == {"clamp_swiglu_quant": 1}


# The decorator -----------------------------------------------------------------------------------


@torch.no_grad()
def test_an_instance_is_compiled_and_left_as_it_was():
    expert, other = Expert(), Expert()
    fused = dsv4fuse.fuse(expert, **TAKE)
    x = torch.randn(5, 16)
    torch.testing.assert_close(fused(x), expert(x))
    assert taken(Report.of(expert)) and taken(Report.of(fused))
    other(x)
    assert type(expert) is type(other) and "forward" not in vars(expert)
    assert not Report.of(other).graphs


@torch.no_grad()
def test_each_instance_of_a_decorated_class_is_compiled():
    @dsv4fuse.fuse(fullgraph=True, **TAKE)
    class Fused(Expert):
        pass

    class Below(Fused):
        pass

    x = torch.randn(5, 16)
    first, second, below, plain = Fused(), Fused(), Below(), Expert()
    plain.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(x), plain(x))
    assert taken(Report.of(first)) and isinstance(first, Fused)
    assert not Report.of(second).graphs, "not run yet"
    below(x), plain(x)
    assert not Report.of(below).graphs, "a class below decides for itself"
    assert not Report.of(plain).graphs


@torch.no_grad()
def test_functions_with_and_without_arguments():
    gate, up = inputs()
    for decorate in (dsv4fuse.fuse(**TAKE), lambda f: dsv4fuse.fuse(f, **TAKE)):
        torch._dynamo.reset()
        gate, up = gate.clone(), up.clone()
        torch.testing.assert_close(decorate(swiglu)(gate, up), swiglu(gate, up))


@pytest.mark.parametrize("target", [3, int])
def test_what_cannot_be_fused_is_refused(target):
    with pytest.raises(TypeError, match="nn.Module class, a module or a function"):
        dsv4fuse.fuse(target)


def test_a_wrong_option_is_refused_at_once():
    with pytest.raises(OptionError, match="numerics"):
        dsv4fuse.fuse(swiglu, numeric="precise")


# The report --------------------------------------------------------------------------------------


@torch.no_grad()
def test_expect_and_strict_are_errors_that_say_why():
    def compiled(fn, **options):
        torch._dynamo.reset()
        return torch.compile(fn, backend=backend.dsv4fuse, options=TAKE | options)

    compiled(swiglu, expect={"clamp_swiglu_quant": 1}, strict=True)(*inputs())
    with pytest.raises(Exception, match="Expected 2 sites of 'clamp_swiglu_quant'.* but 1 was"):
        compiled(swiglu, expect={"clamp_swiglu_quant": 2})(*inputs())

    def almost(x, cos, sin):  # one sign is wrong for a rotation
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((even * cos - odd * sin, odd * cos - even * sin), dim=-1)
        return turned.flatten(-2)

    x = (torch.randn(5, 8), torch.randn(5, 4), torch.randn(5, 4))
    compiled(almost)(*x)
    with pytest.raises(Exception, match="strict=True: .*test_ways_in.py.* nearly matches"):
        compiled(almost, strict=True)(*x)
    with pytest.raises(FusionError, match="nearly matches") as caught:
        dsv4fuse.explain(almost, *x, options=TAKE | {"strict": True})
    assert caught.value.report.with_status("near-miss")


@torch.no_grad()
def test_a_mode_of_torch_compile_reaches_inductor(monkeypatch):
    from torch._inductor import compile_fx

    patches = {}

    def spy(gm, inputs, config_patches, decompositions):
        patches[mode] = config_patches
        return gm

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    for mode in (None, "reduce-overhead"):
        torch.compile(swiglu, backend=backend.dsv4fuse, mode=mode)(*inputs())
        torch._dynamo.reset()
    without, reduced = patches.values()
    assert without.keys() == {"joint_custom_pre_pass"}
    assert reduced.keys() == {"joint_custom_pre_pass", "triton.cudagraphs"}
    assert reduced["triton.cudagraphs"] is True


def test_explain_compiles_nothing_that_stays():
    report = dsv4fuse.explain(swiglu, *inputs(), options={"select": "always"})
    assert taken(report) and "test_ways_in.py" in report.sites[0].where
    declined = dsv4fuse.explain(swiglu, *inputs())
    assert [s.status for s in declined.sites] == ["declined"] * (not torch.cuda.is_available())


def test_graphs_that_are_differentiated_are_left_alone():
    expert = Expert()
    fused = torch.compile(expert, backend=backend.dsv4fuse, options=TAKE)
    x = torch.randn(5, 16)
    fused(x).sum().backward()
    wanted = [p.grad.clone() for p in expert.parameters()]
    report = Report.of(expert)
    assert not report.sites and any("gradient" in note for note in report.notes)
    expert.zero_grad()
    expert(x).sum().backward()
    for p, grad in zip(expert.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad)


@torch.no_grad()
def test_the_environment_switches_it_off(monkeypatch):
    monkeypatch.setenv("DSV4FUSE_DISABLE", "1")
    expert = Expert()
    fused = torch.compile(expert, backend=backend.dsv4fuse, options=TAKE)
    x = torch.randn(5, 16)
    torch.testing.assert_close(fused(x), expert(x))
    assert Report.of(expert) == Report()
    with pytest.raises(Exception, match="numeric"):  # a wrong option is one all the same
        torch._dynamo.reset()
        torch.compile(expert, backend=backend.dsv4fuse, options={"numeric": 1})(x)


# Inductor ----------------------------------------------------------------------------------------


class Counting(CustomGraphPass):
    """A user's own pass, that sees what stands in the graph when it runs."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append(any("dsv4fuse" in str(n.target) for n in graph.nodes))

    def uuid(self):
        return "counting 1"


@torch.no_grad()
def test_the_pass_beside_another_one():
    theirs = Counting()
    with torch._inductor.config.patch(joint_custom_pre_pass=theirs, fx_graph_cache=False):
        ours = dsv4fuse.inductor_pass({"select": "always"})
    assert ours.before == (theirs,) and not ours.report.graphs
    patches = {"joint_custom_pre_pass": ours, "fx_graph_cache": False}
    found = torch.compile(swiglu, options=patches)(*inputs())
    torch.testing.assert_close(found, swiglu(*inputs()))
    assert theirs.seen == [False] and taken(ours.report)

    # By the backend's name the configured pass is kept too, and runs first.
    torch._dynamo.reset()
    with torch._inductor.config.patch(joint_custom_pre_pass=theirs, fx_graph_cache=False):
        torch.compile(swiglu, backend=backend.dsv4fuse, options={"select": "always"})(*inputs())
    assert theirs.seen == [False, False]


def test_the_identity_of_the_pass_follows_what_decides_its_result():
    plain = dsv4fuse.inductor_pass()
    identities = {plain.uuid(), dsv4fuse.inductor_pass({"numerics": "precise"}).uuid()}
    identities.add(dsv4fuse.inductor_pass({"exclude": ["inv_rope_quant"]}).uuid())
    assert len(identities) == 3 and dsv4fuse.inductor_pass({}).uuid() in identities
    with torch._inductor.config.patch(joint_custom_pre_pass=Counting()):
        assert dsv4fuse.inductor_pass().uuid() not in identities
    with torch._inductor.config.patch(joint_custom_pre_pass=lambda graph: None):
        assert dsv4fuse.inductor_pass().uuid() is None, "it has no identity, so nothing is cached"


PROCESS = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import torch
import dsv4fuse
from torch._dynamo.utils import counters

def f(gate, up):
    return torch.nn.functional.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)

torch.manual_seed(0)
gate, up = torch.randn(5, 32), torch.randn(5, 32)
assert "dsv4fuse" in torch.compiler.list_backends(exclude_tags=()), "no entry point"
with torch.no_grad():
    fused = torch.compile(f, backend="dsv4fuse", options=json.loads(sys.argv[1]))
    torch.testing.assert_close(fused(gate, up), f(gate, up))
holder = torch.nn.Module()
holder.register_buffer("gate", gate)
report = dsv4fuse.Report.of(holder)
print(json.dumps([report.counts(), report.notes, counters["inductor"]["fxgraph_cache_hit"]]))
"""
ENTRY_POINTS = "[torch_dynamo_backends]\ndsv4fuse = dsv4fuse.backend:dsv4fuse\n"


@pytest.mark.slow
def test_by_name_in_two_processes_with_one_cache(checkout, tmp_path):
    """Installed as far as Python looks for it: the metadata with the entry point."""
    metadata = tmp_path / "site" / "dsv4fuse-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4fuse\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    assert 'dsv4fuse = "dsv4fuse.backend:dsv4fuse"' in (checkout / "pyproject.toml").read_text()
    env = os.environ | {
        "PYTHONPATH": str(tmp_path / "site"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_INTERPRET": "0",
    }

    def process(before="", **options):
        given = json.dumps({"select": "always"} | options)
        command = [sys.executable, "-c", before + PROCESS, given]
        done = subprocess.run(
            command, cwd=checkout, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    one = {"clamp_swiglu_quant": 1}
    assert process() == [one, [], 0]
    warm = [backend._WARM]
    assert process() == [one, warm, 1]
    assert process(numerics="precise") == [one, [], 0], "other options, another program"
    assert process("# moved down\n") == [one, warm, 1], "lines are no part of a program"
    for kept in (tmp_path / "cache" / "dsv4fuse").glob("*.json"):
        kept.unlink()
    assert process() == [one, [], 1], "without a report, a warm cache is passed by"
    assert process() == [one, warm, 1]
