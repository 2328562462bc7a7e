"""Hyper-connections, at the end of a model: the streams collapsed into one.

Math     ``flat = x / rms(x)`` over all ``4·D`` values of a token, ``pre = sigmoid((flat @ fnᵀ) ·
         scale + base) + eps``, ``y = Σ_i pre_i · x_i``.
Shapes   x ``[T,4,D]``, fn ``[4,4·D]``, scale ``[1]``, base ``[4]``; y ``[T,D]``.
Dtypes, strides and rounding as in ``hyper_connection_pre``.
Source   DeepSeek-V4's inference/model.py (hc_head).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from . import _hyper as hyper


def _check(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> None:
    hyper.check(x, fn, scale, base, hyper.STREAMS)
    common.require(scale.shape[0] == 1, f"scale has {scale.shape[0]} elements, not 1")


def reference(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float,
    before: bool,
) -> Tensor:  # fmt: skip
    """``hyper_head`` in plain PyTorch."""
    mixes = atoms.hyper_mixes(x, fn, eps=norm_eps, before=before)
    return atoms.hyper_collapse(x, torch.sigmoid(mixes * scale + base) + eps)


@torch.library.triton_op("dsv4fuse::hyper_head", mutates_args=())
def hyper_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float,
    before: bool = True,
) -> Tensor:  # fmt: skip
    """y: see the module's docstring."""
    _check(x, fn, scale, base)
    if common.use_reference(x):
        return reference(x, fn, scale, base, norm_eps=norm_eps, eps=eps, before=before)
    y = x.new_empty((x.shape[0], x.shape[2]))
    hyper.launch(x, fn, scale, base, norm_eps=norm_eps, eps=eps, iters=1, norm=None, y=y,
                 normed_y=None, post=None, comb=None, precise=False)  # fmt: skip
    return y


@hyper_head.register_fake
def _(x, fn, scale, base, **_):
    _check(x, fn, scale, base)
    return x.new_empty((x.shape[0], x.shape[2]))


def traffic(x: Tensor, fn: Tensor, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(x, fn, *outputs)
