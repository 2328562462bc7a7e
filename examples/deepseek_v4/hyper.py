"""Manifold-constrained hyper-connections: the residual is ``hc_mult`` parallel streams.

A sublayer reads one mixture of the streams (`pre`), its output is added to each stream with a
weight (`post`), and the streams are mixed among themselves by a doubly stochastic matrix
(`comb`). All weights depend on the token and stay fp32; streams round once per sublayer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import unit_norm
from .config import Config


class HyperConnection(nn.Module):
    """Around one sublayer: ``collapse`` before it, ``expand`` after it."""

    def __init__(self, config: Config):
        super().__init__()
        self.mult, self.iters = config.hc_mult, config.hc_sinkhorn_iters
        self.eps, self.norm_eps = config.hc_eps, config.norm_eps
        outputs = (2 + self.mult) * self.mult
        self.fn = nn.Parameter(
            torch.empty(outputs, self.mult * config.hidden_size, dtype=torch.float32)
        )
        self.base = nn.Parameter(torch.empty(outputs, dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(3, dtype=torch.float32))

    def collapse(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams ``[B, S, H, D]``; returns x ``[B, S, D]``, post ``[B, S, H]``, comb
        ``[B, S, H, H]`` (both fp32), where ``H = hc_mult``."""
        sizes = [self.mult, self.mult, self.mult * self.mult]
        flat = unit_norm(streams.flatten(2).float(), self.norm_eps)
        pre, post, comb = F.linear(flat, self.fn).split(sizes, dim=-1)
        pre_base, post_base, comb_base = self.base.split(sizes)
        pre = torch.sigmoid(pre * self.scale[0] + pre_base) + self.eps
        post = 2 * torch.sigmoid(post * self.scale[1] + post_base)
        comb = (comb * self.scale[2] + comb_base).unflatten(-1, (self.mult, self.mult))
        x = (pre.unsqueeze(-1) * streams).sum(dim=2).to(streams.dtype)
        return x, post, self.sinkhorn(comb)

    def sinkhorn(self, logits: Tensor) -> Tensor:
        """logits ``[..., H, H]``; a softmax of the rows, then columns and rows normalised in
        turn, columns last."""
        comb = logits.softmax(dim=-1) + self.eps
        comb = comb / (comb.sum(dim=-2, keepdim=True) + self.eps)
        for _ in range(self.iters - 1):
            comb = comb / (comb.sum(dim=-1, keepdim=True) + self.eps)
            comb = comb / (comb.sum(dim=-2, keepdim=True) + self.eps)
        return comb

    def expand(self, out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """out ``[B, S, D]`` of the sublayer, streams ``[B, S, H, D]`` it was collapsed from;
        returns the new streams. comb enters transposed: its first axis is the source stream."""
        added = post.unsqueeze(-1) * out.unsqueeze(-2)
        mixed = torch.matmul(comb.transpose(-1, -2), streams.float())
        return (added + mixed).to(streams.dtype)


class HyperHead(nn.Module):
    """The last collapse, in front of the final norm: streams ``[B, S, H, D]`` → ``[B, S, D]``."""

    def __init__(self, config: Config):
        super().__init__()
        mult, self.eps, self.norm_eps = config.hc_mult, config.hc_eps, config.norm_eps
        self.hc_fn = nn.Parameter(torch.empty(mult, mult * config.hidden_size, dtype=torch.float32))
        self.hc_base = nn.Parameter(torch.empty(mult, dtype=torch.float32))
        self.hc_scale = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def forward(self, streams: Tensor) -> Tensor:
        flat = unit_norm(streams.flatten(2).float(), self.norm_eps)
        pre = torch.sigmoid(F.linear(flat, self.hc_fn) * self.hc_scale + self.hc_base) + self.eps
        return (pre.unsqueeze(-1) * streams).sum(dim=2).to(streams.dtype)
