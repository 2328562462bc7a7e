"""What several modules share: the two norms, rope, and the description of one forward."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import Yarn


class Step(NamedTuple):
    """What a forward is about; the same for every layer."""

    tokens: Tensor  # [B, S] int64
    positions: Tensor  # [B, S] int64, −1 = padding
    rows: Tensor  # [B, 1] int64, 0 … B−1: indexes the batch axis of a cache
    prefill: bool  # a prompt or a chunk of it, against a few tokens on top of the caches
    past: bool  # of a prefill: on top of the caches; or else from position 0


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight over the last axis. fp32 throughout, one rounding at the end."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis. The weight is fp32 in a bf16 model too; one rounding, last."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the last R dims of x, in interleaved (even, odd) pairs; computes in fp32.

    x ``[..., D]``; cos, sin ``[..., R/2]`` fp32, broadcast against x's leading axes.
    With ``−sin`` it turns back.
    """
    nope, rope = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    even, odd = rope[..., 0::2].float(), rope[..., 1::2].float()
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((nope, turned.to(x.dtype)), dim=-1)


class Rope(nn.Module):
    """Tables of cos and sin, ``[max_len, dim / 2]`` fp32."""

    def __init__(self, dim: int, theta: float, yarn: Yarn | None = None):
        super().__init__()
        self.dim, self.theta, self.yarn = dim, theta, yarn

    def allocate(self, max_len: int, device: torch.device) -> None:
        freqs = self.frequencies().to(device)
        angles = torch.arange(max_len, device=device).float().unsqueeze(-1) * freqs
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def frequencies(self) -> Tensor:
        """``[dim / 2]`` fp32, on the CPU so that every device gets the same table."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        freqs = 1.0 / self.theta**exponents
        if self.yarn is None:
            return freqs
        # YaRN: pairs that turn less than beta_slow times over the original length are slowed
        # down by `factor`, those that turn more than beta_fast times stay, in between a ramp.
        low = max(math.floor(self._pair_turning(self.yarn.beta_fast)), 0)
        high = min(math.ceil(self._pair_turning(self.yarn.beta_slow)), self.dim - 1)
        pairs = torch.arange(self.dim // 2, dtype=torch.float32, device="cpu")
        slowed = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        return freqs / self.yarn.factor * slowed + freqs * (1 - slowed)

    def _pair_turning(self, times: float) -> float:
        """Index of the pair that turns ``times`` times over the original length."""
        wavelength = self.yarn.original_max_len / (times * 2 * math.pi)
        return self.dim * math.log(wavelength) / (2 * math.log(self.theta))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions ``[...]``, negative ones read as 0; returns cos, sin ``[..., dim / 2]``."""
        positions = positions.clamp(min=0)
        return self.cos[positions], self.sin[positions]
