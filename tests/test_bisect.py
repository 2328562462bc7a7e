"""``bisect`` finds the one site whose kernel is wrong, and says so when none is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dsv4fuse.kernels import _common
from dsv4fuse.kernels import clamp_swiglu_quant as kernel
from torch import nn
from typer.testing import CliRunner

from dsv4fuse import bisection, ops, verify
from dsv4fuse.__main__ import app

assert ops
WIDTHS = (32, 64, 96, 128, 160)


class Stack(nn.Module):
    """One SwiGLU for each width: five sites."""

    def forward(self, *gate_up):
        outs = []
        for x in gate_up:
            gate, up = x.chunk(2, dim=-1)
            outs.append(F.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0))
        return outs


def make():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 2 * w, generator=generator).bfloat16() for w in WIDTHS]
    return Stack(), tuple(inputs)


@pytest.fixture
def wrong_at(monkeypatch):
    """Makes the fused op wrong for rows of one width."""
    monkeypatch.setattr(_common, "INTERPRETED", False)
    right = kernel.reference

    def at(*widths):
        def reference(gate, *args, **kwargs):
            y = right(gate, *args, **kwargs)
            return y * 2 if gate.shape[-1] in widths else y

        monkeypatch.setattr(kernel, "reference", reference)

    return at


@pytest.mark.parametrize("width", WIDTHS)
def test_the_wrong_site_is_found(wrong_at, width):
    wrong_at(width)
    model, args = make()
    steps = []
    found = bisection.bisect(
        model, args, options={"verify": False}, progress=lambda text, most: steps.append(most)
    )
    assert 1 < len(steps) <= steps[0], "a bar is never more than full"
    (site,) = found.sites
    assert site.detail["site"] == f"clamp_swiglu_quant#{WIDTHS.index(width)}"
    assert found.alone == found.together == 1.0
    assert found.tried <= 2 + 6


def test_nothing_is_wrong(wrong_at):
    model, args = make()
    found = bisection.bisect(model, args)
    assert found.sites == () and found.together == 0.0 and found.tried == 2


def test_verify_rejects_the_wrong_site_before_it_does_harm(wrong_at, monkeypatch):
    monkeypatch.setattr(verify, "_verified", {})  # it checks equal regions once a process
    wrong_at(96)
    model, args = make()
    assert bisection.bisect(model, args).sites == ()


def test_the_command(wrong_at, monkeypatch):
    wrong_at(96)
    monkeypatch.setattr("dsv4fuse.__main__.build", lambda factory: (*make(), {}))
    options = ["--options", '{"verify": false}']
    result = CliRunner().invoke(app, ["bisect", "a.b:c", *options])
    assert result.exit_code == 1 and "DSV4FUSE_ONLY=clamp_swiglu_quant#2" in result.output
    result = CliRunner().invoke(app, ["bisect", "a.b:c", *options, "--tolerance", "1"])
    assert result.exit_code == 0 and "within bounds" in result.output


def test_only_switches_everything_else_off(wrong_at, monkeypatch):
    model, args = make()
    import dsv4fuse

    name = "clamp_swiglu_quant"
    for only, count in ((f"{name}#1, {name}#4", 2), ("", 0), (name, 5)):
        monkeypatch.setenv("DSV4FUSE_ONLY", only)
        dsv4fuse.pipeline.numbers.clear()
        torch._dynamo.reset()
        report = dsv4fuse.explain(model, *args, options={"select": "always"})
        assert len([s for s in report.sites if s.status == "taken"]) == count
