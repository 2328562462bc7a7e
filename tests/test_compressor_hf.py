"""The compressors of transformers, one module at a time: their prefill is one site each."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common

from dsv4fuse import Report, backend

modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
HIDDEN, BATCH = 32, 2
# Which class: (sites of the pool, is the window before in them)
COMPRESSORS = {"HCA": (1, False), "CSA": (2, True)}  # CSA's indexer has a compressor of its own


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRETED", False)
    with torch.no_grad():
        yield


def build(kind: str) -> torch.nn.Module:
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    rates = {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4}
    config = DeepseekV4Config(
        hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=2, head_dim=64,
        q_lora_rank=16, index_n_heads=2, index_head_dim=32, index_topk=4, qk_rope_head_dim=16,
        compress_rates=rates, num_local_experts=4, o_groups=2, o_lora_rank=8,
    )  # fmt: skip
    module = getattr(modeling, f"DeepseekV4{kind}Compressor")(config)
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    return module.bfloat16().requires_grad_(False)


@pytest.mark.parametrize("length", [22, 24])  # 24: whole windows, which are views of a projection
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_prefill(kind, length):
    module, generator = build(kind), torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, length, HIDDEN, generator=generator).bfloat16()
    q = torch.randn(BATCH, length, 16, generator=generator).bfloat16()
    args = (x, q, torch.arange(length).expand(BATCH, -1), None, 0)
    options = {"select": "always", "inner": "eager"}
    fused = torch.compile(module, backend=backend.dsv4fuse, options=options, fullgraph=True)
    for found, wanted in zip(fused(*args), module(*args), strict=True):
        assert torch.equal(found, wanted)
    count, before = COMPRESSORS[kind]
    report = Report.of(fused)
    assert report.counts()["compress_kv"] == count
    reasons = [s.reason for s in report.sites if s.fusion == "compress_kv"]
    assert all(("window before" in r) == before and "norm" in r for r in reasons)
