"""Regional compilation: torch.compile per layer, where one compilation serves all of a kind."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from dsv4fuse.kernels import _common

from dsv4fuse import Report, backend, compat
from examples.deepseek_v4 import PRESETS, Transformer, randomize

from .test_models import expected_apart

FLASH = PRESETS["flash"].layers  # 43
# Attention and router: window and csa by token id (layers 0 to 2), csa and hca by score.
KINDS = ("window", "csa", "csa", "hca")


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRETED", False)
    with torch.no_grad(), compat.without_caches():
        yield


def build(layers: tuple[str, ...], n_hash: int) -> Transformer:
    config = dataclasses.replace(
        PRESETS["tiny"], layers=layers, n_hash_layers=n_hash, n_mtp_layers=0
    )
    model = Transformer(config)
    randomize(model)
    model.allocate(2, 64)
    return model


def decode(model: Transformer) -> torch.Tensor:
    return model.decode(torch.tensor([[3], [4]]), torch.tensor([[40], [41]]))


def compiled(model: Transformer, compiler) -> tuple[int, float]:
    """How often the layers were compiled in a decode step, and the CPU seconds that it took longer
    than the next one."""
    calls = []

    def counted(gm, inputs):
        calls.append(gm)
        return compiler(gm, inputs)

    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend=counted, fullgraph=True)
    marks = [time.process_time()]
    for _ in range(2):
        decode(model)
        marks.append(time.process_time())
    first, second = marks[1] - marks[0], marks[2] - marks[1]
    return len(calls), first - second


def test_one_graph_serves_all_layers_of_a_kind():
    count, _ = compiled(build(("window", "window", "csa", "csa"), 2), lambda gm, inputs: gm)
    assert count == 2


@pytest.mark.long
def test_43_layers_compile_as_fast_as_their_kinds():
    def fusing(gm, inputs):
        options = {"select": "always", "inner": "eager"}
        return backend.dsv4fuse(gm, inputs, options=options)

    compiled(build(("window",), 1), fusing)  # imports, patterns
    few, whole = build(KINDS, 2), build(FLASH, 3)
    wanted = decode(whole)
    kinds, spent_on_kinds = compiled(few, fusing)
    count, spent = compiled(whole, fusing)
    assert kinds == count == len(KINDS)
    print(f"{count} graphs: {spent_on_kinds:.1f} s for the kinds, {spent:.1f} s for 43 layers")
    assert spent <= 1.2 * spent_on_kinds
    assert Report.of(whole).counts() == expected_apart(KINDS, torch.float32, decode=True, by_hash=2)
    found = decode(whole)
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 1e-5
