"""The long-range part of an attention layer: pooled kv entries and the indexer over them.

Every cache has one row more than it needs, the last one. A row that must not be kept (padding,
a window that is not complete) is written there and never read, so that a write has a static
shape and no branch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import RMSNorm, Rope, Step, apply_rope
from .config import Config


def ring_slot(positions: Tensor, ring: int) -> Tensor:
    """Where a ring of ``ring`` rows keeps these positions ``[B, S]``: the spare row for padding
    and for tokens that a later one of the same call overwrites (a prompt longer than the ring).
    """
    last = positions.amax(dim=1, keepdim=True)
    kept = (positions >= 0) & (positions > last - ring)
    return torch.where(kept, positions % ring, ring)


def ring_positions(last: Tensor, ring: int) -> Tensor:
    """Which positions a ring of ``ring`` rows holds after position ``last`` ``[B, 1]``, negative
    for none: ``[B, ring]``."""
    return last - (last - torch.arange(ring, device=last.device)) % ring


def behind_ring(positions: Tensor, start: Tensor, ring: int) -> Tensor:
    """Where positions are in ``cat((ring, rows from position start on))``. Shapes as broadcast."""
    return torch.where(positions < start, positions % ring, ring + positions - start)


class Compressor(nn.Module):
    """Pools each ``ratio`` tokens into one entry: a softmax over the window, per channel.

    With ``overlap`` each token has two series of channels, and entry w pools the first series
    of window w − 1 with the second series of window w: ``2 · ratio`` rows, every ``ratio``.
    """

    def __init__(self, config: Config, head_dim: int, ratio: int, overlap: bool):
        super().__init__()
        self.head_dim, self.ratio, self.overlap = head_dim, ratio, overlap
        self.series = 2 if overlap else 1
        channels = self.series * head_dim
        self.kv_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.position_bias = nn.Parameter(torch.empty(ratio, channels, dtype=torch.float32))
        self.kv_norm = RMSNorm(head_dim, config.norm_eps)

    def allocate(self, batch: int, max_len: int, next_n: int) -> None:
        """Rings of raw rows, next_n − 1 longer than a window so that the tokens of one step do
        not overwrite what the first of them pools; and the entries."""
        weight = self.kv_proj.weight
        self.ring = self.series * self.ratio + next_n - 1
        rows = (batch, self.ring + 1, weight.shape[0])
        self.register_buffer("kv_state", weight.new_zeros(rows), persistent=False)
        gates = weight.new_zeros(rows, dtype=torch.float32)
        self.register_buffer("gate_state", gates, persistent=False)
        entries = weight.new_zeros(batch, max_len // self.ratio + 1, self.head_dim)
        self.register_buffer("entries", entries, persistent=False)

    def forward(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        """x ``[B, S, hidden]``; returns the entries ``[B, T, head_dim]`` so far: those of the
        prompt where it starts here, or else the cache. Entry t is complete from position
        ``(t + 1) · ratio − 1`` on; what is behind that must be masked."""
        kv = self.kv_proj(x)
        gate = self.gate_proj(x) + self.position_bias[step.positions % self.ratio]  # fp32
        if step.past:  # as the rings are before this chunk
            before = self.kv_state[:, :-1].clone(), self.gate_state[:, :-1].clone()
        slot = ring_slot(step.positions, self.ring)
        self.kv_state[step.rows, slot] = kv
        self.gate_state[step.rows, slot] = gate

        ends = self.ends(step)
        span = self.span(ends)
        if step.past:
            kv, gate = torch.cat((before[0], kv), dim=1), torch.cat((before[1], gate), dim=1)
            held = behind_ring(span, step.positions[:, :1, None], self.ring)
        elif step.prefill:
            held = span.clamp(min=0)
        else:
            held, kv, gate = span % self.ring, self.kv_state, self.gate_state
        rows = step.rows.unsqueeze(-1)
        cos, sin = rope(ends - (self.ratio - 1))
        pooled = self.pool(kv[rows, held], gate[rows, held], span)
        entry = apply_rope(self.kv_norm(pooled), cos, sin)

        spare = self.entries.shape[1] - 1
        self.entries[step.rows, torch.where(ends >= 0, ends // self.ratio, spare)] = entry
        return entry if step.prefill and not step.past else self.entries[:, :-1]

    def ends(self, step: Step) -> Tensor:
        """``[B, N]``: position of the last token of each window that closes here, or −1."""
        if not step.prefill:
            closes = (step.positions + 1) % self.ratio == 0
            return torch.where(closes, step.positions, -1)
        if not step.past:
            return step.positions[:, self.ratio - 1 :: self.ratio]
        start, last = step.positions[:, :1], step.positions.amax(dim=1, keepdim=True)
        n = -(-step.positions.shape[1] // self.ratio)  # that many may close, if they lie so
        every = torch.arange(n, device=start.device)
        ends = (start // self.ratio + every + 1) * self.ratio - 1
        return torch.where(ends <= last, ends, -1)

    def span(self, ends: Tensor) -> Tensor:
        """ends ``[B, N]``; the positions ``[B, N, width]`` an entry pools, negative before the
        start of the sequence."""
        width = self.series * self.ratio
        return ends.unsqueeze(-1) + torch.arange(1 - width, 1, device=ends.device)

    def pool(self, kv: Tensor, gate: Tensor, span: Tensor) -> Tensor:
        """kv, gate ``[B, N, width, channels]`` → ``[B, N, head_dim]``. fp32, one rounding."""
        if self.overlap:
            before, now = slice(None, self.ratio), slice(self.ratio, None)
            first, second = slice(None, self.head_dim), slice(self.head_dim, None)
            absent = (span[..., before] < 0).unsqueeze(-1)  # window 0 has none before it
            kv = torch.cat((kv[:, :, before, first], kv[:, :, now, second]), dim=2)
            gate_before = gate[:, :, before, first].masked_fill(absent, float("-inf"))
            gate = torch.cat((gate_before, gate[:, :, now, second]), dim=2)
        return (kv.float() * gate.softmax(dim=2)).sum(dim=2).to(kv.dtype)


class Indexer(nn.Module):
    """Scores the entries for each query, on a small compressor of its own, and picks top-k."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.top_k = config.index_topk
        self.compressor = Compressor(config, self.head_dim, config.csa_ratio, overlap=True)
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.n_heads * self.head_dim, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, self.n_heads, bias=False)

    def forward(
        self, x: Tensor, q_latent: Tensor, n_visible: Tensor, rope: Rope, step: Step
    ) -> Tensor:
        """x ``[B, S, hidden]``, q_latent ``[B, S, q_lora]``, n_visible ``[B, S]``: how many
        entries a query may see. Returns entry indices ``[B, S, K]``, distinct; those
        ``>= n_visible`` (where fewer than K are visible) must be masked by the caller."""
        keys = self.compressor(x, rope, step)
        cos, sin = rope(step.positions)
        q = self.q_b_proj(q_latent).unflatten(-1, (self.n_heads, self.head_dim))
        q = apply_rope(q, cos.unsqueeze(2), sin.unsqueeze(2))
        dots = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).float()  # [B, S·heads, T]
        dots = F.relu(dots).unflatten(1, (-1, self.n_heads)) * self.head_dim**-0.5
        weights = self.weights_proj(x).float() * self.n_heads**-0.5
        scores = (dots * weights.unsqueeze(-1)).sum(dim=2)
        future = torch.arange(keys.shape[1], device=x.device) >= n_visible.unsqueeze(-1)
        scores = scores.masked_fill(future, float("-inf"))
        return scores.topk(min(self.top_k, keys.shape[1]), dim=-1).indices
