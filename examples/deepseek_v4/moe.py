"""Mixture of experts: a router (by score or by token id), routed experts, a shared expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config

COPIES = 256  # of experts' matrices at a time, where there is no grouped product


def clamp_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """gate, up ``[..., I]``; the gate is clamped from above only."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)


class MLP(nn.Module):
    """The shared expert. x ``[N, D]`` → ``[N, D]``."""

    def __init__(self, config: Config):
        super().__init__()
        self.limit = config.swiglu_limit
        self.gate_proj = nn.Linear(config.hidden_size, config.expert_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.expert_size, bias=False)
        self.down_proj = nn.Linear(config.expert_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(clamp_swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class Router(nn.Module):
    """Chooses top_k experts per token, by token id (``by_hash``) or by biased score.

    The bias only takes part in the choice; the weights are the bare scores, normalised.
    """

    def __init__(self, config: Config, by_hash: bool):
        super().__init__()
        self.top_k, self.scale = config.top_k, config.routed_scale
        self.score_func, self.by_hash = config.score_func, by_hash
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.hidden_size))
        if by_hash:
            table = torch.zeros(config.vocab_size, config.top_k, dtype=torch.int64)
            self.register_buffer("tid2eid", table)
        else:
            bias = torch.zeros(config.n_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)

    def scores(self, x: Tensor) -> Tensor:
        """x ``[N, D]``; returns ``[N, E]`` fp32. Only the logits are rounded to x's dtype."""
        logits = F.linear(x, self.weight).float()
        if self.score_func == "sqrtsoftplus":
            return F.softplus(logits).sqrt()
        return logits.sigmoid() if self.score_func == "sigmoid" else logits.softmax(dim=-1)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[N, D]``, tokens ``[N]``; returns weights fp32 and experts int64, ``[N, K]``."""
        scores = self.scores(x)
        if self.by_hash:
            experts = self.tid2eid[tokens]
        else:
            biased = scores + self.e_score_correction_bias
            experts = biased.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.scale, experts


def grouped_mm(rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """rows ``[M, I]``, each times the matrix of its expert: weights ``[E, O, I]``, experts
    ``[M]`` in ascending order; returns ``[M, O]``. Rows of an expert that is not there come out
    as anything.

    Shapes are static, how many rows an expert has is a tensor: one graph for prefill and
    decode. torch.compile knows ``F.grouped_mm`` in bf16 only; any other dtype copies a matrix
    per row, ``COPIES`` at a time, which suits small models.
    """
    if rows.dtype != torch.bfloat16:
        present = experts.clamp(max=weights.shape[0] - 1)
        if rows.shape[0] > COPIES:
            parts = zip(rows.split(COPIES), present.split(COPIES), strict=True)
            return torch.cat([grouped_mm(r, weights, e) for r, e in parts])
        return torch.matmul(weights[present], rows.unsqueeze(-1)).squeeze(-1)
    every = torch.arange(weights.shape[0], device=rows.device)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)
    return F.grouped_mm(rows, weights.mT, offs=ends)


class Experts(nn.Module):
    """The routed experts, as two stacked weights; tokens are sorted by expert for them.

    With ``split`` it holds some of them only, and any expert behind the last adds nothing.
    """

    split = False

    def __init__(self, config: Config):
        super().__init__()
        n, hidden, size = config.n_experts, config.hidden_size, config.expert_size
        self.limit = config.swiglu_limit
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(n, hidden, size))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x ``[N, D]``, weights and experts ``[N, K]``; returns ``[N, D]``."""
        n_tokens, top_k = experts.shape
        experts, order = experts.flatten().sort(stable=True)
        gate_up = grouped_mm(x[order // top_k], self.gate_up_proj, experts)  # [N·K, 2·I]
        gate, up = gate_up.chunk(2, dim=-1)
        down = grouped_mm(clamp_swiglu(gate, up, self.limit), self.down_proj, experts)
        if self.split:
            down = down.masked_fill((experts >= len(self.down_proj)).unsqueeze(-1), 0.0)
        # Back to token order, then one fp32 sum: an index_add would round after each expert,
        # in an order that differs from run to run on a GPU.
        down = down[order.argsort()].view(n_tokens, top_k, -1)
        return (down * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


class MoE(nn.Module):
    """Routed experts plus the shared expert. x ``[B, S, D]``, tokens ``[B, S]``."""

    def __init__(self, config: Config, by_hash: bool):
        super().__init__()
        self.gate = Router(config, by_hash)
        self.experts = Experts(config)
        self.shared_experts = MLP(config)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, experts = self.gate(flat, tokens.flatten())
        return (self.experts(flat, weights, experts) + self.shared_experts(flat)).view_as(x)
