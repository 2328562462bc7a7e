"""Hyper-connections between two sublayers: new streams behind one, the input of the next.

Math     ``new_k = post_k · out + Σ_j comb[j, k] · x_j`` (``hyper_connection_post``), and of new
         ``rms_norm(Σ_i pre_i · new_i)``, post and comb of the next (``hyper_connection_pre``).
Shapes   out ``[T,D]``, x ``[T,4,D]``, post ``[T,4]``, comb ``[T,4,4]``, fn ``[24,4·D]``, scale
         ``[3]``, base ``[24]``, weight ``[D]`` or None; new ``[T,4,D]``, y ``[T,D]``, next post
         ``[T,4]`` and comb ``[T,4,4]``.
Dtypes   out, x and new one of bf16, fp16, fp32; y as PyTorch promotes; the rest any of these, next
         post and comb fp32.
Strides  those of the two ops. Results dense.
Rounding that of the two ops one after the other: the mixes are those of the streams as they are
         stored, in the same pieces of K and the same order. The same bits as theirs, and of a row
         in any batch, in the interpreter; on a GPU not yet compared.
Launches two: the first writes the new streams and, as it holds them, their products with fn; a
         token's 24 mixes need all of its columns, so that the second adds the pieces and reads the
         streams once more for their weighted sum. The two ops by themselves read them twice.
Source   DeepSeek-V4's inference/model.py (hc_post, hc_pre).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from dsv4fuse import atoms

from . import _common as common
from . import _hyper as hyper
from . import hyper_connection_post as behind
from . import hyper_connection_pre as ahead
from ._common import INTERPRET, narrow, round_few
from ._hyper_mixes import product, sum_of_squares
from ._launch import wrap_triton
from ._norms import out_dtype
from .hyper_connection_post import joined

WHOLE = 4096  # from so many tokens on, a program adds a group of pieces and all SMs have one


@triton.jit
def _weight(at, EVERY: tl.constexpr, XD: tl.constexpr):
    """A factor of each token, ``[TOKENS, 1]``."""
    factor = tl.load(at).to(tl.float32)
    if EVERY:
        factor = round_few(factor, XD)
    return factor[:, None]


@triton.jit
def _where_it_lies(x):
    """x itself, through a sum over an axis of one. The compiler would give each load that x is made
    of the layout that a product reads x in; it does not look through a sum."""
    if INTERPRET:
        return x
    else:
        return tl.sum(tl.reshape(x, (x.shape[0], 1, x.shape[1])), axis=1)


@triton.jit
def _stream(out_at, x_at, x_sh, post_at, comb_at, comb_sj, EVERY: tl.constexpr,
            EXACT: tl.constexpr, XD: tl.constexpr):  # fmt: skip
    """A new stream: one old one at a time, since all of them do not fit into registers."""
    mixed = _weight(comb_at, EVERY, XD) * tl.load(x_at).to(tl.float32)
    for j in tl.static_range(1, 4):
        x = tl.load(x_at + j * x_sh).to(tl.float32)
        mixed += _weight(comb_at + j * comb_sj, EVERY, XD) * x
    out = tl.load(out_at).to(tl.float32)
    new = joined(_weight(post_at, EVERY, XD), out, mixed, EVERY, EXACT, XD)
    return _where_it_lies(narrow(new, XD))


@triton.jit
def _partial(part_ptr, part, tokens, token, live, total, N: tl.constexpr):
    """The sums of one part."""
    at = part_ptr + (part.to(tl.int64) * tokens + token)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(at, total, mask=live[:, None])


@triton.jit(do_not_specialize=("tokens",))
def post_mixes_kernel(
    out_ptr, x_ptr, post_ptr, comb_ptr, new_ptr, fn_ptr, part_ptr, tokens, o_st, x_st, x_sh,
    post_st, post_sk, comb_st, comb_sj, comb_sk, fn_so,
    D: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
    CHUNKS: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, READY: tl.constexpr,
    EVERY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens × CHUNKS neighbouring steps of D, in all four streams.

    Each new stream reads the four old ones again: three times out of four they are in L1.
    """
    pid = tl.program_id(0)
    part = pid % PARTS
    token = (pid // PARTS) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    t = tl.minimum(token, tokens - 1).to(tl.int64)  # rows behind the last are not stored
    lane = tl.arange(0, STEP)
    o = tl.arange(0, N)
    has = (o < OUT)[None, :]
    XD: tl.constexpr = x_ptr.dtype.element_ty
    post_at, comb_at = post_ptr + t * post_st, comb_ptr + t * comb_st
    columns = fn_ptr + o[None, :] * fn_so + lane[:, None]
    row = t[:, None]
    t0 = tl.zeros((TOKENS, N), tl.float32)  # column OUT: the sums of squares
    t1, t2, t3 = t0, t0, t0
    for c in range(CHUNKS):
        first = tl.multiple_of((part * CHUNKS + c) * STEP, STEP)
        col = (first + lane)[None, :]
        out_at, x_at = out_ptr + row * o_st + col, x_ptr + row * x_st + col
        for k in range(4):
            y = _stream(out_at, x_at, x_sh, post_at + k * post_sk, comb_at + k * comb_sk, comb_sj,
                        EVERY, EXACT, XD)  # fmt: skip
            tl.store(new_ptr + (row * 4 + k) * D + col, y, mask=live[:, None])
            sums = product(y, columns + k * D + first, OUT * fn_so, has, READY)
            sums = tl.where((o == OUT)[None, :], sum_of_squares(y)[:, None], sums)
            # Not by handing the four round in a ring: Triton 3.6 and 3.7 make zeros of that.
            t0 = tl.where(k == 0, t0 + sums, t0)
            t1 = tl.where(k == 1, t1 + sums, t1)
            t2 = tl.where(k == 2, t2 + sums, t2)
            t3 = tl.where(k == 3, t3 + sums, t3)
    _partial(part_ptr, part, tokens, token, live, t0, N)
    _partial(part_ptr, part + PARTS, tokens, token, live, t1, N)
    _partial(part_ptr, part + 2 * PARTS, tokens, token, live, t2, N)
    _partial(part_ptr, part + 3 * PARTS, tokens, token, live, t3, N)


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


def _sums(
    out: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, new: Tensor, every: bool,
    exact: bool,
) -> hyper.Sums:  # fmt: skip
    """Fill new; its product with fn, in the pieces that ``hyper_connection_pre`` makes."""
    tokens, streams, d = x.shape
    whole = common.size_hint(tokens) > WHOLE
    ready = whole and x.dtype == hyper.BF16
    c, n = hyper.cut(d), triton.next_power_of_2(fn.shape[0] + 1)
    chunks = c.chunks if whole else 1
    parts = d // (c.step * chunks)  # of each stream
    partial = x.new_empty((streams * parts, tokens, n), dtype=hyper.F32)
    factor = hyper.thirds_of(fn) if ready else fn
    wrap_triton(post_mixes_kernel)[(parts * common.cdiv(tokens, hyper.TOKENS),)](
        out, x, post, comb, new, factor, partial, tokens, out.stride(0), *x.stride()[:2],
        *post.stride(), *comb.stride(), factor.stride(-2),
        D=d, OUT=fn.shape[0], N=n, STEP=c.step, CHUNKS=chunks, PARTS=parts, TOKENS=hyper.TOKENS,
        READY=ready, EVERY=every, EXACT=exact, num_warps=8, num_stages=1,
    )  # fmt: skip
    return hyper.Sums(partial, whole)


@triton_op("dsv4fuse::hyper_connection_post_pre_norm", mutates_args=())
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
    common.require_static(streams=x.shape[1], hidden=x.shape[2])
    new, y, post2, comb2 = allocate(out, x, weight, norm)
    every = rounding == "every" and not precise
    sums = _sums(out, x, post, comb, fn, new, every, not precise)
    hyper.launch(new, fn, scale, base, norm=hyper.Norm(weight, y_eps, norm), y=None, normed_y=y,
                 post=post2, comb=comb2, sums=sums, **kw)  # fmt: skip
    return new, y, post2, comb2


def allocate(
    out: Tensor, x: Tensor, weight: Tensor | None, norm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, post, comb = ahead.allocate(x)
    y = y.new_empty(y.shape, dtype=out_dtype(x.dtype, weight, norm))
    return out.new_empty(x.shape), y, post, comb


@hyper_connection_post_pre_norm.register_fake
def _(out, x, post, comb, fn, scale, base, weight, *, rounding, iters, norm, **_):
    _check(out, x, post, comb, fn, scale, base, rounding, iters)
    return allocate(out, x, weight, norm)


def traffic(out: Tensor, x: Tensor, fn: Tensor, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(out, x, fn, *outputs)
