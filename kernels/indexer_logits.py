"""The lightning indexer's scores: relu of every head's dot, weighted and summed over the heads.

Math     ``out[t,s] = Σ_h w[t,h] · (relu(q[t,h] · k[s]) · scale)`` [``· k_scale[s]``: the sum or,
         under ``scale_dots``, each dot in front of relu, whatever the scale's sign] for the keys
         ``start[t] ≤ s < end[t]``; elsewhere −inf (``clean``), or **left untouched**: the result
         then holds whatever the memory held. Tiles that no row needs are skipped. The dots of a
         tile are summed over the heads where they are made: no ``[T,H,S]`` in memory.
Shapes   q ``[B,T,H,D]``, k ``[B,S,D]``, w ``[B,T,H]``, k_scale ``[B,S]`` fp32 (scales of fp8
         keys; q's own scale belongs into w), start and end ``[B,T]`` int32 or int64, each may be
         absent; out ``[B,T,S]``, dense. D is a power of two from 16 (fp8: 32) to 256, H ≤ 256.
         A batch axis of k, k_scale, start or end may have stride 0.
Dtypes   q and k alike: bf16, fp16, fp32 or e4m3; w bf16, fp16 or fp32. out fp32, under "every"
         the dtype of q.
Strides  any; q and k with last stride 1.
Rounding "once": fp32 throughout (``q.float() @ k.float()``; bf16, fp16 and e4m3 operands have
         exact products in a tensor core, summed in fp32). "dot": the dot is rounded to q's
         dtype (of e4m3: bf16), as its matmul does, the rest fp32. "every", not of e4m3 nor with
         ``scale_dots``: dot, scale and product are each rounded to q's dtype, the head sum is
         fp32 and rounded at the end. ``precise`` rounds at the end only and folds the scale into
         w. The order of sums differs from eager's. ``narrow_sum`` multiplies e4m3 in fp8 tensor
         cores, at twice the rate; on Hopper their accumulator keeps about 14 bits. fp32 operands
         are each split into three bf16. NaN propagates as relu, product and sum do in eager.
Hopper   64 heads of 128 lanes in 16 bits or e4m3 are ``_indexer_hopper``'s from some size on, all
         else ``_indexer``'s; both gave the same bits in every shape that was tried (H200).
Source   DeepSeek-V3.2's indexer; vLLM's fp8_mqa_logits; ATOM #794 (range skip, clean or not).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _common as common
from . import _indexer_hopper_op as hopper
from ._common import INTERPRETED
from ._indexer import indexer_logits_kernel
from ._launch import wrap_triton

# Of fp32 operands, six products of bf16 parts: on an H200 nearer to fp64 than eager's FMA, where
# tf32x3 is farther from it. The interpreter computes in fp32 and knows no such name.
WIDE_DOT = "ieee" if INTERPRETED else "bf16x6"
ROUNDINGS = {"once": 0, "dot": 1, "every": 2}
ROUNDED = {"once": (1, 2, 4), "dot": (1, 2), "every": (2,)}  # bytes of the elements it is for


@dataclass(frozen=True)
class Launch:
    """Keys and tokens of a program, columns of one dot, warps, stages of the pipeline over q."""

    keys: int
    tokens: int
    columns: int
    warps: int
    stages: int


# By bytes of an element, then by the number of (query, key) pairs. A dot's columns are the heads of
# as many tokens: with 64, fetching the operands from shared memory takes longer than the product.
CONFIGS: dict[int, tuple[tuple[int | None, Launch], ...]] = {
    1: ((1 << 15, Launch(64, 1, 64, 4, 1)), (1 << 17, Launch(128, 2, 128, 4, 1)),
        (1 << 19, Launch(128, 8, 128, 4, 2)), (1 << 23, Launch(128, 16, 128, 4, 3)),
        (1 << 25, Launch(128, 32, 128, 4, 3)), (None, Launch(128, 64, 128, 4, 3))),
    2: ((1 << 13, Launch(64, 1, 64, 4, 1)), (1 << 15, Launch(128, 1, 64, 4, 1)),
        (1 << 17, Launch(128, 4, 128, 4, 2)), (1 << 19, Launch(128, 8, 128, 4, 2)),
        (1 << 21, Launch(256, 16, 64, 8, 2)), (1 << 23, Launch(256, 64, 64, 8, 3)),
        (None, Launch(128, 64, 128, 4, 2))),
    4: ((1 << 15, Launch(32, 1, 64, 4, 1)), (1 << 17, Launch(64, 4, 64, 4, 1)),
        (None, Launch(128, 16, 64, 8, 2))),
}  # fmt: skip


def _check(
    q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor | None, rounding: str, scale_dots: bool
) -> None:
    """Raises ValueError with a sentence for what the kernel does not take."""
    common.require(rounding in ROUNDINGS, f"rounding must be one of {', '.join(ROUNDINGS)}")
    common.require(q.dim() == 4 and k.dim() == 3 and w.dim() == 3
                   and (k_scale is None or k_scale.shape == k.shape[:2]),
                   "q is [B, T, H, D], k [B, S, D], w [B, T, H], k_scale [B, S]")  # fmt: skip
    heads, d = q.shape[2:]
    least = 32 if q.element_size() == 1 else 16
    common.require(q.dtype == k.dtype, f"q is {q.dtype}, k is {k.dtype}")
    common.require(q.dtype in (*common.FLOATS, common.FP8), "q must be bf16, fp16, fp32 or e4m3")
    fits = q.element_size() in ROUNDED[rounding]
    common.require(fits, f'of {q.dtype} there is no rounding "{rounding}"')
    fits = not scale_dots or k_scale is not None and rounding != "every"
    common.require(fits, 'scale_dots needs k_scale, and no rounding "every"')
    common.require(d >= least and d in (16, 32, 64, 128, 256),
                   f"index_head_dim {d} is no power of two from {least} to 256")  # fmt: skip
    common.require(heads <= 256, f"{heads} heads are more than a tile's 256")
    common.require(q.stride(-1) == k.stride(-1) == 1, "the last axis of q and k must be dense")
    if q.dtype == common.FP8:
        common.require_fp8(q.device)


def allocate(q: Tensor, k: Tensor, rounding: str) -> Tensor:
    """``[B,T,S]``, not initialised."""
    dtype = q.dtype if rounding == "every" else torch.float32
    return q.new_empty((*q.shape[:2], k.shape[1]), dtype=dtype)


def _launch(
    q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor | None, start: Tensor | None,
    end: Tensor | None, out: Tensor, *, scale: float, scale_dots: bool, rounding: str,
    precise: bool, clean: bool, narrow_sum: bool,
) -> None:  # fmt: skip
    (batch, tokens, heads, d), keys = q.shape, k.shape[1]
    common.require_static(heads=heads, index_head_dim=d)
    how = dict(scale=scale, scale_dots=scale_dots, rounding=ROUNDINGS[rounding], precise=precise,
               clean=clean)  # fmt: skip
    if hopper.refusal(q, k, narrow_sum) is None:
        hopper.launch(q, k, w, k_scale, start, end, out, **how)
        return
    c = common.launch_config(CONFIGS[q.element_size()], batch * tokens * keys)
    pad = max(16, triton.next_power_of_2(heads))
    width = max(1, min(c.columns // pad, c.tokens))
    optional = ((0, 0) if t is None else common.strides(t) for t in (k_scale, start, end))
    strides = (common.strides(q)[:3], common.strides(k)[:2], common.strides(w), *optional,
               common.strides(out)[:2])  # fmt: skip
    grid = (common.cdiv(keys, c.keys), common.cdiv(tokens, c.tokens), batch)
    wrap_triton(indexer_logits_kernel)[grid](
        q, k, w, *(w if t is None else t for t in (k_scale, start, end)), out, tokens, keys,
        *(s for own in strides for s in own),
        HEADS=heads, PAD=pad, D=d, KEYS=c.keys, TOKENS=c.tokens, DOT=width,
        HAS_KS=k_scale is not None, HAS_START=start is not None, HAS_END=end is not None,
        **{name.upper(): value for name, value in how.items()},
        WIDEN=q.dtype == common.FP8 and not narrow_sum, num_warps=c.warps,
        PRECISION=WIDE_DOT if q.dtype == torch.float32 else "ieee", num_stages=c.stages,
    )  # fmt: skip


def reference(
    q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor | None = None, start: Tensor | None = None,
    end: Tensor | None = None, *, scale: float = 1.0, scale_dots: bool = False,
    rounding: str = "once", precise: bool = False, clean: bool = True, narrow_sum: bool = False,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, one batch row at a time; without ``clean`` it writes 0."""
    out = allocate(q, k, rounding)
    for b in range(q.shape[0]):
        wide = precise or rounding == "once"
        own = torch.bfloat16 if q.dtype == common.FP8 else q.dtype
        x, y = (t[b].to(torch.float32 if wide else own) for t in (q, k))
        dots = (x.flatten(0, 1) @ y.mT).unflatten(0, x.shape[:2])  # [T, H, S]
        if rounding == "dot":
            dots = dots.float()
        if scale_dots:
            dots = dots * k_scale[b]  # type: ignore[index]
        terms = dots.relu() * scale * (w[b].float() if wide else w[b]).unsqueeze(-1)
        out[b] = terms.sum(dim=1) * (1.0 if k_scale is None or scale_dots else k_scale[b])
    place = torch.arange(k.shape[1], device=q.device)
    outside = torch.zeros_like(out, dtype=torch.bool)
    if start is not None:
        outside |= place < start.unsqueeze(-1)
    if end is not None:
        outside |= place >= end.unsqueeze(-1)
    return out.masked_fill_(outside, float("-inf") if clean else 0.0)


@torch.library.triton_op("dsv4fuse::indexer_logits", mutates_args=())
def indexer_logits(
    q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor | None = None, start: Tensor | None = None,
    end: Tensor | None = None, *, scale: float = 1.0, scale_dots: bool = False,
    rounding: str = "once", precise: bool = False, clean: bool = True, narrow_sum: bool = False,
) -> Tensor:  # fmt: skip
    """The indexer's scores ``[B,T,S]``: see the module's docstring."""
    _check(q, k, w, k_scale, rounding, scale_dots)
    kw = dict(scale=scale, scale_dots=scale_dots, rounding=rounding, precise=precise, clean=clean,
              narrow_sum=narrow_sum)  # fmt: skip
    if common.use_reference(q):
        return reference(q, k, w, k_scale, start, end, **kw)
    out = allocate(q, k, rounding)
    _launch(q, k, w, k_scale, start, end, out, **kw)
    return out


@indexer_logits.register_fake
def _(q, k, w, k_scale=None, start=None, end=None, *, scale_dots=False, rounding="once", **_):
    _check(q, k, w, k_scale, rounding, scale_dots)
    return allocate(q, k, rounding)


def traffic(q: Tensor, k: Tensor, w: Tensor, out: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(q, k, w, out)
