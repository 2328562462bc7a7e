"""``transformers`` with its fine-grained fp8 linears: what is quantised is fused with the norm or
the SwiGLU in front, once for all linears that read it."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common

from dsv4fuse import Report, backend

from . import _deepgemm
from .test_models import OURS, same, unfused
from .test_plain_model import CSA, HCA, SIZES, YARN

KINDS = ["sliding_attention", CSA, HCA]
# Blocks are of 128 channels; an index head of 64 has channels that do not turn, as a real one has.
WIDE = dict(hidden_size=256, moe_intermediate_size=256, q_lora_rank=256, head_dim=128,
            o_lora_rank=128, index_head_dim=64, hc_sinkhorn_iters=3)  # fmt: skip


def expected(kinds):
    """Sites in layers of these kinds, all but attention, whose sums have no order."""
    n, csa = len(kinds), kinds.count("csa")
    return {
        # The norms in front of q_a and of the experts belong to the hyper-connections.
        "norm_quant": n,
        "clamp_swiglu_quant": 2 * n,
        "norm_rope_cache": n + csa,
        "compress_kv": 2 * csa + kinds.count("hca"),
        "indexer_logits": csa,
        "inv_rope_quant": n,
        "hyper_connection_pre": 1,
        "hyper_connection_post": 1,
        "hyper_connection_post_pre_norm": 2 * n - 1,
        "hyper_head": 1,
        "moe_router": n,
        "expert_sort": n,
    }


@pytest.fixture(autouse=True)
def _prepared(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRETED", False)
    _deepgemm.install(monkeypatch)
    with torch.no_grad():
        yield


def random_codes(weight, scale, generator):
    """An fp8 weight of about unit gain, its blocks' scales powers of two."""
    gain = 2.0 * weight.shape[-1] ** -0.5 / 128
    weight.copy_((torch.randn(weight.shape, generator=generator) * 64).to(weight.dtype))
    powers = torch.randint(-1, 2, scale.shape, generator=generator).float()
    scale.copy_((gain * 2.0**powers).log2().round().exp2().to(scale.dtype))


def fp8_model(kinds):
    """A small model as its quantiser makes it, with random weights; nothing is fetched."""
    hf = pytest.importorskip("transformers.models.deepseek_v4")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    n = len(kinds)
    layers = dict(num_hidden_layers=n, layer_types=kinds, mlp_layer_types=["moe"] * n)
    config = hf.DeepseekV4Config(**SIZES | WIDE | layers, rope_parameters=YARN)
    model = hf.DeepseekV4ForCausalLM(config).to(torch.bfloat16)
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(scale_fmt="ue8m0"))
    quantizer._process_model_before_weight_loading(model)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, fp8.FP8Linear | fp8.FP8Experts):
            module.to_empty(device="cpu")
            names = [n for n, p in module.named_parameters(recurse=False) if p.itemsize == 1]
            for scale in (n for n in names if n.endswith("_scale_inv")):
                weight = getattr(module, scale.removesuffix("_scale_inv"))
                random_codes(weight, getattr(module, scale), generator)
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            weight.normal_(float("norm" in name), 0.3, generator=generator)
        elif weight.itemsize > 1:
            weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5, generator=generator)
    model.config._experts_implementation = "deepgemm"
    return model.eval()


def prefill(kinds, device="cpu", **options):
    """What the model answers with and without dsv4fuse, and the report."""
    model = fp8_model(kinds).to(device)
    tokens = torch.randint(97, (2, 37), generator=torch.Generator().manual_seed(1)).to(device)
    wanted = unfused(model)(tokens, use_cache=False).logits
    torch._dynamo.reset()
    options = {"select": "always", "exclude": ["sink_attention"], "strict": True} | options
    options["expect"] = expected([OURS[kind] for kind in kinds])
    run = torch.compile(model, backend=backend.dsv4fuse, options=options, fullgraph=True)
    return run(tokens, use_cache=False).logits, wanted, Report.of(model)


@pytest.mark.parametrize(
    "kinds", [KINDS[:1], pytest.param(KINDS, marks=pytest.mark.long)], ids=len
)
def test_prefill(kinds):
    """With an indexer, the codes of q's latent are made once for both, and no norm is kept."""
    found, wanted, report = prefill(kinds, inner="eager")
    same(found, wanted, torch.bfloat16)
    reasons = {name: {s.reason for s in report.sites if (s.fusion, s.status) == (name, "taken")}
               for name in ("norm_quant", "clamp_swiglu_quant")}  # fmt: skip
    assert reasons["clamp_swiglu_quant"] == {"Clamp → swiglu (silu) → fp8 quant."}
    # transformers 5.17 rounds in front of the weight, later ones behind it.
    norms = [{f"Norm ({rounding}) → fp8 quant."} for rounding in ("weight", "once")]
    assert reasons["norm_quant"] in norms
    assert any("inside of hyper_connection" in s.reason for s in report.with_status("declined"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_prefill_with_kernels():
    """Each site is checked against its own nodes before it is taken."""
    found, wanted, _ = prefill(KINDS, "cuda")
    assert found.isfinite().all() and found.shape == wanted.shape
