"""DeepSeek's own spelling of V4's layers, written anew as plain modules for the tests.

Like the reference it keeps tokens first, ``[B, S, H, D]``; rotates with complex numbers, in place;
normalises q in the activation dtype and kv in fp32 with an fp32 weight; rounds kv's nope dims
through fp8 in place; and keeps kv in a ring that a decode writes at an int position. Prefill is
``start_pos == 0``. Sizes are small; the structure of each line is what matters here.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    dim: int = 96
    n_heads: int = 4
    head_dim: int = 144  # 128 nope dims, two groups of 64, and 16 rope dims
    rope_dim: int = 16
    q_rank: int = 48
    o_groups: int = 2
    o_rank: int = 24
    window: int = 8
    max_batch: int = 3
    n_experts: int = 4
    top_k: int = 2
    inter: int = 40
    limit: float = 1.0
    eps: float = 1e-2


def freqs_cis(rope_dim: int, length: int, theta: float = 10000.0) -> Tensor:
    """``[length, rope_dim / 2]`` complex64, of modulus one."""
    freqs = 1.0 / theta ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, cis: Tensor, inverse: bool = False) -> Tensor:
    """Turns x, all of it, in place: ``[B, S, R]`` or ``[B, S, H, R]``; cis ``[S, R / 2]``."""
    target = x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    if inverse:
        cis = cis.conj()
    shape = (1, pairs.size(1), 1, pairs.size(-1)) if pairs.ndim == 4 else (1, *cis.shape)
    turned = torch.view_as_real(pairs * cis.view(shape)).flatten(-2)
    target.copy_(turned)
    return target


def act_quant_(x: Tensor, group: int) -> None:
    """x through fp8 e4m3 and back, in place, in groups with a power of two as scale."""
    blocks = x.unflatten(-1, (-1, group)).float()
    amax = blocks.abs().amax(dim=-1, keepdim=True).clamp_min(1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / FP8_MAX)))
    codes = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    x.copy_((codes.float() * scale).flatten(-2))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * x).to(dtype)


class Attention(nn.Module):
    """A sliding-window layer with a ring cache. x ``[B, S, dim]``, same out."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = s = sizes
        self.wq_a = nn.Linear(s.dim, s.q_rank, bias=False)
        self.q_norm = RMSNorm(s.q_rank, s.eps)
        self.wq_b = nn.Linear(s.q_rank, s.n_heads * s.head_dim, bias=False)
        self.wkv = nn.Linear(s.dim, s.head_dim, bias=False)
        self.kv_norm = RMSNorm(s.head_dim, s.eps)
        self.wo_a = nn.Linear(
            s.n_heads * s.head_dim // s.o_groups, s.o_groups * s.o_rank, bias=False
        )
        self.wo_b = nn.Linear(s.o_groups * s.o_rank, s.dim, bias=False)
        self.attn_sink = nn.Parameter(torch.empty(s.n_heads, dtype=torch.float32))
        cache = torch.zeros(s.max_batch, s.window, s.head_dim)
        self.register_buffer("kv_cache", cache, persistent=False)

    def forward(self, x: Tensor, start_pos: int, cis: Tensor) -> Tensor:
        s, (batch, length, _) = self.sizes, x.shape
        rd = s.rope_dim

        q = self.wq_b(self.q_norm(self.wq_a(x))).unflatten(-1, (s.n_heads, s.head_dim))
        q *= torch.rsqrt(q.square().mean(-1, keepdim=True) + s.eps)
        apply_rotary_emb(q[..., -rd:], cis)

        kv = self.kv_norm(self.wkv(x))
        apply_rotary_emb(kv[..., -rd:], cis)
        act_quant_(kv[..., :-rd], 64)

        keys = self.remember(kv, start_pos)
        o = self.attend(q, keys, start_pos)
        apply_rotary_emb(o[..., -rd:], cis, inverse=True)

        o = o.view(batch, length, s.o_groups, -1)
        wo_a = self.wo_a.weight.view(s.o_groups, s.o_rank, -1)
        return self.wo_b(torch.einsum("bsgd,grd->bsgr", o, wo_a).flatten(2))

    def remember(self, kv: Tensor, start_pos: int) -> Tensor:
        """Writes the ring; returns the keys that a query may see."""
        win, (batch, length, _) = self.sizes.window, kv.shape
        if start_pos > 0:
            self.kv_cache[:batch, start_pos % win] = kv.squeeze(1)
            return self.kv_cache[:batch]
        if length <= win:
            self.kv_cache[:batch, :length] = kv
        else:
            cut = length % win
            tail = kv[:, -win:]
            self.kv_cache[:batch, cut:win], self.kv_cache[:batch, :cut] = tail.split(
                [win - cut, cut], dim=1
            )
        return kv

    def attend(self, q: Tensor, keys: Tensor, start_pos: int) -> Tensor:
        """q ``[B, S, H, D]``, keys ``[B, T, D]`` that are the values too; returns like q."""
        scores = torch.einsum("bshd,btd->bsht", q.float(), keys.float())
        scores = scores * q.shape[-1] ** -0.5
        places = torch.arange(keys.shape[1], device=q.device)
        if start_pos > 0:
            hidden = (places > start_pos).unsqueeze(0)  # a ring that is not full yet
        else:
            distance = places.unsqueeze(1) - places
            hidden = (distance < 0) | (distance >= self.sizes.window)
        scores = scores.masked_fill(hidden.unsqueeze(1), float("-inf"))
        sink = self.attn_sink.view(1, 1, -1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
        return torch.einsum("bsht,btd->bshd", weights, keys.float()).to(q.dtype)


class Expert(nn.Module):
    """SwiGLU in fp32; a routed one is weighted before its last projection."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.w1 = nn.Linear(sizes.dim, sizes.inter, bias=False)
        self.w2 = nn.Linear(sizes.inter, sizes.dim, bias=False)
        self.w3 = nn.Linear(sizes.dim, sizes.inter, bias=False)
        self.swiglu_limit = sizes.limit

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        dtype = x.dtype
        gate = self.w1(x).float()
        up = self.w3(x).float()
        if self.swiglu_limit > 0:
            up = torch.clamp(up, min=-self.swiglu_limit, max=self.swiglu_limit)
            gate = torch.clamp(gate, max=self.swiglu_limit)
        x = F.silu(gate) * up
        if weights is not None:
            x = weights * x
        return self.w2(x.to(dtype))


class MoE(nn.Module):
    """Every expert on every token, those not chosen with weight 0: one graph, static shapes."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.top_k = sizes.top_k
        self.gate = nn.Linear(sizes.dim, sizes.n_experts, bias=False)
        self.experts = nn.ModuleList(Expert(sizes) for _ in range(sizes.n_experts))
        self.shared_experts = Expert(sizes)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.view(-1, x.shape[-1])
        scores = F.softplus(self.gate(x).float()).sqrt()
        chosen = scores.topk(self.top_k, dim=-1).indices
        weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        weights = weights / weights.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(x, dtype=torch.float32)
        for i, expert in enumerate(self.experts):
            y = y + expert(x, weights[:, i, None])
        return (y + self.shared_experts(x)).type_as(x).view(shape)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.attn_norm, self.ffn_norm = (RMSNorm(sizes.dim, sizes.eps) for _ in "ab")
        self.attn, self.ffn = Attention(sizes), MoE(sizes)

    def forward(self, x: Tensor, start_pos: int, cis: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), start_pos, cis)
        return x + self.ffn(self.ffn_norm(x))


class Model(nn.Module):
    """Some layers and a head. x ``[B, S, dim]`` → ``[B, vocab]`` of the last token.

    ``cis`` are the rotations of x's positions, for who cuts them out of the table outside.
    """

    def __init__(self, sizes: Sizes, n_layers: int, vocab: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(n_layers))
        self.norm = RMSNorm(sizes.dim, sizes.eps)
        self.head = nn.Linear(sizes.dim, vocab, bias=False)
        self.register_buffer("freqs_cis", freqs_cis(sizes.rope_dim, 64), persistent=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor, start_pos: int, cis: Tensor | None = None) -> Tensor:
        if cis is None:
            cis = self.freqs_cis[start_pos : start_pos + x.shape[1]]
        for layer in self.layers:
            x = layer(x, start_pos, cis)
        return self.head(self.norm(x)[:, -1])
