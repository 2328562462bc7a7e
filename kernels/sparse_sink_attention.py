"""Attention with a sink over keys chosen per query by index, and, before them, keys in a row.

Math     As ``sink_attention``, over the keys ``near[b, :]`` (if given) and then
         ``far[page[b, s], index[b, s, :]]`` (page None: b): what a gather and a cat would hold,
         which never lies in memory.
Shapes   q ``[B,S,H,D]``; near ``[B,T,D]`` or None; far ``[P,N,D]``; index ``[B,S,K]``; page
         ``[B,S]`` or None; mask ``[B,S,T + K]`` or None; sinks ``[H]``. But for q's, any B and S
         may be 1.
Dtypes   index and page int32 or int64; the others as ``sink_attention``.
Strides  As there; index and page any.
Indices  An index outside ``0 … N-1`` is no key: weight 0, nothing is read. wrap: a negative one
         counts from the end, as PyTorch's indexing does, and what hides it is the mask. A
         negative page always does.
Rounding As ``sink_attention``.
Source   DeepSeek's reference (``sparse_attn`` over ``topk_idxs``, -1 = none, the sink in the
         denominator only).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention as attention
from . import _common as common
from . import sink_attention as dense
from ._attention import Keys
from .sink_attention import allocate, as_mask


def _check(
    q: Tensor, near: Tensor | None, far: Tensor, index: Tensor, page: Tensor | None,
    mask: Tensor | None, mask_kind: str, sinks: Tensor,
) -> None:  # fmt: skip
    dense.check(q, far.unsqueeze(1), mask, mask_kind, sinks)
    common.require(index.dim() == 3, "index must be [B,S,K]")
    common.require(index.dtype in (torch.int32, torch.int64), "index must be int32 or int64")
    common.require(page is None or page.dim() == 2, "page must be [B,S]")
    if near is not None:
        common.require(near.dtype == far.dtype, "near and far keys differ in dtype")
        common.require(near.dim() == 3 and near.stride(-1) == 1, "near must be [B,T,D], dense in D")


def reference(
    q: Tensor, near: Tensor | None, far: Tensor, index: Tensor, page: Tensor | None,
    mask: Tensor | None, sinks: Tensor, *, scale: float, mask_kind: str = "add",
    fill: float | None = None, wrap: bool = False, rounded: str = "", wide: bool = False,
    nan_empty: bool = False, out_dtype: torch.dtype | None = None, heads_first: bool = False,
) -> Tensor:  # fmt: skip
    """``sparse_sink_attention`` in plain PyTorch."""
    batch, length, _, d = q.shape
    rows = far.shape[1]
    at = torch.where(index < 0, index + rows, index) if wrap else index
    valid = (at >= 0) & (at < rows)
    at = torch.where(valid, at, 0).long().expand(batch, length, -1)
    if page is None:
        page, far = torch.arange(batch, device=q.device)[:, None], far.expand(batch, -1, -1)
    keys = far[page.long().unsqueeze(-1), at]
    if near is not None:
        beside = near.unsqueeze(1).expand(batch, length, -1, -1)
        keys = torch.cat((beside, keys), dim=2)
    s = dense.logits(q, keys, as_mask(mask, mask_kind, fill), scale=scale, rounded=rounded)
    none = torch.nn.functional.pad(~valid, (keys.shape[2] - index.shape[2], 0)).unsqueeze(2)
    s = s.masked_fill(none, float("-inf"))
    keys = keys.masked_fill(none.transpose(-1, -2), 0)
    return dense.combine(s, keys, sinks, allocate(q, out_dtype, heads_first), wide,
                         nan_empty)


@torch.library.triton_op("dsv4fuse::sparse_sink_attention", mutates_args=())
def sparse_sink_attention(
    q: Tensor, near: Tensor | None, far: Tensor, index: Tensor, page: Tensor | None,
    mask: Tensor | None, sinks: Tensor, *, scale: float, mask_kind: str = "add",
    fill: float | None = None, wrap: bool = False, rounded: str = "", wide: bool = False,
    nan_empty: bool = False, out_dtype: torch.dtype | None = None, heads_first: bool = False,
) -> Tensor:  # fmt: skip
    """Attention over chosen keys: see the module's docstring."""
    _check(q, near, far, index, page, mask, mask_kind, sinks)
    if common.use_reference(q):
        return reference(q, near, far, index, page, mask, sinks, scale=scale, mask_kind=mask_kind,
                         fill=fill, wrap=wrap, rounded=rounded, wide=wide, nan_empty=nan_empty,
                         out_dtype=out_dtype, heads_first=heads_first)  # fmt: skip
    out = allocate(q, out_dtype, heads_first)
    keys = Keys(None if near is None else near.unsqueeze(1), far, index, page, wrap)
    attention.launch(
        q, keys, as_mask(mask, mask_kind, fill), sinks, out, scale=scale, rounded=rounded,
        wide=wide, nan_empty=nan_empty,
    )  # fmt: skip
    return out


@sparse_sink_attention.register_fake
def _(q, near, far, index, page, mask, sinks, *, mask_kind="add", out_dtype=None,
      heads_first=False, **_):  # fmt: skip
    _check(q, near, far, index, page, mask, mask_kind, sinks)
    return allocate(q, out_dtype, heads_first)


def traffic(q: Tensor, far: Tensor, index: Tensor, *outputs: Tensor) -> int:
    """Bytes that must move: q, indices and output once, of the keys all or the chosen ones."""
    chosen = index.numel() * far.shape[-1] * far.element_size()
    return common.nbytes(q, index, *outputs) + min(chosen, common.nbytes(far))
