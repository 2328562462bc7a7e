"""The plain model's compressor, fused, against itself: a prefill and 64 decode steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dsv4fuse.kernels import _common

from dsv4fuse import Report, backend
from examples.deepseek_v4.common import Rope, Step
from examples.deepseek_v4.compressor import Compressor
from examples.deepseek_v4.config import Config

STEPS, NEXT_N = 64, 2
HIDDEN, DIM, MAX_LEN = 32, 32, 320
LENGTHS = (1, 7, 130)  # of the requests, before the first decode step


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """Fused ops run their references: 64 steps take the interpreter minutes."""
    monkeypatch.setattr(_common, "INTERPRETED", False)
    with torch.no_grad():
        yield


def build(ratio: int, overlap: bool) -> Compressor:
    config = dataclasses.replace(Config(layers=("csa",)), hidden_size=HIDDEN)
    module = Compressor(config, DIM, ratio, overlap).bfloat16()
    generator = torch.Generator().manual_seed(ratio)
    for name, p in module.named_parameters():
        wide = "bias" in name or "norm" in name
        p.data = torch.randn(p.shape, generator=generator).to(torch.float32 if wide else p.dtype)
    module.allocate(len(LENGTHS), MAX_LEN, NEXT_N)
    return module.requires_grad_(False)


def compiled(module: Compressor):
    options = {"select": "always", "inner": "eager"}
    return torch.compile(module, backend=backend.dsv4fuse, options=options, fullgraph=True)


def equal(plain: Compressor, fused: Compressor) -> None:
    """Every buffer but the spare row of the entries, where nothing is written any more."""
    for name, a in plain.named_buffers():
        b = dict(fused.named_buffers())[name]
        assert torch.equal(a[:, :-1], b[:, :-1]), name


def step(positions: torch.Tensor, prefill: bool) -> Step:
    rows = torch.arange(len(LENGTHS)).unsqueeze(1)
    return Step(torch.zeros_like(positions), positions, rows, prefill, past=False)


@pytest.mark.parametrize("ratio, overlap", [(4, True), (128, False)])
def test_a_prefill_and_64_steps(ratio, overlap):
    """Requests of different lengths cross window boundaries at different steps."""
    plain, fused = build(ratio, overlap), build(ratio, overlap)
    rope = Rope(16, 10000.0)
    rope.allocate(MAX_LEN, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    longest = torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1)
    lengths = torch.tensor(LENGTHS).unsqueeze(1)
    prompt = torch.where(longest < lengths, longest, -1)
    x = torch.randn(*prompt.shape, HIDDEN, generator=generator).bfloat16()
    run = compiled(fused)
    assert torch.equal(run(x, rope, step(prompt, True)), plain(x, rope, step(prompt, True)))
    equal(plain, fused)
    assert Report.of(run).counts() == {"compress_kv": 1}

    torch._dynamo.reset()
    run, closed = compiled(fused), 0
    for i in range(STEPS):
        positions = lengths + NEXT_N * i + torch.arange(NEXT_N)
        x = torch.randn(*positions.shape, HIDDEN, generator=generator).bfloat16()
        found = run(x, rope, step(positions, False))
        assert torch.equal(found, plain(x, rope, step(positions, False))), i
        equal(plain, fused)
        closed += int(((positions + 1) % ratio == 0).sum())
    report = Report.of(run)  # of the module: both graphs
    assert report.counts() == {"compress_kv": 2}
    assert "Gather" in str(report) and "not computed" in str(report)
    assert closed == (96 if ratio == 4 else 3)
