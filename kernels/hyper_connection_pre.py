"""Hyper-connections, in front of a sublayer: mixes of the streams → post, comb, collapsed input.

Math     ``flat = x / rms(x)`` over all ``4·D`` values of a token, ``z = (flat @ fnᵀ) · scale +
         base`` (scale[0] for the first 4 of the 24, scale[1] for the next 4, scale[2] for 16),
         ``pre = sigmoid(z[:4]) + eps``, ``post = 2 · sigmoid(z[4:8])``, ``comb`` = softmax of the
         rows of ``z[8:]`` as 4 × 4, plus eps, columns over (their sum + eps), then
         ``iters - 1`` times rows and columns in turn; ``y = Σ_i pre_i · x_i`` [→ RMSNorm of y].
Shapes   x ``[T,4,D]``, fn ``[24,4·D]``, scale ``[3]``, base ``[24]``, weight ``[D]`` or None;
         y and its norm ``[T,D]``, post ``[T,4]``, comb ``[T,4,4]``.
Dtypes   x, y one of bf16, fp16, fp32; fn, scale, base, weight any of these; post, comb fp32.
Strides  x and fn dense along their last axis; x's streams may be one (stride 0). Results dense.
Rounding everything is fp32 but y (and its norm), which rounds once at the end. The mixes are
         those of an fp32 product, whatever torch's setting for TF32; ``before`` says whether the
         module scales by 1/rms before the product or after, which only changes its rounding
         noise: the kernel scales after it. Column sums of comb are 1 to 3e-7.
         A norm reads the rounded y (``precise``: the fp32 one).
Source   DeepSeek-V4's inference/model.py (hc_pre, hc_split_sinkhorn).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from . import _hyper as hyper
from ._norms import out_dtype


def check(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iters: int) -> None:
    hyper.check(x, fn, scale, base, hyper.OUTPUTS)
    common.require(scale.shape[0] == 3, f"scale has {scale.shape[0]} elements, not 3")
    common.require(iters >= 1, "Sinkhorn needs at least one iteration")


def reference(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float,
    iters: int, before: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``hyper_connection_pre`` in plain PyTorch."""
    mixes = atoms.hyper_mixes(x, fn, eps=norm_eps, before=before)
    pre, post, comb = atoms.hyper_weights(mixes, scale, base, eps=eps, iters=iters)
    return atoms.hyper_collapse(x, pre), post, comb


def allocate(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, d = x.shape
    post = x.new_empty((tokens, n), dtype=torch.float32)
    return x.new_empty((tokens, d)), post, x.new_empty((tokens, n, n), dtype=torch.float32)


@torch.library.triton_op("dsv4fuse::hyper_connection_pre", mutates_args=())
def hyper_connection_pre(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float,
    iters: int, before: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, post, comb: see the module's docstring."""
    check(x, fn, scale, base, iters)
    kw = dict(norm_eps=norm_eps, eps=eps, iters=iters)
    if common.use_reference(x):
        return reference(x, fn, scale, base, **kw, before=before)
    y, post, comb = allocate(x)
    hyper.launch(x, fn, scale, base, **kw, norm=None, y=y, normed_y=None, post=post, comb=comb,
                 precise=False)  # fmt: skip
    return y, post, comb


@hyper_connection_pre.register_fake
def _(x, fn, scale, base, *, iters, **_):
    check(x, fn, scale, base, iters)
    return allocate(x)


@torch.library.triton_op("dsv4fuse::hyper_connection_pre_norm", mutates_args=())
def hyper_connection_pre_norm(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, weight: Tensor | None, *, norm_eps: float,
    eps: float, iters: int, y_eps: float, rounding: str, before: bool = True,
    precise: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """RMSNorm of y, post, comb: see the module's docstring."""
    check(x, fn, scale, base, iters)
    kw = dict(norm_eps=norm_eps, eps=eps, iters=iters)
    if common.use_reference(x):
        y, post, comb = reference(x, fn, scale, base, **kw, before=before)
        return atoms.rms_norm(y, weight, eps=y_eps, rounding=rounding), post, comb
    y, post, comb = allocate(x)
    y = y.new_empty(y.shape, dtype=out_dtype(x.dtype, weight, rounding))
    norm = hyper.Norm(weight, y_eps, rounding)
    hyper.launch(x, fn, scale, base, **kw, norm=norm, y=None, normed_y=y, post=post, comb=comb,
                 precise=precise)  # fmt: skip
    return y, post, comb


@hyper_connection_pre_norm.register_fake
def _(x, fn, scale, base, weight, *, iters, rounding, **_):
    check(x, fn, scale, base, iters)
    y, post, comb = allocate(x)
    return y.new_empty(y.shape, dtype=out_dtype(x.dtype, weight, rounding)), post, comb


def traffic(x: Tensor, fn: Tensor, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(x, fn, *outputs)
