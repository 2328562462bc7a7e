"""Attention with a sink: many heads on one tensor that is both keys and values, under a mask.

Math     ``l[t] = scale · q·kv[t] + mask[t]``; ``w = exp(l) / (Σ exp(l) + exp(sink))``;
         ``out = Σ w[t] · kv[t]``: the sink takes weight and adds nothing.
Shapes   q ``[B,S,H,D]``; kv ``[B,G,T,D]``, G = 1 for keys that all queries share, G = S for keys
         of each query's own; mask ``[B or 1, S or 1, T]`` or None; sinks ``[H]``.
Dtypes   q and kv bf16 or fp16 alike; sinks and an additive mask any float; a bool mask says who is
         "allowed" or "hidden"; out in ``out_dtype`` (q's where None).
Strides  any, 0 included; q and kv have last stride 1. out is dense as ``[B,S,H,D]``, or as
         ``[B,H,S,D]`` (heads_first).
Masks    A hidden key's logit is ``fill`` (-inf where None). A row that sees nothing gives 0; with
         a sink of -inf too, or always for nan_empty, it gives NaN, as a softmax of nothing does. A
         tile of keys that a mask
         hides from all its queries is not read: additive values and fills ≤ -1e30 hide, beside a
         sink ≥ -1e29, since their weight is below the least fp32 for any logit below 1e29.
Rounding ``rounded`` names the points at which the module rounds scores to q's dtype: "p" the
         product, "s" the scaled one, "m" the masked one; the kernel rounds there too. From there
         to the weights all is fp32, whatever the module rounds (transformers rounds logits minus
         their maximum, which is not known before the last key). The weights are rounded to kv's
         dtype for the second product *before* the division by the denominator, eager does so after
         it: no online softmax can. wide: the module keeps the weights in fp32, and the kernel
         multiplies their rounding and its remainder. What is promised, faithful as well as
         precise: the error against exact arithmetic is that of the module or less. "precise"
         rounds no scores.
Source   flash attention (Dao et al.); DeepSeek's sparse attention kernel, whose roundings
         (weights before division) are those above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _attention as attention
from . import _common as common
from ._attention import Keys, Mask


def check(q: Tensor, kv: Tensor, mask: Tensor | None, mask_kind: str, sinks: Tensor) -> None:
    common.require(q.dim() == 4 and kv.dim() == 4, "q must be [B,S,H,D] and kv [B,G,T,D]")
    common.require(q.dtype in (torch.bfloat16, torch.float16), "q must be bf16 or fp16")
    common.require(q.dtype == kv.dtype, "q and kv differ in dtype")
    common.require(q.stride(-1) == 1 and kv.stride(-1) == 1, "q and kv must have dense last axes")
    common.require(sinks.dim() == 1, "sinks must be [H]")
    common.require(16 <= q.shape[-1] <= 512, "head_dim must be from 16 to 512")
    if mask is not None:
        common.require(mask.dim() == 3, "mask must be [B or 1, S or 1, T]")
        common.require(mask_kind in attention.MASKS, "mask_kind must be add, allowed or hidden")
        boolean = mask.dtype == torch.bool
        common.require(boolean == (mask_kind != "add"), "the mask's dtype and kind differ")


def allocate(q: Tensor, out_dtype: torch.dtype | None, heads_first: bool) -> Tensor:
    """out ``[B,S,H,D]`` with the strides that the docstring promises."""
    batch, length, heads, d = q.shape
    dtype = out_dtype or q.dtype
    if heads_first:
        return q.new_empty((batch, heads, length, d), dtype=dtype).transpose(1, 2)
    return q.new_empty((batch, length, heads, d), dtype=dtype)


def logits(
    q: Tensor, kv: Tensor, mask: Mask | None, *, scale: float, rounded: str
) -> Tensor:
    """``[B,S,H,T]`` fp32, rounded as the kernel does."""
    batch, length, heads, d = q.shape
    groups = kv.shape[1]
    packed = q.reshape(batch, groups, -1, d)

    def cut(s: Tensor, point: str) -> Tensor:
        return s.to(q.dtype).float() if point in rounded else s

    keys = kv.transpose(-1, -2)
    exact = "p" not in rounded
    scores = torch.matmul(packed.float(), keys.float()) if exact else torch.matmul(packed, keys)
    s = cut(scores.float().view(batch, length, heads, -1) * scale, "s")
    if mask is None:
        return s
    seen = mask.tensor.unsqueeze(2)
    if mask.kind == "add":
        return cut(s + seen.float(), "m")
    return s.masked_fill(seen if mask.kind == "hidden" else ~seen, mask.fill)


def combine(
    s: Tensor, kv: Tensor, sinks: Tensor, out: Tensor, wide: bool, nan_empty: bool
) -> Tensor:
    """Logits ``[B,S,H,T]`` and values to the output; the weights rounded as eager does."""
    sink = sinks.float().view(1, 1, -1, 1).expand(*s.shape[:-1], 1)
    w = torch.cat((s, sink), dim=-1).softmax(dim=-1)[..., :-1]
    if nan_empty:
        w = w.masked_fill(s.amax(-1, keepdim=True) == -math.inf, math.nan)
    batch, groups = kv.shape[:2]
    w = w.reshape(batch, groups, -1, w.shape[-1])
    w = w if wide else w.to(kv.dtype)
    exact = wide or out.dtype == torch.float32
    y = torch.matmul(w.float(), kv.float()) if exact else torch.matmul(w, kv)
    return out.copy_(y.view(out.shape))


def reference(
    q: Tensor, kv: Tensor, mask: Tensor | None, sinks: Tensor, *, scale: float,
    mask_kind: str = "add", fill: float | None = None, rounded: str = "", wide: bool = False,
    nan_empty: bool = False, out_dtype: torch.dtype | None = None, heads_first: bool = False,
) -> Tensor:  # fmt: skip
    """``sink_attention`` in plain PyTorch."""
    out = allocate(q, out_dtype, heads_first)
    s = logits(q, kv, as_mask(mask, mask_kind, fill), scale=scale, rounded=rounded)
    return combine(s, kv, sinks, out, wide, nan_empty)


def as_mask(mask: Tensor | None, kind: str, fill: float | None) -> Mask | None:
    return None if mask is None else Mask(mask, kind, -math.inf if fill is None else fill)


@torch.library.triton_op("dsv4fuse::sink_attention", mutates_args=())
def sink_attention(
    q: Tensor, kv: Tensor, mask: Tensor | None, sinks: Tensor, *, scale: float,
    mask_kind: str = "add", fill: float | None = None, rounded: str = "", wide: bool = False,
    nan_empty: bool = False, out_dtype: torch.dtype | None = None, heads_first: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of all heads on one tensor of keys and values: see the module's docstring."""
    check(q, kv, mask, mask_kind, sinks)
    if common.use_reference(q):
        return reference(q, kv, mask, sinks, scale=scale, mask_kind=mask_kind, fill=fill,
                         rounded=rounded, wide=wide, nan_empty=nan_empty, out_dtype=out_dtype,
                         heads_first=heads_first)
    out = allocate(q, out_dtype, heads_first)
    attention.launch(
        q, Keys(kv), as_mask(mask, mask_kind, fill), sinks, out, scale=scale, rounded=rounded,
        wide=wide, nan_empty=nan_empty,
    )  # fmt: skip
    return out


@sink_attention.register_fake
def _(q, kv, mask, sinks, *, mask_kind="add", out_dtype=None, heads_first=False, **_):
    check(q, kv, mask, mask_kind, sinks)
    return allocate(q, out_dtype, heads_first)


def traffic(q: Tensor, kv: Tensor, mask: Tensor | None, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(q, kv, mask, *outputs)
