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
}
# The product with the rotated output only where sums are rounded: fp32 sums keep their order.
TURNED = {torch.bfloat16: "inv_rope_grouped_bmm", torch.float32: "inv_rope_quant"}


# Each compiles eight graphs; the other combinations wait for make test-long.
SOON, LONG = {("bf16", "given", 19), ("fp32", "cut inside", 6)}, pytest.mark.long


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


def run(model, forward, length, table, steps=3):
    """Last logits of a prefill and of decode steps, and the caches after each."""
    generator = torch.Generator().manual_seed(length)
    dtype, seen = model.head.weight.dtype, []
    for start, size in [(0, length), *((length + i, 1) for i in range(steps))]:
        x = torch.randn(2, size, SIZES.dim, generator=generator).to(dtype)
        cis = model.freqs_cis[start : start + size].clone() if table == "given" else None
        seen.append(forward(x, start, cis))
        seen += [layer.attn.kv_cache.clone() for layer in model.layers]
    return seen


def compiled(model):
    expect = EXPECTED | {TURNED[model.head.weight.dtype]: N_LAYERS}
    options = {"select": "always", "inner": "eager", "expect": expect}
    return torch.compile(model, backend=backend.dsv4fuse, options=options, fullgraph=True)


def close(found, wanted, near):
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b.float()).abs().max() <= near * b.float().abs().max()


# Shorter than the window, so that a decode comes round; longer, so that the prefill's write wraps
# and is two. An int position makes each row of the ring a graph of its own.
@pytest.mark.parametrize(
    "dtype, table, length",
    [
        pytest.param(d, t, n, id=f"{name}-{t}-{n}", marks=[] if (name, t, n) in SOON else LONG)
        for d, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
        for t in ("given", "cut inside")
        for n in (6, 19)
    ],
)
def test_prefill_and_decode(dtype, table, length):
    eager, ours, bare = build(dtype), build(dtype), build(dtype)
    unfused = torch.compile(bare, backend="aot_eager_decomp_partition", fullgraph=True)
    found = run(ours, compiled(ours), length, table)
    torch._dynamo.reset()  # its limit of graphs counts for the code, whatever the backend
    narrow = dtype == torch.bfloat16
    close(found, run(bare, unfused, length, table), 0.0 if narrow else 1e-5)
    close(found, run(eager, eager, length, table), 0.03 if narrow else 1e-5)

    report = Report.of(ours)
    for site in report.with_status("taken"):
        if site.fusion == "norm_rope_cache":
            assert "Q: norm" in site.reason and "kv: norm" in site.reason
            assert "fake quant" in site.reason
            # The wrapped prefill writes twice, a launch once: there the copies stay.
            wraps = site.graph == 0 and length > SIZES.window
            assert wraps or "cache write" in site.reason
    weighted = [s for s in report.sites if "routing weight" in s.reason]
    assert len(weighted) == report.graphs * N_LAYERS * SIZES.n_experts
