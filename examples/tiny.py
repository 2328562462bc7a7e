"""Tiny models with random weights: ``python -m dsv4fuse explain examples.tiny:hf`` and the like.

Each function returns (model, args, kwargs). bf16 as on a GPU, so that the same sites are found.
"""

from __future__ import annotations

import torch

from examples import models
from examples.models import Made

BATCH, LENGTH = 2, 48


def hf() -> Made:
    """A prefill of ``DeepseekV4ForCausalLM`` of transformers."""
    return models.hf(batch=BATCH, length=LENGTH)


def plain() -> Made:
    """A prefill of the plain model in examples/deepseek_v4."""
    return models.plain(batch=BATCH, length=LENGTH)


def plain_decode() -> Made:
    """A decode step of that model."""
    return models.plain(batch=BATCH, length=LENGTH, decode=True)


def deepseek(start: int = 0, length: int = LENGTH) -> Made:
    """A prefill of layers in DeepSeek's own spelling, as tests/reference_v4.py writes them anew."""
    from tests.reference_v4 import Model, Sizes

    models.prepare()
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
