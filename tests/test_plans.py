"""Plans of sites that are alike are traced once; what is copied is what a trace would be."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, fx, nn

from dsv4fuse import calls, pipeline
from dsv4fuse.backend import parse
from dsv4fuse.fusion import Candidate
from dsv4fuse.plans import Plans
from dsv4fuse.scene import Scene

from ._plans import shown
from .generate._graphs import traced
from .test_ahead import printed

OPTIONS = parse({"select": "always"})


class Norms(nn.Module):
    """RMSNorm and rope, once for each epsilon."""

    def __init__(self, *epsilons: float) -> None:
        super().__init__()
        self.epsilons = epsilons

    def forward(self, x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        return [self.one(x + i, w, cos, sin, eps) for i, eps in enumerate(self.epsilons)]

    def one(self, x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * w).to(x.dtype)
        nope, rope = y[..., :-8], y[..., -8:].float().unflatten(-1, (-1, 2))
        a, b = rope[..., 0], rope[..., 1]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return torch.cat([nope, turned.to(x.dtype)], -1)


def sites(*epsilons: float) -> list[Candidate]:
    x = torch.randn(1, 5, 32, dtype=torch.bfloat16)
    args = (x, torch.randn(32), torch.randn(1, 5, 4), torch.randn(1, 5, 4))
    found = pipeline.candidates(Scene(traced(Norms(*epsilons), args).graph), OPTIONS)
    return [c for c, _ in found if c.fusion == "norm_rope_cache"]


@pytest.fixture
def traces(monkeypatch) -> list[object]:
    """Grows by one with each graph that is traced for a plan."""
    made, real = [], calls.graph
    monkeypatch.setattr(calls, "graph", lambda fn, *rest, **how: made.append(fn) or real(
        fn, *rest, **how))  # fmt: skip
    return made


def test_one_of_all_that_do_the_same():
    """Whatever it is that they differ in: here a number that no detail of the site tells."""
    a, b, other = sites(1e-6, 1e-6, 1e-5)
    assert a.detail == other.detail
    assert [c for _, c in Plans()._different([a, b, other, b])] == [a, other]


def test_sites_alike_are_traced_once(traces):
    plans, found = Plans(), sites(1e-6, 1e-6, 1e-6)
    graphs = [plans.of(site) for site in found]
    assert len(graphs) == 3 and len(traces) == 1
    alone = [Plans(shared=False).of(site) for site in found]
    assert len(traces) == 4
    assert list(map(shown, graphs)) == list(map(shown, alone))


def storages(nodes: Iterable[fx.Node]) -> set[int]:
    values = (n.meta["val"] for n in nodes)
    return {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}


def test_what_is_no_input_is_memory_of_its_own():
    """torch asks storages which values are the same memory."""
    plans, found = Plans(), sites(1e-6, 1e-6)
    made = []
    for site in found:
        graph, given = plans.of(site), storages(site.inputs)
        assert given == storages(n for n in graph.nodes if n.op == "placeholder")
        made.append(storages(n for n in graph.nodes if n.op == "call_function") - given)
    assert made[0] and len(made[0]) == len(made[1]) and not made[0] & made[1]


def test_another_constant_is_another_plan(traces):
    plans, found = Plans(), sites(1e-6, 1e-5)
    first, second = map(plans.of, found)
    assert len(traces) == 2 and shown(first) != shown(second)


def fake(*shape: int, stride=None, dtype=torch.float32) -> Tensor:
    with MODE:
        made = torch.empty(shape, dtype=dtype)
        return made if stride is None else made.as_strided(shape, stride)


MODE = torch._subclasses.FakeTensorMode()
ELSEWHERE = fake(4, 6)
CALLS = {
    "a number": (lambda x: x * 2.0, lambda x: x * 3.0),
    "a number's kind": (lambda x: x * 2, lambda x: x * 2.0),
    "an operation": (lambda x: x + x, lambda x: x * x),
    "the order": (lambda x: (x * 2) - (x * 3), lambda x: (x * 3) - (x * 2)),
    "what is read": (lambda x: (x * 2, x * 3)[0] + 1, lambda x: (x * 2, x * 3)[1] + 1),
    "what is returned": (lambda x: (x * 2, x * 3)[0], lambda x: (x * 2, x * 3)[1]),
    "from elsewhere": (lambda x: x + ELSEWHERE, lambda x: x + ELSEWHERE),
    "returned from elsewhere": (lambda x: ELSEWHERE, lambda x: ELSEWHERE),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_not_alike(name):
    one, other = CALLS[name]
    assert calls.steps(one, [fake(4, 6)]) != calls.steps(other, [fake(4, 6)])


INPUTS = {
    "shape": fake(6, 4),
    "strides": fake(4, 6, stride=(1, 4)),
    "dtype": fake(4, 6, dtype=torch.float16),
    "a number": 3,
}


def test_alike():
    steps = calls.steps(lambda x: x * 2 + 1, [fake(4, 6)])
    assert steps == calls.steps(lambda x: x * 2 + 1, [fake(4, 6)])
    one = fake(4, 6)
    assert calls.steps(torch.add, [one, one]) != calls.steps(torch.add, [one, fake(4, 6)])


@pytest.mark.parametrize("name", INPUTS)
def test_other_inputs(name):
    def call(x):
        return torch.ones(3)

    assert calls.steps(call, [INPUTS[name]], [ELSEWHERE]) != calls.steps(call, [fake(4, 6)])


@pytest.mark.slow
def test_plans_as_on_a_gpu(tmp_path):
    """Of every example: one launch at least; each says what torch would read that it writes, at no
    cost; a copied plan is the plan."""
    found = printed("_plans_script", tmp_path)
    assert len(found) > 40 and all(found.values())
    for name, plans in found.items():
        for launches, made, wrong, copied in plans:
            assert launches > 0 and made == 0 and not wrong and copied, name
