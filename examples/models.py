"""DeepSeek-V4 with random weights, of any size: what ``python -m dsv4fuse bench --e2e`` measures.

Each function returns (model, args, kwargs) for one step, a prefill or, behind a prefill of
``length`` tokens, a decode step. bf16 on a CPU too, so that the same sites are found.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from torch import Tensor

from examples.deepseek_v4 import PRESETS, Transformer, randomize
from examples.deepseek_v4.generate import read

PREFILL_COLUMNS = 2048  # at a time, in front of a decode step
Made = tuple[Any, tuple[Any, ...], dict[str, Any]]


def hf(
    size: str = "tiny", layers: int = 4, experts: int = 8, batch: int = 2, length: int = 48,
    decode: bool = False, vocab: int | None = None, device: str = "cpu",
) -> Made:  # fmt: skip
    """``DeepseekV4ForCausalLM`` of transformers, a decode step on dsv4fuse's static cache.
    ``vocab``: how many tokens it knows, where not as many as its size."""
    from examples import hf_deepseek_v4

    if size not in ("tiny", "flash"):
        raise ValueError(f"The sizes of transformers' model here are tiny and flash, not {size}.")
    prepare()
    sizes = argparse.Namespace(
        model=None, size=size, layers=layers, experts=experts, vocab=vocab, device=device,
        dtype=torch.bfloat16,
    )  # fmt: skip
    model = hf_deepseek_v4.build(sizes)
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=device)
    if not decode:
        return model, (tokens,), {"use_cache": False}
    return _hf_decode(model, tokens)


def hf_prompt(
    size: str = "tiny", layers: int = 4, experts: int = 8, batch: int = 1, length: int = 48,
    vocab: int | None = None, device: str = "cpu",
) -> Made:  # fmt: skip
    """A prefill of ``hf`` as ``generate`` calls it: the last token's logits alone."""
    model, args, kwargs = hf(size, layers, experts, batch, length, False, vocab, device)
    return model, args, {**kwargs, "logits_to_keep": 1}


def _hf_decode(model: Any, tokens: Tensor) -> Made:
    from dsv4fuse.models.hf import StaticV4Cache

    batch, length = tokens.shape
    cache = StaticV4Cache(model, batch, length + 1)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    columns = cache.layers[0].cumulative_length
    before = columns.clone()

    def step(token: Tensor, position: Tensor) -> Tensor:
        columns.copy_(before)  # or each call would be one column further
        return model(token, position_ids=position, past_key_values=cache).logits

    return step, (tokens[:, :1].contiguous(), torch.full_like(tokens[:, :1], length)), {}


def plain(
    size: str = "tiny", layers: int = 4, experts: int = 8, batch: int = 2, length: int = 48,
    decode: bool = False, new: int = 1, vocab: int | None = None, device: str = "cpu",
) -> Made:  # fmt: skip
    """The plain model in examples/deepseek_v4; a decode step takes ``new`` tokens."""
    prepare()
    model = _plain(size, layers, experts, vocab, device)
    model.allocate(batch, length + new, new)
    tokens = torch.randint(model.config.vocab_size, (batch, length + new), device=device)
    positions = torch.arange(length + new, device=device).expand(batch, -1).contiguous()
    prompt, at = tokens[:, :length].contiguous(), positions[:, :length].contiguous()
    if not decode:
        return model.prefill, (prompt, at), {}
    with torch.no_grad():
        read(prompt, at, PREFILL_COLUMNS, model.prefill)
    step = tuple(x[:, length:].contiguous() for x in (tokens, positions))
    return model.decode, step, {}


def _plain(
    size: str, layers: int, experts: int, vocab: int | None, device: str
) -> Transformer:
    """The first layer's attention is the preset's, then CSA and HCA in turn, as there."""
    config = PRESETS[size]
    kinds = (config.layers[0], *("hca" if i % 2 else "csa" for i in range(layers - 1)))
    config = dataclasses.replace(
        config, layers=kinds, n_experts=experts, n_mtp_layers=0,
        vocab_size=vocab or config.vocab_size,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)
    randomize(model)
    return model


def prepare() -> None:
    """The same weights each time, on any CPU."""
    torch.manual_seed(0)
    # On some CPUs oneDNN's bf16 matrix products die with an illegal instruction.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
