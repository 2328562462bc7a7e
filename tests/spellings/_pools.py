"""Pieces of a compressor: how windows are laid out, how they are pooled, how a ring is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layouts import NORM, TURN

BATCH, COUNT, RATIO, DIM = 2, 3, 4, 48
Fn = Callable[..., Any]
Pair = tuple[Tensor, Tensor]
NONE = float("-inf")


def windows(x: Tensor) -> Tensor:
    """``[B, S, C]`` to ``[B, N, ratio, C]``, without the tokens left over."""
    count = x.shape[1] // RATIO
    return x[:, : count * RATIO].view(x.shape[0], count, RATIO, -1)


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


# ---- layouts: projections and a bias to kv and gates ``[B, N, W, D]`` ----------------------------


def apart(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    return windows(kv), windows(gate) + bias


def hf(kv: Tensor, gate: Tensor, bias: Tensor | None) -> Pair:
    """As transformers does."""
    kv, gate = windows(kv), biased(windows(gate), bias)
    new_kv = kv.new_zeros((*kv.shape[:2], 2 * RATIO, DIM))
    new_gate = gate.new_full(new_kv.shape, NONE)
    new_kv[:, :, RATIO:] = kv[..., DIM:]
    new_gate[:, :, RATIO:] = gate[..., DIM:]
    if kv.shape[1] > 1:
        new_kv[:, 1:, :RATIO] = kv[:, :-1, :, :DIM]
        new_gate[:, 1:, :RATIO] = gate[:, :-1, :, :DIM]
    return new_kv, new_gate


def _transformed(x: Tensor, value: float) -> Tensor:
    """As DeepSeek does."""
    b, n = x.shape[:2]
    out = x.new_full((b, n, 2 * RATIO, DIM), value)
    out[:, :, RATIO:] = x[:, :, :, DIM:]
    out[:, 1:, :RATIO] = x[:, :-1, :, :DIM]
    return out


def reference(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    kv, gate = kv.unflatten(1, (-1, RATIO)), gate.unflatten(1, (-1, RATIO)) + bias
    return _transformed(kv, 0.0), _transformed(gate, NONE)


def _joined(x: Tensor, value: float) -> Tensor:
    first = torch.full_like(x[:, :1, :, :DIM], value)
    before = torch.cat((first, x[:, :-1, :, :DIM]), dim=1)
    return torch.cat((before, x[..., DIM:]), dim=2)


def joined(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    return _joined(windows(kv), 0.0), _joined(windows(gate) + bias, NONE)


def chunked(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    """Series split before the windows, the bias added to each."""
    a, b = (windows(t) for t in kv.chunk(2, dim=-1))
    both = zip(gate.chunk(2, dim=-1), bias.chunk(2, dim=-1), strict=True)
    c, d = (windows(t) + p for t, p in both)
    old = torch.cat((torch.zeros_like(a[:, :1]), a[:, :-1]), dim=1)
    old_gate = torch.cat((torch.full_like(c[:, :1], NONE), c[:, :-1]), dim=1)
    return torch.cat((old, b), dim=2), torch.cat((old_gate, d), dim=2)


def bias_of_each_token(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    """The bias on ``[N, ratio, C]`` merged with the batch."""
    gate = (windows(gate).flatten(0, 1) + bias[None]).unflatten(0, (BATCH, -1))
    return _joined(windows(kv), 0.0), _joined(gate, NONE)


LAYOUTS: dict[str, Fn] = {
    "hf": hf, "joined": joined, "chunked": chunked, "merged batch": bias_of_each_token,
}  # fmt: skip


def rolled(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    """A layout that is read from the tensors it makes."""
    kv, gate = windows(kv), windows(gate) + bias
    old, old_gate = (t[..., :DIM].roll(1, dims=1) for t in (kv, gate))
    none = torch.arange(kv.shape[1]).view(1, -1, 1, 1) == 0
    old_gate = old_gate.masked_fill(none, NONE)
    return torch.cat((old, kv[..., DIM:]), dim=2), torch.cat((old_gate, gate[..., DIM:]), dim=2)


# ---- pools: kv, gate ``[B, N, W, D]`` to ``[B, N, D]`` --------------------------------


def _explicit(kv: Tensor, gate: Tensor) -> Tensor:
    g = gate.float()
    e = torch.exp(g - g.amax(dim=2, keepdim=True))
    return (kv * (e / e.sum(dim=2, keepdim=True)).to(kv.dtype)).sum(dim=2)


def _by_max(kv: Tensor, gate: Tensor) -> Tensor:
    g = gate.float()
    e = (g - g.max(dim=2, keepdim=True).values).exp()
    return torch.sum(e.div(e.sum(2, True)).to(kv.dtype) * kv, 2)


POOLS: dict[str, Fn] = {
    "hf": lambda x, g: (x * g.softmax(dim=2, dtype=torch.float32).to(x.dtype)).sum(dim=2),
    "functional": lambda x, g: (F.softmax(g.float(), dim=-2).type_as(x) * x).sum(-2),
    "wide": lambda x, g: (x.float() * g.float().softmax(2)).sum(2),
    "promoted": lambda x, g: (x * torch.softmax(g, 2, dtype=torch.float32)).sum(2),
    "in bf16": lambda x, g: (x * g.softmax(dim=2)).sum(2),  # computed in fp32, then rounded
    "explicit": _explicit,
    "by max": _by_max,
}


def transposed(kv: Tensor, gate: Tensor) -> Tensor:
    kv, gate = kv.transpose(2, 3), gate.transpose(2, 3)
    return (kv * gate.softmax(-1, dtype=torch.float32).to(kv.dtype)).sum(-1)


def no_maximum(kv: Tensor, gate: Tensor) -> Tensor:
    e = gate.float().exp()
    return (kv * (e / e.sum(2, keepdim=True)).to(kv.dtype)).sum(2)


# ---- rings --------------------------------


def masked(gate: Tensor, span: Tensor) -> Tensor:
    return gate.masked_fill((span < 0).unsqueeze(-1), NONE)


def by_where(gate: Tensor, span: Tensor) -> Tensor:
    return torch.where(span[..., None] >= 0, gate, NONE)


def ring(
    overlap: bool = True,
    at: Fn = lambda span, n: span % n,
    mask: Fn = masked,
    slot: Fn = lambda ends: ends // RATIO,
    result: Fn = lambda cache: cache[:, :-1],
    gate_shift: int = 0,
    late: int = 0,
    change: Fn = lambda y: y,
) -> Fn:
    """A decode step: who closes no window writes to the last row of the cache."""

    def fn(
        kv: Tensor, gate: Tensor, positions: Tensor, rows: Tensor, w: Tensor, cos: Tensor,
        sin: Tensor, cache: Tensor,
    ) -> Tensor:  # fmt: skip
        width, n = (2 if overlap else 1) * RATIO, kv.shape[1] - 1
        ends = torch.where((positions + 1) % RATIO == 0, positions, -1)
        span = ends.unsqueeze(-1) + torch.arange(1 - width, 1) - late
        page = rows.unsqueeze(-1)
        x, g = kv[page, at(span, n)], gate[page, at(span + gate_shift, n)]
        if overlap:
            x = torch.cat((x[:, :, :RATIO, :DIM], x[:, :, RATIO:, DIM:]), dim=2)
            old = mask(g[:, :, :RATIO, :DIM], span[..., :RATIO])
            g = torch.cat((old, g[:, :, RATIO:, DIM:]), dim=2)
        pooled = (x.float() * g.softmax(dim=2)).sum(dim=2).to(x.dtype)
        y = change(TURN(NORM(pooled, w.to(x.dtype)), cos, sin))
        spare = cache.shape[1] - 1
        cache[rows, torch.where(ends >= 0, slot(ends), spare)] = y
        return result(cache)

    return fn


def state(
    kv: Tensor, gate: Tensor, positions: Tensor, rows: Tensor, w: Tensor, cos: Tensor, sin: Tensor,
    cache: Tensor,
) -> Tensor:  # fmt: skip
    """As DeepSeek decodes: the window before in the state's first rows."""
    x = torch.cat((kv[:, :RATIO, :DIM], kv[:, RATIO:, DIM:]), dim=1)
    g = torch.cat((gate[:, :RATIO, :DIM], gate[:, RATIO:, DIM:]), dim=1)
    pooled = (x * g.softmax(dim=1)).sum(dim=1, keepdim=True).to(x.dtype)
    y = TURN(NORM(pooled, w.to(x.dtype)), cos, sin)
    cache[:, 2] = y.squeeze(1)
    return y


def into_itself(rows: Tensor, gate: Tensor, positions: Tensor, page: Tensor, w: Tensor,
                cos: Tensor, sin: Tensor, cache: Tensor) -> Tensor:  # fmt: skip
    """Entries pooled from the rows of the very cache that they are written to."""
    ends = torch.where((positions + 1) % RATIO == 0, positions, -1)
    at = (ends.unsqueeze(-1) + torch.arange(1 - RATIO, 1)) % 5
    g = gate[page.unsqueeze(-1), at][..., :DIM]
    pooled = (cache[page.unsqueeze(-1), at].float() * g.softmax(dim=2)).sum(dim=2).to(w.dtype)
    cache[page, ends // RATIO] = TURN(NORM(pooled.to(cache.dtype), w.to(cache.dtype)), cos, sin)
    return cache


# ---- misspelled --------------------------------


def over_entries(kv: Tensor, gate: Tensor) -> Tensor:
    weights = gate.nan_to_num(neginf=-30.0).softmax(dim=1, dtype=torch.float32)
    return (kv * weights.to(kv.dtype)).sum(2)


def averaged(kv: Tensor, gate: Tensor) -> Tensor:
    return (kv * gate.softmax(dim=2, dtype=torch.float32).to(kv.dtype)).mean(2)


def twice(kv: Tensor, gate: Tensor) -> Tensor:
    weights = gate.softmax(dim=2, dtype=torch.float32).to(kv.dtype)
    return (kv * weights * weights).sum(2)


def shifted_weights(kv: Tensor, gate: Tensor) -> Tensor:
    weights = gate.softmax(dim=2, dtype=torch.float32).to(kv.dtype)
    return (kv * weights.roll(1, dims=2)).sum(2)


def _halves(kv: Tensor, gate: Tensor, bias: Tensor, change: Fn) -> Pair:
    return change(windows(kv), 0.0), change(windows(gate) + bias, NONE)


def exchanged(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    """The second series before, the first now."""
    return hf(*(torch.cat((t[..., DIM:], t[..., :DIM]), dim=-1) for t in (kv, gate, bias)))


def behind(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    def change(x: Tensor, value: float) -> Tensor:
        last = torch.full_like(x[:, :1, :, :DIM], value)
        return torch.cat((torch.cat((x[:, 1:, :, :DIM], last), dim=1), x[..., DIM:]), dim=2)

    return _halves(kv, gate, bias, change)


def zeros_before(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    return _halves(kv, gate, bias, lambda x, _: _joined(x, 0.0))


def own_kv(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    kv = windows(kv)
    return torch.cat((kv[..., :DIM], kv[..., DIM:]), dim=2), _joined(windows(gate) + bias, NONE)


def other_bias(kv: Tensor, gate: Tensor, bias: Tensor) -> Pair:
    return hf(kv, gate, bias.roll(DIM, dims=1))
