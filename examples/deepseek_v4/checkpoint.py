"""A checkpoint in the layout DeepSeek publishes, into the plain model.

Safetensors files, with or without an index. A matrix in fp8 (e4m3) or fp4 (e2m1, two in a byte,
the first in the low bits) has a tensor ``….scale`` of powers of two (e8m0) beside it: one for each
block of 128 × 128 of fp8, one for each 32 in a row of fp4. Values are widened exactly and rounded
once, to the dtype the model has. Experts lie apart on disk, the model has them stacked.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from .model import Transformer

# In order: each is tried on what the ones before it have left.
RENAMES = (
    (r"^model\.", ""),
    (r"^embed\.", "embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^mtp\.0\.(attn|ffn|hc_attn|hc_ffn)", r"mtp.layer.\1"),
    (r"(^|\.)hc_head_(fn|base|scale)$", r"\1hc_head.hc_\2"),
    (r"^mtp\.0\.", "mtp."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"(\.self_attn|\.compressor)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.(wq_a|wq_b|wo_a|wo_b)\.", lambda m: f".{m[1][1:]}_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
)
EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.w([123])\.weight$")
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 += tuple(-value for value in FP4)
FP8_BLOCK, FP4_GROUP = (128, 128), (1, 32)


def rename(key: str) -> str:
    """A key on disk → the model's."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def widened(weight: Tensor, scale: Tensor) -> Tensor:
    """weight ``[N, K]`` e4m3 with scale ``[⌈N/128⌉, ⌈K/128⌉]``, or ``[N, K/2]`` bytes of fp4 with
    scale ``[N, K/32]``; returns ``[N, K]`` fp32, exactly. The scale is e8m0 or fp32."""
    if weight.element_size() != 1:
        raise ValueError(f"a matrix with a scale is fp8 or packed fp4, not {weight.dtype}")
    if weight.dtype == torch.float8_e4m3fn:
        values, block = weight.float(), FP8_BLOCK
    else:
        codes = weight.view(torch.uint8).int()
        table = torch.tensor(FP4, device=weight.device)
        values, block = table[torch.stack((codes & 15, codes >> 4), dim=-1)].flatten(-2), FP4_GROUP
    wanted = tuple(-(-n // b) for n, b in zip(values.shape, block, strict=True))
    if tuple(scale.shape) != wanted:
        raise ValueError(f"a matrix {list(values.shape)} has scales {list(wanted)}, "
                         f"found {list(scale.shape)}")  # fmt: skip
    for axis, n in enumerate(block):
        scale = scale.float().repeat_interleave(n, dim=axis)
    return values * scale[: values.shape[0], : values.shape[1]]


def tensors(folder: str | pathlib.Path) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of every file of a checkpoint, matrices widened; a scale may lie in another
    file than its matrix."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    opened = [safe_open(file, framework="pt") for file in files]
    home = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
    for key, file in home.items():
        scale = f"{key.removesuffix('weight')}scale"
        if scale != key and scale in home:
            yield key, widened(file.get_tensor(key), home[scale].get_tensor(scale))
        elif not _is_scale(key, home):
            yield key, file.get_tensor(key)


def _is_scale(key: str, keys: Mapping[str, object]) -> bool:
    return key.endswith(".scale") and f"{key.removesuffix('scale')}weight" in keys


def _owner(name: str) -> str:
    """The model's tensor that this one is, or is a part of."""
    return EXPERT.sub(lambda m: f"{m[1]}.{'down' if m[3] == '2' else 'gate_up'}_proj", name)


def _place(name: str, state: Mapping[str, Tensor]) -> Tensor | None:
    """Where the model keeps a tensor: a parameter, or an expert's part of one."""
    expert = EXPERT.match(name)
    if expert is None:
        return state.get(name)
    stacked, number, matrix = state.get(_owner(name)), int(expert[2]), expert[3]
    if stacked is None or number >= len(stacked):
        return None
    return stacked[number] if matrix == "2" else stacked[number].chunk(2)[matrix == "3"]


@torch.no_grad()
def load_checkpoint(model: Transformer, folder: str | pathlib.Path) -> None:
    """Fills the model from a checkpoint in DeepSeek's layout.

    Raises KeyError for a tensor that the model has no place for or that it misses (without an MTP
    head in the model, those of the checkpoint's are left out, and the other way round), ValueError
    for one of another shape.
    """
    state = model.state_dict()
    missing = {key: value.numel() for key, value in state.items()}
    for key, tensor in tensors(folder):
        name = rename(key)
        if model.mtp is None and name.startswith("mtp."):
            continue
        place = _place(name, state)
        if place is None:
            raise KeyError(f"the model has no {name} ({key} in the checkpoint)")
        if place.shape != tensor.shape:
            raise ValueError(f"{key} is {list(tensor.shape)}, the model's {list(place.shape)}")
        place.copy_(tensor)
        owner = EXPERT.sub(
            lambda m: m[1] + (".down_proj" if m[3] == "2" else ".gate_up_proj"), name
        )
        missing[owner] -= tensor.numel()
    left = [key for key, count in missing.items() if count and not key.startswith("mtp.")]
    if left:
        raise KeyError(f"the checkpoint lacks (parts of) {left}")
