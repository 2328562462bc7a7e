"""The compressor as people write it, for the benchmark: a prefill's windows, a decode's rings."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms
from dsv4fuse.fusion import Example, Sizes

# (ratio, with the window before)
ROWS = {
    "narrow": (4, True), "wide": (128, False), "narrow fp4": (4, True),
    "narrow turned fp4": (4, True),
}  # fmt: skip
INDEXER_DIM = 128  # whose entries a Hadamard matrix turns
TURNED = 1 / 3  # of a row's largest: codes of fp4 are so far apart, and a sum's order turns some
BF16 = torch.bfloat16


def _finish(
    pooled: Tensor, w: Tensor, cos: Tensor, sin: Tensor, norm: str, kind: str,
    matrix: tuple[Tensor, ...],
) -> Tensor:  # fmt: skip
    y = atoms.rms_norm(pooled, w, eps=1e-6, rounding=norm)
    y = atoms.rope(y, cos, sin, rounding="once")
    for m in matrix:
        y = torch.matmul(y, m) * m.shape[0] ** -0.5
    if not kind.endswith("fp4"):
        return y
    return atoms.fake_quant(y, group=32, floor=6 * 2.0**-126, scale="pow2", fp4="kept")


def _dim(sizes: Sizes, kind: str) -> int:
    return min(sizes.head_dim, INDEXER_DIM) if "turned" in kind else sizes.head_dim


def _matrix(dim: int, device: str, kind: str) -> tuple[Tensor, ...]:
    """One of ±1, where one turns the entries."""
    if "turned" not in kind:
        return ()
    return ((torch.randint(0, 2, (dim, dim), device=device) * 2 - 1).to(BF16),)


def _slack(kind: str) -> float:
    return TURNED if kind.endswith("fp4") else 0.0


def _with_before(x: Tensor, value: float) -> Tensor:
    """x ``[B, N, ratio, 2·D]`` to ``[B, N, 2·ratio, D]``, rows of ``value`` before window 0."""
    ratio, dim = x.shape[2], x.shape[3] // 2
    out = x.new_full((*x.shape[:2], 2 * ratio, dim), value)
    out[:, :, ratio:] = x[..., dim:]
    out[:, 1:, :ratio] = x[:, :-1, :, :dim]
    return out


def prefill(tokens: int, sizes: Sizes, device: str, kind: str) -> Example:
    """``tokens`` entries of one sequence: kv and gate bf16 ``[1, S, C]``, rounded at each step."""
    ratio, overlap = ROWS[kind]
    dim = _dim(sizes, kind)
    channels = dim * (2 if overlap else 1)

    def fn(
        kv: Tensor, gate: Tensor, bias: Tensor, w: Tensor, cos: Tensor, sin: Tensor, *m: Tensor
    ) -> Tensor:
        kv, gate = (t.unflatten(1, (tokens, ratio)) for t in (kv, gate))
        gate = gate + bias
        if overlap:
            kv, gate = _with_before(kv, 0.0), _with_before(gate, float("-inf"))
        pooled = atoms.softmax_pool(kv, gate, rounding="every", dtype=kv.dtype)
        return _finish(pooled, w, cos, sin, "weight", kind, m)

    rows = [torch.randn(1, tokens * ratio, channels, device=device, dtype=BF16) for _ in "ab"]
    bias = torch.randn(ratio, channels, device=device, dtype=BF16)
    angle = torch.rand(1, tokens, sizes.rope_dim // 2, device=device)
    w = torch.rand(dim, device=device, dtype=BF16)
    moved = sum(r.nbytes for r in rows) + 2 * angle.nbytes + tokens * dim * 2
    m = _matrix(dim, device, kind)
    return Example(fn, (*rows, bias, w, angle.cos(), angle.sin(), *m), moved, _slack(kind))


def decode(
    tokens: int, sizes: Sizes, device: str, kind: str, new: int = 1, closing: bool = True
) -> Example:
    """``tokens`` requests with ``new`` tokens each, of which one closes a window, or none: rings of
    bf16 kv and fp32 gates."""
    ratio, overlap = ROWS[kind]
    width, dim = ratio * (2 if overlap else 1), _dim(sizes, kind)
    ring = width + new - 1  # the rows behind a window that closes do not displace its first
    channels = dim * (2 if overlap else 1)

    def fn(
        kv: Tensor, gate: Tensor, positions: Tensor, rows: Tensor, w: Tensor, cos: Tensor,
        sin: Tensor, cache: Tensor, *m: Tensor,
    ) -> Tensor:  # fmt: skip
        ends = torch.where((positions + 1) % ratio == 0, positions, -1)
        span = ends.unsqueeze(-1) + torch.arange(1 - width, 1, device=ends.device)
        at = rows.unsqueeze(-1), span % ring
        x, g = kv[at], gate[at]
        if overlap:
            absent = (span[..., :ratio] < 0).unsqueeze(-1)
            old = g[:, :, :ratio, :dim].masked_fill(absent, float("-inf"))
            x = torch.cat((x[:, :, :ratio, :dim], x[:, :, ratio:, dim:]), dim=2)
            g = torch.cat((old, g[:, :, ratio:, dim:]), dim=2)
        pooled = atoms.softmax_pool(x, g, rounding="once", dtype=x.dtype)
        slot = torch.where(ends >= 0, ends // ratio, cache.shape[1] - 1)
        cache[rows, slot] = _finish(pooled, w, cos, sin, "once", kind, m)
        return cache[:, :-1]

    kv = torch.randn(tokens, ring, channels, device=device, dtype=BF16)
    gate = torch.randn(tokens, ring, channels, device=device)
    first = 3 * ratio - 1 if closing else 3 * ratio
    positions = (first + torch.arange(new, device=device)).repeat(tokens, 1)
    rows = torch.arange(tokens, device=device).unsqueeze(1)
    angle = torch.rand(tokens, new, sizes.rope_dim // 2, device=device)
    cache = torch.zeros(tokens, 5, dim, device=device, dtype=BF16)
    inputs = (kv, gate, positions, rows, torch.rand(dim, device=device), angle.cos(), angle.sin())
    moved = tokens * closing * dim * (width * 6 + 2) + 2 * angle.nbytes
    m = _matrix(dim, device, kind)
    return Example(fn, (*inputs, cache, *m), moved, _slack(kind), spare=len(inputs))
