"""Hyper-connections, behind a sublayer: its output spread over the streams, the streams mixed.

Math     ``new_k = post_k · out + Σ_j comb[j, k] · x_j`` for the 4 streams of a token.
Shapes   out ``[T,D]``, x ``[T,4,D]``, post ``[T,4]``, comb ``[T,4,4]``; result ``[T,4,D]``.
Dtypes   out and x one of bf16, fp16, fp32; post, comb and the result any of these.
Strides  out and x dense along their last axis; x's streams may be one (stride 0); post and comb
         any. The result is dense.
Rounding "once": fp32 to the one rounding at the end. "every": post, comb, the product with out,
         the sum over j (fp32 inside, as in a matrix product) and their sum each round to x's
         dtype, as ``transformers`` does. ``precise``: "once" for either.
Source   DeepSeek-V4's inference/model.py (hc_post).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from ._common import Config, mul_rn, narrow, round_few, round_to
from ._hyper import STREAMS
from ._launch import wrap_triton
from ._stores import stores

CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (64, Config(rows=1, warps=4, columns=512)),
    (512, Config(rows=1, warps=2, columns=512)),
    (None, Config(rows=1, warps=4, columns=512)),
)


@triton.jit
def new_stream(out, x0, x1, x2, x3, post_at, comb_at, post_sk, comb_sj, comb_sk, k: tl.constexpr,
               EVERY: tl.constexpr, EXACT: tl.constexpr, XD: tl.constexpr):  # fmt: skip
    """Stream k of fp32 values ``[COLUMNS]``."""
    p = tl.load(post_at + k * post_sk).to(tl.float32)
    c0 = tl.load(comb_at + k * comb_sk).to(tl.float32)
    c1 = tl.load(comb_at + comb_sj + k * comb_sk).to(tl.float32)
    c2 = tl.load(comb_at + 2 * comb_sj + k * comb_sk).to(tl.float32)
    c3 = tl.load(comb_at + 3 * comb_sj + k * comb_sk).to(tl.float32)
    if EVERY:
        p, c0, c1 = round_few(p, XD), round_few(c0, XD), round_few(c1, XD)
        c2, c3 = round_few(c2, XD), round_few(c3, XD)
    mixed = c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
    if EVERY:
        return round_to(p * out, XD) + round_to(mixed, XD)
    elif EXACT:
        return mul_rn(tl.broadcast_to(p, out.shape), out) + mixed
    else:
        return p * out + mixed


@stores("new_ptr")
@triton.jit(do_not_specialize=("tokens",))
def post_kernel(
    out_ptr, x_ptr, post_ptr, comb_ptr, new_ptr, tokens, o_st, x_st, x_sh, post_st, post_sk,
    comb_st, comb_sj, comb_sk,
    D: tl.constexpr, COLUMNS: tl.constexpr, EVERY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS of the four streams of one token."""
    SPLIT: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    token = (pid // SPLIT).to(tl.int64)
    col = (pid % SPLIT) * COLUMNS + tl.arange(0, COLUMNS)
    inside = col < D
    row = x_ptr + token * x_st + col
    XD: tl.constexpr = x_ptr.dtype.element_ty
    kind: tl.constexpr = new_ptr.dtype.element_ty
    out = tl.load(out_ptr + token * o_st + col, mask=inside, other=0.0).to(tl.float32)
    x0 = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(row + x_sh, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(row + 2 * x_sh, mask=inside, other=0.0).to(tl.float32)
    x3 = tl.load(row + 3 * x_sh, mask=inside, other=0.0).to(tl.float32)
    post_at, comb_at = post_ptr + token * post_st, comb_ptr + token * comb_st
    to = new_ptr + token * 4 * D + col
    for k in tl.static_range(4):
        y = new_stream(out, x0, x1, x2, x3, post_at, comb_at, post_sk, comb_sj, comb_sk, k,
                       EVERY, EXACT, XD)  # fmt: skip
        tl.store(to + k * D, narrow(y, kind), mask=inside)


def check(out: Tensor, x: Tensor, post: Tensor, comb: Tensor, rounding: str) -> None:
    common.require(x.dim() == 3 and x.shape[1] == STREAMS, "the kernel is written for 4 streams")
    common.require(x.shape[2] % 2 == 0, "the hidden size must be even")
    common.require(tuple(out.shape[1:]) == (x.shape[2],), "out has another width than x")
    common.require(tuple(post.shape[1:]) == (STREAMS,), "post is no [T,4]")
    common.require(tuple(comb.shape[1:]) == (STREAMS, STREAMS), "comb is no [T,4,4]")
    common.require(x.stride(-1) == out.stride(-1) == 1, "the last axis of out and x must be dense")
    common.require(rounding in ("once", "every"), f"no rounding {rounding!r}")
    for t in (out, x, post, comb):
        common.require(t.dtype in common.FLOATS, f"{t.dtype} is none of bf16, fp16, fp32")
    common.require(rounding == "once" or out.dtype == x.dtype, "out and x differ in dtype")


def reference(
    out: Tensor, x: Tensor, post: Tensor, comb: Tensor, *, rounding: str, precise: bool = False
) -> Tensor:
    """``hyper_connection_post`` in plain PyTorch."""
    kind = out.dtype
    out = out.float() if precise else out
    rounding = "once" if precise else rounding
    return atoms.hyper_expand(out, x, post, comb, rounding=rounding).to(kind).contiguous()


@torch.library.triton_op("dsv4fuse::hyper_connection_post", mutates_args=())
def hyper_connection_post(
    out: Tensor, x: Tensor, post: Tensor, comb: Tensor, *, rounding: str, precise: bool = False
) -> Tensor:
    """The new streams, ``[T,4,D]`` in out's dtype: see the module's docstring."""
    check(out, x, post, comb, rounding)
    if common.use_reference(x):
        return reference(out, x, post, comb, rounding=rounding, precise=precise)
    return launch(out, x, post, comb, rounding=rounding, precise=precise)


def launch(
    out: Tensor, x: Tensor, post: Tensor, comb: Tensor, *, rounding: str, precise: bool
) -> Tensor:
    tokens, n, d = x.shape
    common.require_static(streams=n, hidden=d)
    new = out.new_empty((tokens, n, d))
    config = common.launch_config(CONFIGS, tokens)
    columns = max(64, min(config.columns, triton.next_power_of_2(d)))
    wrap_triton(post_kernel)[(tokens * common.cdiv(d, columns),)](
        out, x, post, comb, new, tokens, common.strides(out)[0], *common.strides(x)[:2],
        *common.strides(post), *common.strides(comb), D=d, COLUMNS=columns,
        EVERY=rounding == "every" and not precise, EXACT=not precise,
        num_warps=min(config.warps, columns // 64),
    )  # fmt: skip
    return new


@hyper_connection_post.register_fake
def _(out, x, post, comb, *, rounding, **_):
    check(out, x, post, comb, rounding)
    return out.new_empty(x.shape)


def traffic(out: Tensor, x: Tensor, post: Tensor, comb: Tensor, new: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(out, x, post, comb, new)
