"""One attention layer: a sliding window, and for csa and hca compressed entries behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import RMSNorm, Rope, Step, apply_rope, unit_norm
from .compressor import Compressor, Indexer, ring_positions, ring_slot
from .config import Config


def window_mask(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """queries ``[B, S]``, keys ``[B, T]``: positions, negative = none. True where a query sees
    a key, ``[B, S, T]``: itself and the window − 1 tokens before it."""
    distance = queries.unsqueeze(-1) - keys.unsqueeze(1)
    return (keys >= 0).unsqueeze(1) & (distance >= 0) & (distance < window)


def sink_attention(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """Attention in which one tensor is keys and values for all heads.

    q ``[B, S, H, D]``; kv ``[B, G, T, D]``, with G = 1 for keys that all queries share or G = S
    for keys of each query's own; mask ``[B, S, T]``; sinks ``[H]`` fp32, one more logit per
    head that takes weight and adds nothing. Softmax in fp32. Returns ``[B, S, H, D]``.
    """
    batch, groups = kv.shape[:2]
    packed = q.reshape(batch, groups, -1, q.shape[-1])  # (S / G) · H queries on the same keys
    scores = torch.matmul(packed, kv.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    scores = scores.view(*q.shape[:-1], -1).masked_fill(~mask.unsqueeze(2), float("-inf"))
    sink = sinks.view(1, 1, -1, 1).expand(*q.shape[:-1], 1)
    probs = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1].to(kv.dtype)
    return torch.matmul(probs.reshape(batch, groups, -1, kv.shape[2]), kv).view_as(q)


class Attention(nn.Module):
    """Multi-query attention of kind "window", "csa" or "hca". x ``[B, S, hidden]`` → same."""

    def __init__(self, config: Config, kind: str):
        super().__init__()
        hidden, heads, dim = config.hidden_size, config.n_heads, config.head_dim
        self.n_heads, self.o_groups = heads, config.o_groups
        self.window_size, self.eps = config.window, config.norm_eps
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * dim, bias=False)
        self.kv_proj = nn.Linear(hidden, dim, bias=False)
        self.kv_norm = RMSNorm(dim, self.eps)
        self.sinks = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.o_a_proj = nn.Linear(
            heads * dim // config.o_groups, config.o_groups * config.o_lora_rank, bias=False
        )
        self.o_b_proj = nn.Linear(config.o_groups * config.o_lora_rank, hidden, bias=False)
        self.compressor = self.indexer = None
        if kind == "csa":
            self.compressor = Compressor(config, dim, config.csa_ratio, overlap=True)
            self.indexer = Indexer(config)
        elif kind == "hca":
            self.compressor = Compressor(config, dim, config.hca_ratio, overlap=False)

    def allocate(self, batch: int, max_len: int, next_n: int) -> None:
        """The ring holds next_n − 1 rows more than the window (so that the tokens of one step do
        not overwrite what the first of them sees), however long the sequence."""
        weight = self.kv_proj.weight
        self.ring = self.window_size + next_n - 1
        window = weight.new_zeros(batch, self.ring + 1, weight.shape[0])
        self.register_buffer("window", window, persistent=False)

    def forward(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        cos, sin = rope(step.positions)
        cos_h, sin_h = cos.unsqueeze(2), sin.unsqueeze(2)  # the same for all heads
        q_latent = self.q_a_norm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (self.n_heads, -1))
        q = apply_rope(unit_norm(q, self.eps), cos_h, sin_h)
        kv = apply_rope(self.kv_norm(self.kv_proj(x)), cos, sin)
        keys, mask = self.near(kv, step)
        if self.compressor is not None:
            entries, seen = self.far(x, q_latent, rope, step)
            groups = entries.shape[1]
            keys = torch.cat((keys.expand(-1, groups, -1, -1), entries), dim=2)
            mask = torch.cat((mask, seen), dim=-1)
        out = sink_attention(q, keys, mask, self.sinks)

        # Keys are values too, so the values came in turned by their position. Turning the sum
        # back by the query's leaves each of them turned by its distance.
        out = apply_rope(out, cos_h, -sin_h)
        out = out.flatten(2).unflatten(-1, (self.o_groups, -1))
        weight = self.o_a_proj.weight.unflatten(0, (self.o_groups, -1))
        return self.o_b_proj(torch.einsum("bsgd,grd->bsgr", out, weight).flatten(2))

    def near(self, kv: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The window's keys ``[B, 1, T, D]`` and who sees them ``[B, S, T]``: the prompt's own
        rows in prefill, behind the ring before them if there is a past; the ring in decode.
        Writes kv ``[B, S, D]`` into the ring."""
        keys, held = kv, step.positions
        if step.past:
            keys = torch.cat((self.window[:, :-1], kv), dim=1)
            before = ring_positions(step.positions[:, :1] - 1, self.ring)
            held = torch.cat((before, held), dim=1)
        self.window[step.rows, ring_slot(step.positions, self.ring)] = kv
        if not step.prefill:
            keys = self.window[:, :-1]
            held = ring_positions(step.positions.amax(dim=1, keepdim=True), self.ring)
        return keys.unsqueeze(1), window_mask(step.positions, held, self.window_size)

    def far(self, x: Tensor, q_latent: Tensor, rope: Rope, step: Step) -> tuple[Tensor, Tensor]:
        """The compressed keys ``[B, 1 or S, T, D]`` and who sees them ``[B, S, T]``.

        csa: a prefill masks all entries but the chosen ones, a decode gathers the chosen ones:
        a gather per query of a long prompt would be larger than the prompt."""
        entries = self.compressor(x, rope, step)
        n_visible = (step.positions + 1) // self.compressor.ratio
        every = torch.arange(entries.shape[1], device=x.device)
        visible = every < n_visible.unsqueeze(-1)
        if self.indexer is None:
            return entries.unsqueeze(1), visible
        chosen = self.indexer(x, q_latent, n_visible, rope, step)
        if step.prefill:
            picked = torch.zeros_like(visible).scatter(-1, chosen, True)
            return entries.unsqueeze(1), visible & picked
        return entries[step.rows.unsqueeze(-1), chosen], chosen < n_visible.unsqueeze(-1)
