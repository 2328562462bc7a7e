"""Checkpoints in DeepSeek's layout: small files made in it, loaded, to the bit.

What is quantised and how the values come back is written out here number by number, apart from
the loader; the names are held against transformers, which writes the same layout.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from examples.deepseek_v4 import PRESETS, Config, Transformer, randomize
from examples.deepseek_v4.checkpoint import load_checkpoint, rename, widened

from .test_plain_model import SIZES, YARN, error, randomize_reference

E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# 160 and 96: blocks of 128 that are cut off, three fp4 groups in a row
CONFIG = dataclasses.replace(
    PRESETS["tiny"], layers=("window", "csa"), hidden_size=160, q_lora_rank=96, expert_size=96
)
DISK = {  # one of each of the model's names, and its name on disk
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "norm.weight": "norm.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "layers.1.attn_hc.base": "layers.1.hc_attn_base",
    "layers.1.input_layernorm.weight": "layers.1.attn_norm.weight",
    "layers.1.self_attn.sinks": "layers.1.attn.attn_sink",
    "layers.1.self_attn.q_a_norm.weight": "layers.1.attn.q_norm.weight",
    "layers.1.self_attn.kv_norm.weight": "layers.1.attn.kv_norm.weight",
    "layers.1.self_attn.q_b_proj.weight": "layers.1.attn.wq_b.weight",
    "layers.1.self_attn.kv_proj.weight": "layers.1.attn.wkv.weight",
    "layers.1.self_attn.o_a_proj.weight": "layers.1.attn.wo_a.weight",
    "layers.1.self_attn.compressor.position_bias": "layers.1.attn.compressor.ape",
    "layers.1.self_attn.compressor.gate_proj.weight": "layers.1.attn.compressor.wgate.weight",
    "layers.1.self_attn.compressor.kv_norm.weight": "layers.1.attn.compressor.norm.weight",
    "layers.1.self_attn.indexer.q_b_proj.weight": "layers.1.attn.indexer.wq_b.weight",
    "layers.1.self_attn.indexer.weights_proj.weight": "layers.1.attn.indexer.weights_proj.weight",
    "layers.1.mlp.gate.e_score_correction_bias": "layers.1.ffn.gate.bias",
    "layers.0.mlp.gate.tid2eid": "layers.0.ffn.gate.tid2eid",
    "layers.1.mlp.shared_experts.up_proj.weight": "layers.1.ffn.shared_experts.w3.weight",
    "mtp.e_proj.weight": "mtp.0.e_proj.weight",
    "mtp.enorm.weight": "mtp.0.enorm.weight",
    "mtp.norm.weight": "mtp.0.norm.weight",
    "mtp.hc_head.hc_scale": "mtp.0.hc_head_scale",
    "mtp.layer.self_attn.q_a_proj.weight": "mtp.0.attn.wq_a.weight",
    "mtp.layer.mlp.gate.weight": "mtp.0.ffn.gate.weight",
    "mtp.layer.ffn_hc.scale": "mtp.0.hc_ffn_scale",
    "mtp.layer.post_attention_layernorm.weight": "mtp.0.ffn_norm.weight",
}


@pytest.mark.parametrize("ours", DISK)
def test_names(ours):
    assert ours in Transformer(CONFIG).state_dict()
    assert rename(DISK[ours]) == ours and name_on_disk(ours) == DISK[ours]


def quantised(
    weight: Tensor, block: tuple[int, int], largest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight in units of its block's scale, the smallest power of two that lets its values
    fit; the scale of each block, and of each value."""
    (n, k), (rows, columns) = weight.shape, block
    padded = F.pad(weight, (0, -k % columns, 0, -n % rows))
    blocks = padded.unfold(0, rows, rows).unfold(1, columns, columns)
    scale = (blocks.abs().amax((-2, -1)) / largest).log2().ceil().exp2()
    of_each = torch.kron(scale, torch.ones(block))[:n, :k]
    return weight / of_each, scale.to(E8M0), of_each


def fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the values that they stand for."""
    units, scale, of_each = quantised(weight, (128, 128), 448.0)
    codes = units.to(E4M3)
    return codes, scale, codes.float() * of_each


def fp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    units, scale, of_each = quantised(weight, (1, 32), 6.0)
    nearest = (units.abs().unsqueeze(-1) - torch.tensor(FP4)).abs().argmin(-1)
    codes = (nearest + 8 * (units < 0)).to(torch.uint8)
    packed = codes[:, 0::2] + 16 * codes[:, 1::2]
    return packed.view(torch.int8), scale, torch.tensor(FP4)[nearest] * units.sign() * of_each


def on_disk(model: Transformer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model as files have it, and the state that is to come back from them."""
    disk, state = {}, {}

    def put(name: str, quantise, value: Tensor) -> Tensor:
        codes, scale, true = quantise(value)
        disk.update({f"{name}.weight": codes, f"{name}.scale": scale})
        return true

    for ours, value in model.state_dict().items():
        name = name_on_disk(ours)
        if ".experts." in ours:
            home = name.rpartition(".")[0]
            matrices = ("w2",) if ours.endswith("down_proj") else ("w1", "w3")
            state[ours] = torch.stack([
                torch.cat([put(f"{home}.{number}.{matrix}", fp4, piece) for matrix, piece in
                           zip(matrices, expert.chunk(len(matrices)), strict=True)])
                for number, expert in enumerate(value)
            ])  # fmt: skip
        elif "_proj.weight" in ours and "compressor" not in ours and "weights_proj" not in ours:
            state[ours] = put(name.removesuffix(".weight"), fp8, value)
        else:
            disk[name] = state[ours] = value.clone()
    return disk, state


def name_on_disk(ours: str) -> str:
    name = ours.replace("mtp.layer.", "mtp.").replace("mtp.", "mtp.0.", 1)
    pairs = {
        "embed_tokens": "embed", "lm_head": "head", "hc_head.hc_": "hc_head_",
        ".self_attn.": ".attn.", ".mlp.": ".ffn.", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "attn_hc.": "hc_attn_", "ffn_hc.": "hc_ffn_",
        "position_bias": "ape", "e_score_correction_bias": "bias", ".sinks": ".attn_sink",
        "q_a_norm": "q_norm", "compressor.kv_norm": "compressor.norm",
        "shared_experts.gate_proj": "shared_experts.w1",
        "shared_experts.down_proj": "shared_experts.w2",
        "shared_experts.up_proj": "shared_experts.w3",
        ".gate_proj": ".wgate", "q_a_proj": "wq_a", "q_b_proj": "wq_b", "o_a_proj": "wo_a",
        "o_b_proj": "wo_b", ".kv_proj": ".wkv",
    }  # fmt: skip
    for mine, theirs in pairs.items():
        name = name.replace(mine, theirs)
    return name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two files and an index, and the state that is to come back."""
    model = Transformer(CONFIG)
    randomize(model)
    disk, state = on_disk(model)
    folder = tmp_path_factory.mktemp("checkpoint")
    # Scales and matrices in different files, as the cut may fall anywhere.
    halves = ({k: v.contiguous() for k, v in disk.items() if k.endswith("scale") is last}
              for last in (False, True))  # fmt: skip
    index = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(half, folder / file)
        index |= dict.fromkeys(half, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_value_comes_back(saved, dtype):
    folder, state = saved
    torch.set_default_dtype(dtype)
    model = Transformer(CONFIG)
    torch.set_default_dtype(torch.float32)
    load_checkpoint(model, folder)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name


def test_a_model_without_an_mtp_head_leaves_it_out(saved):
    folder, state = saved
    model = Transformer(dataclasses.replace(CONFIG, n_mtp_layers=0))
    load_checkpoint(model, folder)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def test_a_lost_expert_is_missed(tmp_path):
    model = Transformer(CONFIG)
    randomize(model)
    disk, _ = on_disk(model)
    del disk["layers.1.ffn.experts.7.w2.weight"], disk["layers.1.ffn.experts.7.w2.scale"]
    save_file({k: v.contiguous() for k, v in disk.items()}, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match=r"lacks .*\['layers.1.mlp.experts.down_proj'\]"):
        load_checkpoint(Transformer(CONFIG), tmp_path)


def test_what_does_not_fit_is_refused(saved):
    folder, _ = saved
    with pytest.raises(KeyError, match="has no layers.1"):
        load_checkpoint(Transformer(dataclasses.replace(CONFIG, layers=("window",))), folder)
    with pytest.raises(KeyError, match="lacks .*layers.2"):
        layers = (*CONFIG.layers, "hca")
        load_checkpoint(Transformer(dataclasses.replace(CONFIG, layers=layers)), folder)
    with pytest.raises(ValueError, match="the model's"):
        load_checkpoint(Transformer(dataclasses.replace(CONFIG, vocab_size=64)), folder)
    with pytest.raises(FileNotFoundError, match="no .*safetensors"):
        load_checkpoint(Transformer(CONFIG), folder / "nothing")


def test_wrong_scales_are_refused():
    with pytest.raises(ValueError, match=r"has scales \[2, 1\], found \[1, 1\]"):
        widened(torch.zeros(160, 96).to(E4M3), torch.ones(1, 1).to(E8M0))
    with pytest.raises(ValueError, match="not torch.bfloat16"):
        widened(torch.zeros(160, 96).bfloat16(), torch.ones(2, 1))


def test_every_fp4_code():
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scale = torch.full((1, 16), 4.0).to(E8M0)
    value = [4 * (FP4[c % 8] if c < 8 else -FP4[c % 8]) for c in range(16)]
    wanted = [value[c] for byte in range(256) for c in (byte % 16, byte // 16)]
    assert widened(packed, scale).tolist() == [wanted]


def test_the_layout_is_the_one_transformers_writes(tmp_path):
    """Names and places, not quantised: the logits of the model that was saved."""
    hf = pytest.importorskip("transformers.models.deepseek_v4")
    config = hf.DeepseekV4Config(**SIZES, rope_parameters=YARN)
    reference = hf.DeepseekV4ForCausalLM(config).eval().requires_grad_(False)
    randomize_reference(reference)
    reference.save_pretrained(tmp_path)
    model = Transformer(Config.from_transformers(config))
    load_checkpoint(model, tmp_path)
    model.allocate(1, 37)
    tokens = torch.randint(97, (1, 37), generator=torch.Generator().manual_seed(0))
    found = model(tokens, torch.arange(37).view(1, -1), True)
    assert error(found, reference(tokens, use_cache=False).logits) < 1e-5
