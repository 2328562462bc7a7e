"""In which order of axes q, kv and the rotation tables come, and what the model does to them.

Each entry: the shape of x (weight ``[DIM]``), the leading shape of the tables, the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._norms import BF16_WEIGHT
from ._ropes import REAL

DIM, ROPE = 48, 16
BATCH, SEQ, HEADS = 2, 5, 3
NORM, TURN = BF16_WEIGHT["hf_weighted"], REAL["slices_and_stack"]
Layout = tuple[tuple[int, ...], tuple[int, ...], Callable[..., Any]]


def straight(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return TURN(NORM(x, w), cos, sin)


def _heads_out(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, S, H·D] from a linear, normed and turned heads first, as transformers does."""
    q = x.view(BATCH, SEQ, HEADS, DIM).transpose(1, 2)
    return TURN(NORM(q, w), cos.unsqueeze(1), sin.unsqueeze(1))


def _tokens_out(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = x.unflatten(-1, (HEADS, DIM))
    return TURN(NORM(q, w), cos[:, :, None], sin[:, :, None]).flatten(-2)


def _slice_of_qkv(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, _ = x.split([HEADS * DIM, DIM], dim=-1)
    return TURN(NORM(q.unflatten(-1, (HEADS, DIM)), w), cos.unsqueeze(2), sin.unsqueeze(2))


def _by_position(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    positions = torch.arange(SEQ) * 2 % 7
    return TURN(NORM(x, w), cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))


def _slice_of_tables(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t[2 : 2 + SEQ].view(1, SEQ, 1, -1) for t in (cos, sin))
    return TURN(NORM(x, w), cos, sin)


B, S, H = BATCH, SEQ, HEADS
LAYOUTS: dict[str, Layout] = {
    "tokens first": ((B, S, H, DIM), (B, S, 1), straight),
    "heads first": ((B, H, S, DIM), (B, 1, S), straight),
    "heads by transpose": ((B, S, H * DIM), (B, S), _heads_out),
    "heads merged again": ((B, S, H * DIM), (B, S), _tokens_out),
    "slice of a joint projection": ((B, S, (H + 1) * DIM), (B, S), _slice_of_qkv),
    "flat": ((S, H, DIM), (S, 1), straight),
    "flat heads first": ((H, S, DIM), (S,), straight),
    "rows": ((S, DIM), (S,), straight),
    "kv": ((B, S, DIM), (B, S), straight),
    "kv, shared positions": ((B, S, DIM), (S,), straight),
    "kv with a head axis": ((B, 1, S, DIM), (B, 1, S), straight),
    "shared positions": ((B, S, H, DIM), (S, 1), straight),
    "shared, unit batch": ((B, S, H, DIM), (1, S, 1), straight),
    "shared, heads first": ((B, H, S, DIM), (S,), straight),
    "shared, heads first, four axes": ((B, H, S, DIM), (1, 1, S), straight),
    "kv at one position": ((B, 1, DIM), (1, 1), straight),
    "batch of one": ((1, S, H, DIM), (1, S, 1), straight),
    "sequence of one": ((B, 1, H, DIM), (B, 1, 1), straight),
    "one head": ((B, S, 1, DIM), (B, S, 1), straight),
    "a single row": ((1, 1, 1, DIM), (1, 1, 1), straight),
    "a vector": ((DIM,), (), straight),
    # Rows and heads that share one position: still one site, q's.
    "one position": ((B, H, DIM), (), straight),
    "decode at one position": ((B, 1, H, DIM), (1, 1, 1), straight),
    "decode at one position, heads first": ((B, H, 1, DIM), (1, 1, 1), straight),
    "tables by position": ((S, H, DIM), (7,), _by_position),
    "slice of the tables": ((B, S, H, DIM), (9,), _slice_of_tables),
}
