"""Weights: from transformers, or random ones for tests and timings."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .model import Transformer

RENAMES = (
    (r"^model\.", ""),
    (r"compressor\.indexer\.(kv_proj|gate_proj|position_bias|kv_norm)", r"indexer.compressor.\1"),
    (r"compressor\.indexer\.(scorer\.)?", "indexer."),
)


def rename(key: str) -> str:
    """A key of ``transformers.DeepseekV4ForCausalLM``'s state dict → ours."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def load_transformers(model: Transformer, state_dict: dict[str, Tensor]) -> None:
    """Copies a DeepseekV4ForCausalLM state dict into the model, into the model's own dtypes.

    Every key must find its place; transformers has no MTP head, so ``mtp.`` is left as it is.
    """
    renamed = {rename(key): value for key, value in state_dict.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    missing = [key for key in missing if not key.startswith("mtp.")]
    if missing or unexpected:
        raise KeyError(f"missing {missing}, unexpected {unexpected}")


def randomize(model: Transformer, seed: int = 0) -> None:
    """Random weights that leave nothing at a neutral value: norms around 1, matrices that keep
    the scale of their input, everything else (sinks, biases, hyper-connections) of order 1."""
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.state_dict().items():
        if name.endswith("tid2eid"):
            scores = torch.rand(
                len(weight), model.config.n_experts, generator=generator, device=device
            )
            weight.copy_(scores.topk(weight.shape[1]).indices)
            continue
        if weight.dim() == 1:
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
        elif "position_bias" in name or "embed" in name:
            weight.normal_(0.0, 1.0, generator=generator)
        else:
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
