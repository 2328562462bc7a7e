"""Decode on transformers' own cache, which grows by concatenation: symbolic counts of keys.

One attention of each compressed kind, its cache and a ratio of 4: enough steps for windows to
close, for Dynamo to learn which sizes change, and for its graphs to be used again.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from dsv4fuse.kernels import _common

from dsv4fuse import Report, backend

from .test_plain_model import CSA, HCA, SIZES, YARN, randomize_reference

PROMPT, STEPS, BATCH = 38, 12, 3


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRETED", False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        yield


def attention(kind):
    """A layer's attention in bf16, and a prefilled cache of its own each time it is asked for."""
    hf = pytest.importorskip("transformers.models.deepseek_v4")
    from transformers import DynamicCache

    one = dict(num_hidden_layers=1, layer_types=[kind], mlp_layer_types=["moe"])
    sizes = SIZES | one | dict(compress_rates={CSA: 4, HCA: 4})
    model = hf.DeepseekV4ForCausalLM(hf.DeepseekV4Config(**sizes, rope_parameters=YARN))
    randomize_reference(model)
    layer = model.to(torch.bfloat16).eval().model.layers[0].self_attn
    x = torch.randn(BATCH, PROMPT + STEPS, 64, generator=torch.Generator().manual_seed(3))
    x = x.to(torch.bfloat16)

    def call(start, stop):
        positions = torch.arange(start, stop).expand(BATCH, -1)
        rotation = model.model.rotary_emb(x, positions, "compress")
        return x[:, start:stop].contiguous(), {"compress": rotation}, positions

    def roll(step):
        cache = DynamicCache(config=model.config)
        mask = torch.full((PROMPT, PROMPT), -torch.inf, dtype=x.dtype).triu(1)
        layer(*call(0, PROMPT), mask.expand(BATCH, 1, -1, -1), cache)
        calls = (call(at, at + 1) for at in range(PROMPT, PROMPT + STEPS))
        window = torch.zeros(BATCH, 1, 1, SIZES["sliding_window"], dtype=x.dtype)
        return torch.stack([step(*given, window, cache)[0] for given in calls])

    return layer, roll


def compiled(layer, inner, seen):
    """``seen`` gets each graph."""

    def compiler(gm, inputs):
        seen.append(gm)
        return inner(gm, inputs)

    return torch.compile(layer, backend=compiler, fullgraph=True)


@pytest.mark.parametrize("kind", [HCA, pytest.param(CSA, marks=pytest.mark.long)])
def test_decode(kind):
    layer, roll = attention(kind)
    plain = torch._dynamo.lookup_backend("aot_eager_decomp_partition")
    options = {"select": "always", "inner": "eager"}
    graphs, bare = [], []
    found = roll(compiled(layer, lambda gm, x: backend.dsv4fuse(gm, x, options=options), graphs))
    torch._dynamo.reset()
    wanted = roll(compiled(layer, plain, bare))
    assert len(graphs) <= len(bare) < STEPS  # no recompilation that is not torch's own
    counts = Counter(Report.of(layer).counts())
    every = ("sink_attention", "inv_rope_grouped_bmm", *["indexer_logits"] * (kind == CSA))
    assert {n: counts[n] for n in every} == dict.fromkeys(every, len(graphs)), Report.of(layer)
    assert counts["compress_kv"] >= 2  # the steps that close a window, in a graph or two
    step = torch.finfo(torch.bfloat16).eps * wanted.abs().amax(-1, keepdim=True)
    assert ((found - wanted).abs() / step).max() <= 2
