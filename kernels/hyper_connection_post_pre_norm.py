"""Hyper-connections between two sublayers: new streams behind one, the input of the next.

Math     ``new_k = post_k · out + Σ_j comb[j, k] · x_j`` (``hyper_connection_post``), and of new
         ``rms_norm(Σ_i pre_i · new_i)``, post and comb of the next (``hyper_connection_pre``).
Shapes   out ``[T,D]``, x ``[T,4,D]``, post ``[T,4]``, comb ``[T,4,4]``, fn ``[24,4·D]``, scale
         ``[3]``, base ``[24]``, weight ``[D]`` or None; new ``[T,4,D]``, y ``[T,D]``, next post
         ``[T,4]`` and comb ``[T,4,4]``.
Dtypes   out, x and new one of bf16, fp16, fp32; y as PyTorch promotes; the rest any of these, next
         post and comb fp32.
Strides  those of the two ops. Results dense.
Rounding that of the two ops one after the other, whose launches these are: their bits.
Launches those of the two ops: it is one op for the graph's sake. A launch that wrote the new
         streams and, as it held them, their products with fn was slower throughout (NOTES.md).
Source   DeepSeek-V4's inference/model.py (hc_post, hc_pre).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from . import _hyper as hyper
from . import hyper_connection_post as behind
from . import hyper_connection_pre as ahead
from ._norms import out_dtype


def _check(
    out: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    rounding: str, iters: int,
) -> None:  # fmt: skip
    behind.check(out, x, post, comb, rounding)
    ahead.check(x, fn, scale, base, iters)
    common.require(out.dtype == x.dtype, "out and x differ in dtype")


def reference(
    out: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    weight: Tensor | None, *, rounding: str, norm_eps: float, eps: float, iters: int,
    y_eps: float, norm: str, before: bool = True, precise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``hyper_connection_post_pre_norm`` in plain PyTorch."""
    new = behind.reference(out, x, post, comb, rounding=rounding, precise=precise)
    y, *weights = ahead.reference(
        new, fn, scale, base, norm_eps=norm_eps, eps=eps, iters=iters, before=before
    )
    return (new, atoms.rms_norm(y, weight, eps=y_eps, rounding=norm), *weights)


@torch.library.triton_op("dsv4fuse::hyper_connection_post_pre_norm", mutates_args=())
def hyper_connection_post_pre_norm(
    out: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    weight: Tensor | None, *, rounding: str, norm_eps: float, eps: float, iters: int,
    y_eps: float, norm: str, before: bool = True, precise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """new, the norm of the next sublayer's input, its post and comb: see the module's docstring."""
    _check(out, x, post, comb, fn, scale, base, rounding, iters)
    kw = dict(norm_eps=norm_eps, eps=eps, iters=iters, precise=precise)
    if common.use_reference(x):
        return reference(out, x, post, comb, fn, scale, base, weight, rounding=rounding,
                         y_eps=y_eps, norm=norm, before=before, **kw)  # fmt: skip
    new = behind.launch(out, x, post, comb, rounding=rounding, precise=precise)
    y, post2, comb2 = allocate(x, weight, norm)
    hyper.launch(new, fn, scale, base, norm=hyper.Norm(weight, y_eps, norm), y=None, normed_y=y,
                 post=post2, comb=comb2, **kw)  # fmt: skip
    return new, y, post2, comb2


def allocate(x: Tensor, weight: Tensor | None, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    y, post, comb = ahead.allocate(x)
    return y.new_empty(y.shape, dtype=out_dtype(x.dtype, weight, norm)), post, comb


@hyper_connection_post_pre_norm.register_fake
def _(out, x, post, comb, fn, scale, base, weight, *, rounding, iters, norm, **_):
    _check(out, x, post, comb, fn, scale, base, rounding, iters)
    return out.new_empty(x.shape), *allocate(x, weight, norm)


def traffic(out: Tensor, x: Tensor, fn: Tensor, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(out, x, fn, *outputs)
