"""The check against exact arithmetic, and regions that are too large to be run for it."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from dsv4fuse import exact, explain, recorded, verify
from dsv4fuse.scene import Scene

from .spellings.sink_attention import SPELLINGS

CASE = SPELLINGS["hf"]


def _graph(fn, *shapes, dtype=torch.bfloat16) -> tuple[list[fx.Node], dict[fx.Node, torch.Tensor]]:
    graph = recorded.graph(fn, [(s, dtype) for s in shapes])
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    env = {n: torch.randn(s).to(dtype) for n, s in zip(inputs, shapes, strict=True)}
    return [n for n in graph.nodes if n.op == "call_function"], env


def test_the_truth_rounds_nothing():
    region, env = _graph(lambda x, y: ((x @ y).to(torch.float16) * 0.3).softmax(-1), (5, 7), (7, 3))
    (x, y), last = list(env.values()), region[-1]
    true = exact.truth(region, dict(env), [last])[last]
    wanted = ((x.double() @ y.double()) * 0.3).softmax(-1)
    assert true.dtype == torch.float64
    torch.testing.assert_close(true, wanted, rtol=1e-14, atol=0)


def test_bytes_are_those_of_the_dtype_that_is_viewed():
    """In fp64 they would be twice as many and more."""
    region, env = _graph(lambda x: (x * 2).view(torch.uint8), (5, 4))
    (x,), last = list(env.values()), region[-1]
    assert torch.equal(exact.truth(region, dict(env), [last])[last], (x * 2).view(torch.uint8))


def test_values_go_after_their_last_use():
    region, env = _graph(lambda x: ((x + 1) * 2, (x + 1).float().sum()), (4, 4))
    ends = [n for n in region if not n.users or list(n.users)[0].op == "output"]
    assert set(exact.run(region, dict(env), ends)) <= {*ends, *env}


def test_the_peak_counts_what_is_held_at_a_time():
    size = 64 * 64 * 4
    region, env = _graph(lambda x: (((x + 1) * 2) - 3).t() + 4, (64, 64), dtype=torch.float32)
    assert exact._peak(region, env, wide=False) == 3 * size  # an operand, a result, the input
    assert exact._peak(region, env, wide=True) == 6 * size


@pytest.fixture
def nothing_verified(monkeypatch):
    monkeypatch.setattr(verify, "_verified", {})


def _sites(monkeypatch, off: float):
    """The report of a site whose fused op is off by so many rounding steps."""
    from dsv4fuse.kernels import _common, sink_attention

    monkeypatch.setattr(_common, "INTERPRETED", False)
    plain = sink_attention.combine

    def combine(s, kv, sinks, out, *rest):
        y = plain(s, kv, sinks, out, *rest)
        return y.add_(y.abs().amax(-1, keepdim=True) * off * torch.finfo(y.dtype).eps)

    monkeypatch.setattr(sink_attention, "combine", combine)
    return explain(CASE.build(), *CASE.inputs(), options={"select": "always"})


def test_as_near_as_the_module_is_enough(monkeypatch, nothing_verified):
    assert _sites(monkeypatch, 1.0).counts() == {"sink_attention": 1}


def test_farther_than_the_module_is_rejected(monkeypatch, nothing_verified):
    (site,) = _sites(monkeypatch, 30.0).with_status("rejected")
    assert "rounding steps of bf16, the module's is off by" in site.reason


def test_too_large_is_taken_and_said(monkeypatch, nothing_verified):
    monkeypatch.setattr(exact, "_free", lambda device: 1000)
    (site,) = _sites(monkeypatch, 30.0).with_status("taken")
    assert verify.UNCHECKED in site.reason


def test_too_large_in_fp64_is_not_judged_by_its_own_rounding(monkeypatch, nothing_verified):
    """What is only as near to exact arithmetic as the module may be two roundings apart from it."""
    monkeypatch.setattr(exact, "fits", lambda region, leaves, device, wide: not wide)
    (site,) = _sites(monkeypatch, 3.0).with_status("taken")
    assert verify.UNCHECKED in site.reason


def test_a_slice_of_lanes_is_not_the_whole():
    graph = recorded.graph(lambda x: (x * 2)[..., :3] + 1, [((4, 6), torch.float32)])
    scene = Scene(graph)
    sliced = next(n for n in graph.nodes if n.target is torch.ops.aten.slice.Tensor)
    assert [n for n, _ in scene.holders(sliced)] == [sliced]


