"""What may stand for a replaced node, and where: each reason to decline by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dsv4fuse.kernels import _common as common

from dsv4fuse import explain, recorded, rewrite
from dsv4fuse.fusion import Candidate
from dsv4fuse.plans import Declined, Plans

FP16, BF16 = torch.float16, torch.bfloat16


def candidate(fn, *shapes, call, inputs=None, output=0) -> tuple[torch.fx.Graph, Candidate]:
    """A candidate for one node of fn's graph, replaced by ``call`` of the inputs."""
    graph = recorded.graph(fn, [(s, torch.float32) for s in shapes])
    nodes = {n.name: n for n in graph.nodes}
    outputs = next(n for n in graph.nodes if n.op == "output").args[0]
    root = outputs[output] if isinstance(outputs, tuple | list) else outputs
    given = tuple(nodes[n] for n in inputs) if inputs else tuple(
        n for n in graph.nodes if n.op == "placeholder"
    )  # fmt: skip
    return graph, Candidate("clamp_swiglu_quant", root, given, call, (root,))


CALLS = {
    "dtype": (lambda x: (x * 2).to(BF16), "keeps fp32 here, the kernel bf16"),
    "shape": (lambda x: (x * 2)[:, :3].contiguous(), "has shape"),
    "rank": (lambda x: (x * 2).flatten(), "has shape"),
    "strides": (lambda x: (x * 2).t().contiguous().t(), "has strides"),
}


@pytest.mark.parametrize("name", CALLS)
def test_declined(name):
    call, words = CALLS[name]
    _, made = candidate(lambda x: x * 2, (4, 6), call=lambda x: (call(x),))
    with pytest.raises(Declined, match=words):
        Plans().of(made)


def test_a_kernel_that_refuses_its_inputs():
    def refuse(x):
        raise ValueError("the group must be 32, 64 or 128")

    _, made = candidate(lambda x: x * 2, (4, 6), call=refuse)
    with pytest.raises(Declined, match="the group must be"):
        Plans().of(made)
    made = dataclasses.replace(made, unsupported="No kernel does this.")
    with pytest.raises(Declined, match="No kernel does this"):
        Plans().of(made)


def test_applied():
    graph, made = candidate(lambda x: (x * 2).exp(), (4, 6), call=lambda x: ((x + x).exp(),))
    rewrite.apply(graph, made, Plans().of(made), {})
    graph.eliminate_dead_code()
    graph.lint()
    x = torch.randn(4, 6)
    run = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert torch.equal(torch.as_tensor(run(x)), (x + x).exp()) and "mul" not in str(graph)


def test_a_reader_in_front_of_an_input():
    """The fused op would need what is made of its own result's reader."""

    def fn(x, y):
        a = x * 2
        return a, (a + 1).sum() + y

    graph = recorded.graph(fn, [((4, 6), torch.float32)] * 2)
    a, last = next(n for n in graph.nodes if n.op == "output").args[0]
    x = next(iter(graph.nodes))
    made = Candidate("clamp_swiglu_quant", a, (x, last), lambda x, y: (x * 2,), (a,))
    with pytest.raises(Declined, match="reads the result before"):
        rewrite.apply(graph, made, Plans().of(made), {})


def test_a_value_of_another_dtype_is_no_match(monkeypatch):
    """Of fp16 to bf16 no reference goes: what is fused then lies between, in fp32."""
    monkeypatch.setattr(common, "INTERPRETED", False)

    def fn(gate, up):
        g, u = gate.float().clamp(max=10.0), up.float().clamp(-10.0, 10.0)
        return (torch.nn.functional.silu(g) * u).to(BF16)

    def sites(dtype):
        args = [torch.randn(3, 64).to(dtype) for _ in "gu"]
        with torch.no_grad():
            found = explain(fn, *args, options={"select": "always"}).sites
        return [(s.status, s.reason) for s in found]

    assert sites(BF16) == [("taken", "Clamp → swiglu (once).")]
    assert sites(FP16) == [("taken", "Clamp → swiglu (silu).")]
