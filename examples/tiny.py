"""Tiny models with random weights: ``python -m dsv4fuse explain examples.tiny:hf`` and the like.

Each function returns (model, args, kwargs). bf16 as on a GPU, so that the same sites are found.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from torch import Tensor

from examples.deepseek_v4 import PRESETS, Transformer, randomize

BATCH, LENGTH = 2, 48
Made = tuple[Any, tuple[Tensor, ...], dict[str, Any]]


def hf() -> Made:
    """A prefill of ``DeepseekV4ForCausalLM`` of transformers."""
    from examples import hf_deepseek_v4

    _prepare()
    sizes = dict(model=None, size="tiny", layers=4, experts=None, device="cpu")
    model = hf_deepseek_v4.build(argparse.Namespace(**sizes, dtype=torch.bfloat16))
    return model, (torch.randint(model.config.vocab_size, (BATCH, LENGTH)),), {"use_cache": False}


def plain() -> Made:
    """A prefill of the plain model in examples/deepseek_v4."""
    model = _plain()
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()
    tokens = torch.randint(model.config.vocab_size, (BATCH, LENGTH))
    return model.prefill, (tokens, positions), {}


def plain_decode() -> Made:
    """A decode step of that model."""
    model = _plain()
    token = torch.randint(model.config.vocab_size, (BATCH, 1))
    return model.decode, (token, torch.full((BATCH, 1), LENGTH)), {}


def deepseek(start: int = 0, length: int = LENGTH) -> Made:
    """A prefill of layers in DeepSeek's own spelling, as tests/reference_v4.py writes them anew."""
    from tests.reference_v4 import Model, Sizes

    _prepare()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Model(Sizes(), n_layers=2)
        x = torch.randn(BATCH, length, Sizes().dim)
    finally:
        torch.set_default_dtype(torch.float32)
    for weight in model.state_dict().values():
        weight.normal_(0.0, 2 * weight.shape[-1] ** -0.5)
    return model, (x, start), {}


def deepseek_decode() -> Made:
    """A decode step of them."""
    return deepseek(start=LENGTH, length=1)


def _plain() -> Transformer:
    _prepare()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Transformer(dataclasses.replace(PRESETS["tiny"], n_mtp_layers=0))
    finally:
        torch.set_default_dtype(torch.float32)
    randomize(model)
    model.allocate(BATCH, 2 * LENGTH)
    return model


def _prepare() -> None:
    torch.manual_seed(0)
    # On some CPUs oneDNN's bf16 matrix products die with an illegal instruction.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
