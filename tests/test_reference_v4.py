"""DeepSeek's own spelling: every fusion is taken in prefill and decode, nothing changes."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common

from dsv4fuse import Report, backend

from .reference_v4 import Model, Sizes

SIZES, N_LAYERS = Sizes(), 2
# Of a layer: q and kv with fake quant and cache write in one; experts and the shared one.
EXPECTED = {
    "norm_rope_cache": N_LAYERS,
    "clamp_swiglu_quant": N_LAYERS * (SIZES.n_experts + 1),
    "inv_rope_quant": N_LAYERS,
}


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """Fused ops run their references: the interpreter takes minutes for a model."""
    monkeypatch.setattr(_common, "INTERPRETED", False)
    with torch.no_grad():
        yield


def build(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = Model(SIZES, N_LAYERS)
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.state_dict().items():
        wide = weight.dim() > 1
        std = 2 * weight.shape[-1] ** -0.5 if wide else 0.3
        weight.normal_(float("norm" in name and not wide), std, generator=generator)
    return model


def run(model, forward, length, steps=10):
    """Last logits of a prefill and of decode steps, and the caches after each."""
    generator = torch.Generator().manual_seed(length)
    dtype, seen = model.head.weight.dtype, []
    for start, size in [(0, length), *((length + i, 1) for i in range(steps))]:
        x = torch.randn(2, size, 96, generator=generator).to(dtype)
        seen.append(forward(x, start))
        seen += [layer.attn.kv_cache.clone() for layer in model.layers]
    return seen


def compiled(model, expect=EXPECTED, **options):
    options = {"select": "always", "inner": "eager", "strict": True, "expect": expect} | options
    return torch.compile(model, backend=backend.dsv4fuse, options=options, fullgraph=True)


# Shorter than the window, as long, and longer so that the write wraps.
@pytest.mark.parametrize("length", [5, 8, 19])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_prefill_and_decode(dtype, length):
    eager, ours, bare = build(dtype), build(dtype), build(dtype)
    torch._dynamo.config.patch(recompile_limit=64)
    unfused = torch.compile(bare, backend="aot_eager_decomp_partition", fullgraph=True)
    found = run(ours, compiled(ours), length)
    wanted = run(bare, unfused, length)
    for a, b in zip(found, wanted, strict=True):
        close = dict(rtol=0, atol=0) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a, b, **close)
    for a, b in zip(found, run(eager, eager, length), strict=True):
        near = 0.03 if dtype == torch.bfloat16 else 1e-5
        assert (a.float() - b.float()).abs().max() <= near * b.float().abs().max()

    report = Report.of(ours)
    how = {site.reason for site in report.sites if site.fusion == "norm_rope_cache"}
    assert all("fake quant" in reason and "cache write" in reason for reason in how), how
    ways = {site.reason for site in report.sites if site.fusion == "clamp_swiglu_quant"}
    assert any("routing weight" in reason for reason in ways), ways
