"""The op that launches the Hopper indexer kernel, and which launches are its."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _common as common
from . import _hopper as hopper
from ._common import cdiv, named_strides
from ._launch import opaque

KERNEL = ("_indexer_hopper", "hopper_indexer_kernel")
# With fewer tokens of a batch row a program's rows are empty; with fewer pairs of a query and a key
# its start takes longer than what it gains.
FEW, PAIRS = 4, 1 << 18
MULTIPLY, LOAD = 200, 112  # registers of a thread
TOKENS, KEYS = 4, 128  # of a program, of a tile


def refusal(q: Tensor, k: Tensor, narrow_sum: bool) -> str | None:
    """Why the launch is not the Hopper kernel's, or None."""
    if (why := hopper.refusal(q.device, kernel())) is not None:
        return why
    if q.shape[2] != 64 or q.shape[3] != 128:
        return "It is for 64 heads of 128 lanes."
    if q.dtype == torch.float32 or narrow_sum:
        return "It multiplies elements of 16 bits, and e4m3 as such."
    tokens, keys = (common.size_hint(t.shape[1]) for t in (q, k))
    if tokens < FEW:
        return "A program has the queries of four tokens of a batch row."
    if common.size_hint(q.shape[0]) * tokens * keys < PAIRS:
        return "There are few queries and keys."
    if any(common.size_hint(s) % 16 for s in k.stride()[:-1]):
        return "Keys do not start at multiples of 16 elements."
    return None


def kernel() -> Any:
    return hopper.gluon_kernel(*KERNEL)


def launch(*tensors: Tensor | None, **how: Any) -> None:
    """q, k, w, k_scale, start, end, out, and how, as ``indexer_logits`` has them."""
    torch.ops.dsv4fuse.indexer_hopper(*tensors, **how)


@torch.library.custom_op("dsv4fuse::indexer_hopper", mutates_args=("out",))
def indexer_hopper(
    q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor | None, start: Tensor | None,
    end: Tensor | None, out: Tensor, *, scale: float, scale_dots: bool, rounding: int,
    precise: bool, clean: bool,
) -> None:  # fmt: skip
    """``launch``; opaque, for a graph of torch takes launches of Triton kernels only."""
    (batch, tokens), keys, k = q.shape[:2], k.shape[1], near(k)
    blocks, tiles, most = cdiv(tokens, TOKENS), cdiv(keys, KEYS), hopper.processors(q.device)
    # Where four tokens each leave multiprocessors idle, their keys are shared among programs.
    span = cdiv(tiles, max(1, min(tiles, most // (batch * blocks))))
    spans = cdiv(tiles, span)
    optional = dict(ks_ptr=k_scale, start_ptr=start, end_ptr=end)
    opaque(kernel())[(min(batch * blocks * spans, most),)](
        q_ptr=q, k_ptr=k, w_ptr=w, out_ptr=out, tokens=tokens, keys=keys,
        parts=batch * blocks * spans, blocks=blocks, spans=spans, span=span,
        **{name: w if t is None else t for name, t in optional.items()},
        **named_strides(q, "q", "bth"), **named_strides(k, "k", "bt"),
        **named_strides(w, "w", "bth"), **named_strides(k_scale, "ks", "bt"),
        **named_strides(start, "start", "bt"), **named_strides(end, "end", "bt"),
        **named_strides(out, "out", "bt"), HAS_KS=k_scale is not None, SCALE_DOTS=scale_dots,
        HAS_START=start is not None, HAS_END=end is not None, CLEAN=clean, SCALE=scale,
        ROUNDING=rounding, PRECISE=precise, WIDEN=q.dtype == common.FP8, MULTIPLY=MULTIPLY,
        LOAD=LOAD, num_warps=4,
    )  # fmt: skip


def near(k: Tensor) -> Tensor:
    """Keys in rows that start at multiples of 32 bytes, a tile's within 2^31 elements."""
    return hopper.aligned(k if k.stride(1) * KEYS < 1 << 31 else k.contiguous())


@indexer_hopper.register_fake
def _(q, *_, **__):
    return None
