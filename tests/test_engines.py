"""The plain PyTorch in serving engines, as vLLM (hardware-agnostic), SGLang and DeepGEMM shape it.

Written anew from their public form: tokens in one axis, ``[T, H, D]``; a table of cos beside sin
that positions index; results copied into buffers that were made before; fp8 rows with their scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dsv4fuse.kernels import _common
from torch import Tensor

from .spellings._case import BF16, EPS, FP32, Case, Draw, plain
from .test_spellings import _equal, _fits, _run

T, H, D, R, G, RANK = 5, 4, 128, 16, 2, 24  # tokens, heads, head and rope dims, groups
STREAMS, DIM = 4, 64
FP8, MAX = torch.float8_e4m3fn, 448.0
Fn = Callable[..., Any]


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRETED", False)


# ---- vLLM: norm, rope, output projection ---------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    wide = x.to(FP32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS)
    return wide.to(x.dtype) if weight is None else wide.to(x.dtype) * weight


def rotated(x: Tensor, table: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
    """The last R dims turned; table ``[P, R]``: cos, then sin, of each pair."""
    nope, rope = x[..., :-R], x[..., -R:]
    cos, sin = (t.repeat_interleave(2, dim=-1).unsqueeze(-2) for t in table[positions].chunk(2, -1))
    if inverse:
        sin = -sin
    crossed = torch.stack((-rope[..., 1::2], rope[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((nope, (rope * cos + crossed * sin).to(x.dtype)), dim=-1)


def tables(draw: Draw) -> tuple[Tensor, Tensor]:
    return torch.cat(draw.angles(40, R // 2), dim=-1), torch.tensor([3, 0, 17, 39, 20])


def vllm_q(q: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    return rotated(rms_norm(q, None), table, positions)


def vllm_kv(kv: Tensor, weight: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    return rotated(rms_norm(kv, weight).unsqueeze(1), table, positions).squeeze(1)


def vllm_output(o: Tensor, table: Tensor, positions: Tensor, weight: Tensor) -> Tensor:
    """o ``[T, H, D]`` turned back, then a projection of each group of heads."""
    turned = rotated(o, table, positions, inverse=True).reshape(o.shape[0], G, -1)
    return torch.einsum("tgd,grd->tgr", turned, weight).flatten(1)


def q_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    return draw(T, H, D), *tables(draw)


def kv_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    return draw(T, D), draw(D), *tables(draw)


def output_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    return draw(T, H, D), *tables(draw), draw(G, RANK, H * D // G, scale=0.1)


# ---- vLLM: experts and router --------------------------------------------------------------------


def vllm_swiglu(gate_up: Tensor) -> Tensor:
    d = gate_up.shape[-1] // 2
    gate = torch.clamp(gate_up[..., :d], max=1.3)
    return F.silu(gate) * torch.clamp(gate_up[..., d:], min=-1.3, max=1.3)


def vllm_router(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.empty(logits.shape[0], 4)
    experts = torch.empty(logits.shape[0], 4, dtype=torch.int32)
    scores = torch.sqrt(F.softplus(logits.float()))
    _, chosen = torch.topk(scores + bias.float(), k=4, dim=-1)
    experts.copy_(chosen)
    picked = scores.gather(1, chosen)
    picked = picked / picked.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    weights.copy_(picked * 1.5)
    return weights, experts


def router_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    return draw(T, 24, dtype=FP32), draw(24, dtype=FP32)


# ---- hyper-connections ---------------------------------------------------------------------------


def sinkhorn(comb: Tensor, times: int) -> Tensor:
    comb = torch.softmax(comb, dim=-1) + 0.01
    comb = comb / (comb.sum(dim=-2, keepdim=True) + 0.01)
    for _ in range(times - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + 0.01)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + 0.01)
    return comb


def vllm_pre(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    n, size = STREAMS, STREAMS * DIM
    rows = streams.view(-1, n, DIM)
    x = rows.view(rows.shape[0], size).to(FP32)
    mixes = torch.matmul(x, fn.t())
    mixes = mixes * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) / size + EPS)
    pre = torch.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + 0.01
    post = torch.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n]) * 2.0
    comb = mixes[:, 2 * n :].view(-1, n, n) * scale[2] + base[2 * n :].view(1, n, n)
    out = torch.sum(pre.unsqueeze(-1) * rows.to(FP32), dim=1).to(streams.dtype)
    return post.view(-1, n, 1), sinkhorn(comb, 20), out


def sglang_pre(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    n = STREAMS
    flat = streams.flatten(1).float()
    rstd = torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    mixes = (F.linear(flat, fn) * rstd).unsqueeze(1)
    pre, post, comb = mixes.split([n, n, n * n], dim=-1)
    pre = torch.sigmoid(pre * scale[0] + base[:n]) + 0.01
    post = 2 * torch.sigmoid(post * scale[1] + base[n : 2 * n])
    comb = (comb * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    out = (pre.squeeze(1).unsqueeze(-1) * flat.view(streams.shape)).sum(dim=1)
    return out.to(streams.dtype), post.squeeze(1), sinkhorn(comb, 20).squeeze(1)


def vllm_post(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.einsum("...ij,...ih->...jh", comb.to(FP32), streams.to(FP32))
    post = post.view(-1, STREAMS, 1)  # as vLLM's pre leaves it
    return (mixed + post.to(FP32) * out.unsqueeze(-2).to(FP32)).to(streams.dtype)


def sglang_post(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = (comb.unsqueeze(-1) * streams.unsqueeze(2)).sum(dim=1)
    return (post.unsqueeze(-1) * out.unsqueeze(1) + mixed).type_as(out)


def sglang_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    flat = streams.flatten(1).float()
    rstd = torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    pre = torch.sigmoid(F.linear(flat, fn) * rstd * scale + base) + 0.01
    return torch.sum(pre.unsqueeze(-1) * flat.view(streams.shape), dim=1).to(streams.dtype)


def mix_inputs(rows: int = 24, scales: int = 3) -> Fn:
    def make() -> tuple[Tensor, ...]:
        draw = Draw()
        fn = draw(rows, STREAMS * DIM, dtype=FP32, scale=0.1)
        return draw(T, STREAMS, DIM), fn, draw(scales, dtype=FP32), draw(rows, dtype=FP32)

    return make


def post_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    weights = draw(T, STREAMS, dtype=FP32), draw(T, STREAMS, STREAMS, dtype=FP32)
    return draw(T, DIM), draw(T, STREAMS, DIM), *weights


# ---- the indexer ---------------------------------------------------------------------------------


def vllm_logits(
    q: Tensor, k: Tensor, scale: Tensor, weights: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """One sequence; q and k fp8, k with a scale per row; keys of each query from start to end."""
    every = torch.arange(k.shape[0])[None]
    seen = (every >= start[:, None]) & (every < end[:, None])
    scores = torch.einsum("mhd,nd->hmn", q.to(BF16), k.to(BF16)).float() * scale.reshape(-1)
    total = (scores.relu() * weights.unsqueeze(-1).transpose(0, 1)).sum(dim=0)
    return total.masked_fill(~seen, float("-inf"))


def logits_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    q, k = (draw(*shape).to(FP8) for shape in ((T, H, 32), (33, 32)))
    start, end = torch.arange(T, dtype=torch.int32), torch.arange(T, dtype=torch.int32) * 5 + 9
    return q, k, draw(33, 1, dtype=FP32).abs(), draw(T, H, dtype=FP32), start, end


# ---- SGLang: the compressor ----------------------------------------------------------------------


def sglang_compress(kv: Tensor, score: Tensor, ape: Tensor, weight: Tensor, cis: Tensor) -> Tensor:
    """kv, score ``[B, 2 · 4, 2 · D]`` of two windows; the first half of the channels belongs to
    the window behind."""
    score = (score.view(-1, 4, 2 * D) + ape.unsqueeze(0)).view(score.shape)
    kv, score = (torch.cat((t[:, :4, :D], t[:, 4:, D:]), dim=1) for t in (kv, score))
    pooled = (kv * score.softmax(dim=1)).sum(dim=1)
    wide = pooled.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight
    pairs = torch.view_as_complex(y[..., -R:].unflatten(-1, (-1, 2)))
    return torch.cat((y[..., :-R], torch.view_as_real(pairs * cis).flatten(-2)), dim=-1).to(BF16)


def compress_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    rows = (draw(T, 8, 2 * D, dtype=FP32) for _ in range(2))
    cos, sin = draw.angles(T, R // 2)
    return *rows, draw(4, 2 * D, dtype=FP32), draw(D, dtype=FP32), torch.complex(cos, sin)


# ---- DeepGEMM: rows to fp8, in front of the scaled matmul of transformers ------------------------


def cast(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """Codes ``[T, N]`` and scales ``[T, N / 128]``; the codes by the scale's reciprocal."""
    blocks = x.view(x.shape[0], -1, 128)
    amax = blocks.abs().float().amax(dim=2).view(x.shape[0], -1).clamp(1e-4)
    scale = amax / MAX
    if pow2:
        scale = torch.pow(2.0, torch.ceil(torch.log2(scale.abs())))
    return (blocks * (1.0 / scale.unsqueeze(2))).to(FP8).view(x.shape), scale


def normed_cast(pow2: bool) -> Fn:
    return lambda x, weight: cast(rms_norm(x, weight), pow2)


def swiglu_cast(pow2: bool) -> Fn:
    return lambda gate_up: cast(vllm_swiglu(gate_up), pow2)


def norm_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    return draw(T, 256), draw(256)


def swiglu_inputs() -> tuple[Tensor, ...]:
    return (Draw()(T, 512),)


def case(fn: Fn, make: Fn, name: str, *parts: str, **more: Any) -> Case:
    return Case(plain(fn), make, {name: 1}, parts, **more)


ENGINES = {
    "vLLM q": case(vllm_q, q_inputs, "norm_rope_cache"),
    "vLLM kv": case(vllm_kv, kv_inputs, "norm_rope_cache"),
    "vLLM output": case(vllm_output, output_inputs, "inv_rope_grouped_bmm", exact=False),
    "vLLM swiglu": case(vllm_swiglu, swiglu_inputs, "clamp_swiglu_quant"),
    "vLLM router": case(vllm_router, router_inputs, "moe_router"),
    "vLLM pre": case(vllm_pre, mix_inputs(), "hyper_connection_pre", exact=False),
    "SGLang pre": case(sglang_pre, mix_inputs(), "hyper_connection_pre", exact=False),
    "vLLM post": case(vllm_post, post_inputs, "hyper_connection_post", exact=False),
    "SGLang post": case(sglang_post, post_inputs, "hyper_connection_post", exact=False),
    "SGLang head": case(sglang_head, mix_inputs(4, 1), "hyper_head", exact=False),
    "vLLM logits": case(
        vllm_logits, logits_inputs, "indexer_logits",
        "scales of keys, relu", "(dot)", "→ mask as a range", exact=False,
    ),
    "SGLang compressor": case(sglang_compress, compress_inputs, "compress_kv", exact=False),
    "cast behind a norm": case(normed_cast(True), norm_inputs, "norm_quant", exact=False),
    "cast behind swiglu": case(
        swiglu_cast(True), swiglu_inputs, "clamp_swiglu_quant", "quant", exact=False
    ),
    "fp32 cast behind a norm": case(normed_cast(False), norm_inputs, "norm_quant"),
    "fp32 cast behind swiglu": case(
        swiglu_cast(False), swiglu_inputs, "clamp_swiglu_quant", "quant"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENGINES)
def test_spelling(name):
    case = ENGINES[name]
    report, wanted, found = _run(case)
    assert _fits(case, report), f"wanted {dict(case.counts)} {case.parts}:\n{report}"
    _equal(wanted, found, case.exact)
