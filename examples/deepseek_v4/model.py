"""DeepSeek-V4 in plain PyTorch, for inference: static caches, positions as tensors.

    model = Transformer(PRESETS["tiny"])            # torch's default dtype and device
    model.allocate(batch=2, max_len=256)
    logits = model.prefill(tokens, positions)       # [B, S] right-padded with position −1
    logits = model.decode(token, position)          # [B, 1], and so on

Prefill and decode are one graph each under ``torch.compile(fullgraph=True)``, the same from
step to step. In a bf16 model the norms, sinks, biases and hyper-connections stay fp32: build
it under ``torch.set_default_dtype(torch.bfloat16)``; ``model.bfloat16()`` would round them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Attention
from .common import RMSNorm, Rope, Step
from .compressor import Compressor
from .config import Config
from .hyper import HyperConnection, HyperHead
from .moe import MoE


def column(streams: Tensor, at: Tensor) -> Tensor:
    """streams ``[B, S, hc_mult, D]``, at ``[B, 1]``; each row's column ``[B, 1, hc_mult, D]``."""
    return streams.gather(1, at[..., None, None].expand(-1, -1, *streams.shape[2:]))


class Block(nn.Module):
    """A decoder layer: attention, then experts, each inside its hyper-connection."""

    def __init__(self, config: Config, kind: str, by_hash: bool):
        super().__init__()
        self.rope_kind = "main" if kind == "window" else "compress"
        self.self_attn = Attention(config, kind)
        self.mlp = MoE(config, by_hash)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)

    def forward(self, streams: Tensor, ropes: nn.ModuleDict, step: Step) -> Tensor:
        """streams ``[B, S, hc_mult, D]`` → same."""
        x, post, comb = self.attn_hc.collapse(streams)
        out = self.self_attn(self.input_layernorm(x), ropes[self.rope_kind], step)
        streams = self.attn_hc.expand(out, streams, post, comb)
        x, post, comb = self.ffn_hc.collapse(streams)
        out = self.mlp(self.post_attention_layernorm(x), step.tokens)
        return self.ffn_hc.expand(out, streams, post, comb)


class MTP(nn.Module):
    """Multi-token prediction: from the streams at position p and the token at p + 1 to the
    streams that predict the token at p + 2. One window layer, with its own head and norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.e_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.h_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.layer = Block(config, "window", by_hash=False)
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, streams: Tensor, embedded: Tensor, ropes: nn.ModuleDict, step: Step
    ) -> Tensor:
        """streams ``[B, S, hc_mult, D]``, embedded ``[B, S, D]`` (of the next tokens)."""
        embedded = self.e_proj(self.enorm(embedded)).unsqueeze(2)
        return self.layer(embedded + self.h_proj(self.hnorm(streams)), ropes, step)


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, kind, by_hash=i < config.n_hash_layers)
            for i, kind in enumerate(config.layers)
        )
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MTP(config) if config.n_mtp_layers else None
        self.ropes = nn.ModuleDict(
            {
                "main": Rope(config.rope_dim, config.rope_theta),
                "compress": Rope(config.rope_dim, config.compress_rope_theta, config.yarn),
            }
        )
        self.requires_grad_(False)

    def allocate(self, batch: int, max_len: int, next_n: int = 1) -> None:
        """Makes the caches for ``batch`` sequences of up to ``max_len`` tokens; a decode step
        may hold up to ``next_n`` tokens of each. Caches have the dtype of the weights."""
        self.next_n = next_n
        for rope in self.ropes.values():
            rope.allocate(max_len, self.lm_head.weight.device)
        for module in self.modules():
            if isinstance(module, Attention | Compressor):
                module.allocate(batch, max_len, next_n)

    def streams(
        self, tokens: Tensor, positions: Tensor, prefill: bool, past: bool = False
    ) -> Tensor:
        """The residual streams ``[B, S, hc_mult, D]`` behind the last layer."""
        if not prefill and tokens.shape[1] > self.next_n:
            raise ValueError(f"{tokens.shape[1]} tokens in a step, allocated for {self.next_n}")
        step = self.step(tokens, positions, prefill, past)
        x = self.embed_tokens(tokens).unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1)
        x = x.contiguous()  # as every layer gets it: one graph serves all of a kind
        for layer in self.layers:
            x = layer(x, self.ropes, step)
        return x

    def step(self, tokens: Tensor, positions: Tensor, prefill: bool, past: bool) -> Step:
        rows = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(-1)
        return Step(tokens, positions, rows, prefill, past)

    def logits(self, streams: Tensor) -> Tensor:
        """streams ``[B, S, hc_mult, D]`` → ``[B, S, vocab]``."""
        return self.lm_head(self.norm(self.hc_head(streams)))

    def forward(
        self, tokens: Tensor, positions: Tensor, prefill: bool = False, past: bool = False
    ) -> Tensor:
        """tokens, positions ``[B, S]`` int64 → logits ``[B, S, vocab]``.

        A prefill takes whole prompts from position 0, padded on the right, or with ``past`` any
        number of next tokens of each row, padded likewise; a decode takes the next 1 … next_n
        tokens. Padding has position −1 and touches no cache; its logits mean nothing. A row that
        is all padding keeps its caches as they were.
        """
        return self.logits(self.streams(tokens, positions, prefill, past))

    def prefill(self, tokens: Tensor, positions: Tensor, past: bool = False) -> Tensor:
        """Like forward, but only the logits of each row's last token, ``[B, vocab]``."""
        streams = self.streams(tokens, positions, True, past)
        return self.logits(column(streams, positions.argmax(dim=1, keepdim=True))).squeeze(1)

    def decode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions ``[B, S]``, S ≤ next_n → logits ``[B, S, vocab]``."""
        return self.forward(tokens, positions, False)

    def mtp_streams(
        self,
        streams: Tensor,
        next_tokens: Tensor,
        positions: Tensor,
        prefill: bool,
        past: bool = False,
    ) -> Tensor:
        """The MTP layer on ``streams(tokens, positions)`` and the tokens one further."""
        step = self.step(next_tokens, positions, prefill, past)
        return self.mtp(streams, self.embed_tokens(next_tokens), self.ropes, step)

    def mtp_head(self, streams: Tensor) -> Tensor:
        """Streams of the MTP layer → logits ``[B, S, vocab]`` for the tokens two further.
        Embedding and lm_head are the model's."""
        return self.lm_head(self.mtp.norm(self.mtp.hc_head(streams)))

    def mtp_logits(
        self, streams: Tensor, next_tokens: Tensor, positions: Tensor, prefill: bool
    ) -> Tensor:
        return self.mtp_head(self.mtp_streams(streams, next_tokens, positions, prefill))
