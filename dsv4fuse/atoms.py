"""The small references that fusions are chains of, in plain PyTorch.

An atom is at once a specification, the test oracle, what a fused op runs on a CPU, and
(traced by the running torch, brought to normal form) the pattern that is looked for.
Every ``rounding`` argument names where the plain module rounds to the activation dtype:

========== ==================================================================================
"once"     fp32 from the load to the end, one rounding at the end
"rstd"     RMSNorm: ``rsqrt(mean(x.float()²) + eps)`` is rounded, the product is in ``x.dtype``
"weight"   RMSNorm: the normalised value is rounded *before* the weight multiplies it
"silu"     SwiGLU: ``silu(gate)`` is rounded, then the product with ``up`` is rounded
"every"    each single operation rounds to ``x.dtype``, as PyTorch does without ``.float()``
========== ==================================================================================
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP4_MAX = 6.0
# The forms of e2m1(): whose zeros have a sign, and what NaN becomes if not NaN.
E2M1 = tuple(f"{zero}{nan}" for nan in ("", " 0", " 6") for zero in ("kept", "turned", "plain"))


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float, rounding: str) -> Tensor:
    """RMSNorm over the last axis. x ``[..., D]``, weight ``[D]`` or None; returns ``[..., D]``.

    The result has ``x.dtype``, but for "rstd", "weight" and "every" with a weight of a wider
    dtype, where PyTorch's promotion decides.
    """
    if rounding == "every":
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y if weight is None else weight * y
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if rounding == "rstd":
        y = x * rstd.to(x.dtype)
        return y if weight is None else weight * y
    y = wide * rstd
    if weight is None:
        return y.to(x.dtype)
    if rounding == "weight":
        return weight * y.to(x.dtype)
    return (weight * y).to(x.dtype)  # "once"


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, rounding: str) -> Tensor:
    """Rotate the trailing interleaved (even, odd) pairs of the last axis; leave the rest.

    x ``[..., D]``; cos, sin ``[..., R/2]``, broadcast against x's leading axes, R ≤ D even.
    ``inverse`` rotates by the conjugate. "once" computes in fp32, "every" in ``x.dtype``.
    """
    half = cos.shape[-1]
    nope, rot = x[..., : x.shape[-1] - 2 * half], x[..., x.shape[-1] - 2 * half :]
    if rounding == "once":
        rot = rot.float()
    even, odd = rot[..., 0::2], rot[..., 1::2]
    if inverse:
        sin = -sin
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((nope, turned.flatten(-2).to(x.dtype)), dim=-1)


def softmax_pool(kv: Tensor, gate: Tensor, *, rounding: str, dtype: torch.dtype) -> Tensor:
    """The sum over a window's rows, each channel weighted by a softmax of its gates in fp32.

    kv, gate ``[..., W, D]``; returns ``[..., D]`` in ``dtype``. "every" rounds the weights, the
    products and the sum to ``kv.dtype``, "once" the sum to ``dtype``.
    """
    wide = gate.float()
    # As Inductor spells a softmax: torch's own on a CPU adds up this axis row after row, which of
    # 128 rows leaves four rounding steps more.
    e = (wide - wide.amax(-2, keepdim=True)).exp()
    weights = e / e.sum(-2, keepdim=True)
    if rounding == "every":
        return (kv * weights.to(kv.dtype)).sum(-2)
    return (kv.float() * weights).sum(-2).to(dtype)


def clamp_swiglu(
    gate: Tensor, up: Tensor, weight: Tensor | None, *, limit: float | None, rounding: str
) -> Tensor:
    """``silu(min(gate, limit)) * clamp(up, ±limit) [* weight]``; gate, up ``[..., I]``.

    weight ``[..., 1]`` multiplies before the last rounding ("once") or after it ("silu").
    NaN propagates. Returns ``[..., I]`` in ``gate.dtype`` (weight's promotion under "silu").
    """
    wide = (gate.float(), up.float()) if rounding == "once" else (gate, up)
    g, u = wide
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(min=-limit, max=limit)
    y = F.silu(g) * u
    if weight is not None:
        y = y * weight
    return y.to(gate.dtype) if rounding == "once" else y


def block_scale(amax: Tensor, *, scale: str, via: str, top: float = FP8_MAX) -> Tensor:
    """The fp32 scale of a block: ``amax / top``, for "pow2" rounded up to a power of two.

    ``via="div"`` divides by top, ``via="mul"`` multiplies by ``1 / top`` (one ulp apart).
    """
    raw = amax / top if via == "div" else amax * (1.0 / top)
    return torch.exp2(torch.ceil(torch.log2(raw))) if scale == "pow2" else raw


def amax_scale(
    blocks: Tensor, *, floor: float | None, scale: str, via: str = "div", top: float = FP8_MAX
) -> Tensor:
    """The scale of each block: blocks ``[..., group]`` to fp32 ``[..., 1]``."""
    amax = blocks.float().abs().amax(-1, keepdim=True)
    amax = amax if floor is None else amax.clamp_min(floor)
    return block_scale(amax, scale=scale, via=via, top=top)


def quotient(blocks: Tensor, s: Tensor, *, by: str) -> Tensor:
    """Blocks over their scales in fp32: ``x / s``, or ``x * (1 / s)`` for ``by="mul"``."""
    return blocks.float() / s if by == "div" else blocks.float() * s.reciprocal()


def encode(blocks: Tensor, s: Tensor, *, by: str = "div", saturate: bool = True) -> Tensor:
    """Blocks over their scales as fp8 e4m3."""
    y = quotient(blocks, s, by=by)
    return (y.clamp(-FP8_MAX, FP8_MAX) if saturate else y).to(FP8)


def e2m1(v: Tensor, *, form: str) -> Tensor:
    """The nearest of 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives, ties to even; fp32 in and out.

    Beyond 6 it is 6. ``form`` says what spellings differ in: of a v that becomes zero, "kept"
    keeps the sign, "turned" only where v < 0, "plain" never. NaN stays NaN, or is 0 or 6 with
    that number behind: then an infinite element, or a block of zeros without a floor, is no NaN.
    """
    a = v.abs().clamp(max=FP4_MAX)
    step = torch.where(a < 2.0, 0.5, torch.where(a < 4.0, 1.0, 2.0))
    q = torch.round(a / step) * step
    zeros, _, nan = form.partition(" ")
    if nan:
        q = torch.where(v.isnan(), float(nan), q)
    if zeros == "kept":
        return torch.copysign(q, v)
    q = torch.where(v < 0.0, -q, q)
    return q if zeros == "turned" else q + 0.0


def group_quant(
    x: Tensor,
    *,
    group: int,
    floor: float | None,
    scale: str,
    via: str = "div",
    by: str = "div",
    saturate: bool = True,
) -> tuple[Tensor, Tensor]:
    """fp8 e4m3 in groups along the last axis. x ``[..., L]``, ``L % group == 0``.

    Returns codes ``[..., L]`` float8_e4m3fn and fp32 scales ``[..., L / group]``, with
    ``codes * scale ≈ x``. ``floor`` bounds amax from below. NaN gives NaN codes.
    """
    blocks = x.unflatten(-1, (-1, group))
    s = amax_scale(blocks, floor=floor, scale=scale, via=via)
    return encode(blocks, s, by=by, saturate=saturate).flatten(-2), s.squeeze(-1)


def fake_quant(
    x: Tensor,
    *,
    group: int,
    floor: float | None,
    scale: str,
    via: str = "div",
    by: str = "div",
    saturate: bool = True,
    fp4: str = "",
) -> Tensor:
    """x through fp8 e4m3 and back, in groups along the last axis; keeps x's dtype.

    With ``fp4``, a form of ``e2m1``, through fp4 e2m1, which always saturates.
    """
    blocks = x.unflatten(-1, (-1, group))
    top = FP4_MAX if fp4 else FP8_MAX
    s = amax_scale(blocks, floor=floor, scale=scale, via=via, top=top)
    if fp4:
        codes = e2m1(quotient(blocks, s, by=by), form=fp4)
    else:
        codes = encode(blocks, s, by=by, saturate=saturate)
    return (codes.float() * s).flatten(-2).to(x.dtype)


def fake_quant_lead(x: Tensor, *, tail: int, **quant: object) -> Tensor:
    """``fake_quant`` of all but the last ``tail`` lanes (the rope part of a kv row)."""
    lead = x.shape[-1] - tail
    return torch.cat((fake_quant(x[..., :lead], **quant), x[..., lead:]), dim=-1)  # type: ignore


def hyper_mixes(x: Tensor, fn: Tensor, *, eps: float, before: bool) -> Tensor:
    """The streams ``[..., n, D]`` over their common RMS, times fn ``[m, n·D]``: fp32 ``[..., m]``.

    ``before``: the quotient by the RMS is taken of the streams, otherwise of the product.
    """
    flat = x.flatten(-2).float()
    rstd = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    if before:
        return F.linear(flat * rstd, fn.float())
    return F.linear(flat, fn.float()) * rstd


def sinkhorn(logits: Tensor, *, eps: float, iters: int) -> Tensor:
    """Nearly doubly stochastic ``[..., n, n]``: softmax of the rows, then columns and rows
    normalised in turn, columns first and last; ``iters`` times columns."""
    comb = logits.softmax(dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


def hyper_weights(
    mixes: Tensor, scale: Tensor, base: Tensor, *, eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """pre ``[..., n]``, post ``[..., n]``, comb ``[..., n, n]`` of fp32 mixes ``[..., n·(2 + n)]``.

    scale ``[3]`` and base ``[n·(2 + n)]`` widen to fp32; all results are fp32.
    """
    n = int((mixes.shape[-1] + 1) ** 0.5) - 1
    sizes = [n, n, n * n]
    (pre, post, comb), (b_pre, b_post, b_comb) = mixes.split(sizes, dim=-1), base.split(sizes)
    pre = torch.sigmoid(pre * scale[0] + b_pre) + eps
    post = 2 * torch.sigmoid(post * scale[1] + b_post)
    comb = (comb * scale[2] + b_comb).unflatten(-1, (n, n))
    return pre, post, sinkhorn(comb, eps=eps, iters=iters)


def hyper_collapse(x: Tensor, pre: Tensor) -> Tensor:
    """``Σ_i pre_i · x_i`` in fp32, rounded once: x ``[..., n, D]``, pre ``[..., n]``."""
    return (pre.unsqueeze(-1) * x).sum(dim=-2).to(x.dtype)


def hyper_expand(out: Tensor, x: Tensor, post: Tensor, comb: Tensor, *, rounding: str) -> Tensor:
    """New streams ``post_k · out + Σ_j comb[j, k] · x_j``: out ``[..., D]``, x ``[..., n, D]``.

    "once" computes in fp32; "every" rounds post, comb, the product, the sum over j and their sum.
    """
    if rounding == "every":
        post, comb = post.to(x.dtype), comb.to(x.dtype)
    else:
        x, post, comb = x.float(), post.float(), comb.float()
    mixed = torch.matmul(comb.transpose(-1, -2), x)
    return (post.unsqueeze(-1) * out.unsqueeze(-2) + mixed).to(out.dtype)


def router_scores(logits: Tensor, bias: Tensor | None, *, func: str, wide: bool) -> Tensor:
    """The scores of all experts, and with a bias what the choice among them is made by.

    logits ``[..., E]``, bias ``[E]``; ``wide`` computes in fp32. "sqrt_*" are spellings of
    ``sqrt(softplus(x))`` that differ in the last bits, where x is large and where it is small.
    """
    x = logits.float() if wide else logits
    if func == "sigmoid":
        scores = x.sigmoid()
    elif func == "softmax":
        scores = x.softmax(dim=-1)
    elif func == "sqrt_softplus":
        scores = F.softplus(x).sqrt()
    elif func == "sqrt_log1p_exp":
        scores = x.exp().log1p().sqrt()
    elif func == "sqrt_log_exp":
        scores = (1 + x.exp()).log().sqrt()
    else:  # "sqrt_stable"
        scores = (x.clamp_min(0.0) + (-x.abs()).exp().log1p()).sqrt()
    return scores if bias is None else scores + bias


def router_weights(
    w: Tensor, *, eps: float | None, scale: float | None, bounded: bool, sums: torch.dtype,
    out: torch.dtype, normalise: bool = True,
) -> Tensor:  # fmt: skip
    """``w / (w.sum(-1) + eps) * scale``, or for ``bounded`` over ``max(w.sum(-1), eps)``.

    w ``[..., K]``, the scores of the chosen; computed in ``sums``, cast to ``out`` at the end.
    """
    w = w.to(sums)
    if normalise:
        total = w.sum(dim=-1, keepdim=True)
        if eps is not None:
            total = total.clamp_min(eps) if bounded else total + eps
        w = w / total
    return (w if scale is None else w * scale).to(out)
