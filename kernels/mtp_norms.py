"""The two RMSNorms in front of a multi-token-prediction layer, in one launch.

Math     ``e_out = rms_norm(e', e_weight)``, e' the embedding e, or 0 where its position hides it;
         ``h_out = rms_norm(h, h_weight)`` of each stream by itself.
Shapes   e and e_out ``[T,D]``, positions ``[T]`` or None, h and h_out ``[T,N,D]``, weights ``[D]``
         or None; D up to 8192, N any fixed number.
Dtypes   e and h bf16, fp16 or fp32; weights any of these; positions int32 or int64; e_out and
         h_out as PyTorch promotes.
Strides  rows any (0 included), the last axes and the weights dense. Outputs are dense.
Hidden   "eq": position 0, the first token of a sequence, has no token in front of it; "le": and
         negative ones, as of padding. A hidden row comes out as zeros, of the weight's signs.
Rounding e_norm and h_norm: a ``rounding`` of ``atoms.rms_norm``. ``precise``: fp32 from the load to
         the store. A row's bits depend on D alone, not on the batch.
NaN      spoils its row; in a hidden row of e it is not seen.
Source   vLLM's input norms of DeepSeek's MTP layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from ._common import narrow
from ._launch import wrap_triton
from ._norms import out_dtype, reciprocal_rms, scaled, squares
from ._stores import stores

MAX_WIDTH = 8192
HIDDEN = {"none": 0, "eq": 1, "le": 2}


@triton.jit
def _row(x_ptr, w_ptr, out_ptr, at, to, hidden, D: tl.constexpr, BLOCK: tl.constexpr,
         NORM: tl.constexpr, EPS: tl.constexpr, HAS_W: tl.constexpr, PRECISE: tl.constexpr):
    """The norm of the row at ``at``, or of zeros, to ``to``."""
    XD: tl.constexpr = x_ptr.dtype.element_ty
    OD: tl.constexpr = out_ptr.dtype.element_ty
    col = tl.arange(0, BLOCK)
    inside = col < D
    x = tl.load(x_ptr + at + col, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=inside, other=0.0) if HAS_W else 0.0
    row = tl.reshape(tl.where(hidden, 0.0, x), (1, BLOCK))
    total = tl.sum(squares(row, NORM, PRECISE, XD), axis=1)
    rstd = reciprocal_rms(total, D, NORM, EPS, PRECISE, XD)
    row = scaled(row, rstd, w, HAS_W, NORM, PRECISE, XD, OD)
    tl.store(out_ptr + to + col, narrow(tl.reshape(row, (BLOCK,)), OD), mask=inside)


@stores("e_out_ptr", "h_out_ptr")
@triton.jit
def mtp_norms_kernel(
    e_ptr, e_w_ptr, e_out_ptr, at_ptr, h_ptr, h_w_ptr, h_out_ptr, e_st, at_st, h_st, h_sn,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HIDDEN: tl.constexpr,
    E_NORM: tl.constexpr, E_EPS: tl.constexpr, E_W: tl.constexpr,
    H_NORM: tl.constexpr, H_EPS: tl.constexpr, H_W: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One program: a token's embedding, or one of its N streams."""
    pid = tl.program_id(0)
    token = (pid // (N + 1)).to(tl.int64)
    stream = pid % (N + 1)
    if stream == N:
        hidden = token < 0
        if HIDDEN == 1:
            hidden = tl.load(at_ptr + token * at_st) == 0
        if HIDDEN == 2:
            hidden = tl.load(at_ptr + token * at_st) <= 0
        _row(e_ptr, e_w_ptr, e_out_ptr, token * e_st, token * D, hidden, D, BLOCK, E_NORM, E_EPS,
             E_W, PRECISE)
    else:
        _row(h_ptr, h_w_ptr, h_out_ptr, token * h_st + stream * h_sn, (token * N + stream) * D,
             token < 0, D, BLOCK, H_NORM, H_EPS, H_W, PRECISE)


def _check(
    e: Tensor, e_weight: Tensor | None, positions: Tensor | None, h: Tensor,
    h_weight: Tensor | None, hidden: str,
) -> None:  # fmt: skip
    common.require(e.dim() == 2 and h.dim() == 3, "e must be [T,D] and h [T,N,D]")
    common.require(e.shape[1] == h.shape[2], "e and h differ in width")
    common.require(0 < e.shape[1] <= MAX_WIDTH, f"a row is wider than {MAX_WIDTH}")
    for t, w in ((e, e_weight), (h, h_weight)):
        common.require(t.dtype in common.FLOATS, f"{t.dtype} is none of bf16, fp16, fp32")
        common.require(t.stride(-1) == 1 or t.shape[-1] == 1, "the last axes must be dense")
        if w is not None:
            common.require(w.shape == t.shape[-1:], "weights must be [D]")
            common.require(w.dtype in common.FLOATS, "weights must be bf16, fp16 or fp32")
            common.require(w.stride(0) == 1 or w.shape[0] == 1, "weights must be dense")
    common.require(hidden in HIDDEN, f"hidden is one of {', '.join(HIDDEN)}")
    common.require((positions is None) == (hidden == "none"), "hidden goes with positions")
    if positions is not None:
        common.require(positions.dim() == 1, "positions must be [T]")
        integers = (torch.int32, torch.int64)
        common.require(positions.dtype in integers, "positions must be int32 or int64")


def allocate(
    e: Tensor, e_weight: Tensor | None, e_norm: str, h: Tensor, h_weight: Tensor | None,
    h_norm: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        e.new_empty(e.shape, dtype=out_dtype(e.dtype, e_weight, e_norm)),
        h.new_empty(h.shape, dtype=out_dtype(h.dtype, h_weight, h_norm)),
    )


def _normed(x: Tensor, weight: Tensor | None, eps: float, norm: str, precise: bool) -> Tensor:
    kind = out_dtype(x.dtype, weight, norm)
    if precise:
        x, weight, norm = x.float(), None if weight is None else weight.float(), "once"
    return atoms.rms_norm(x, weight, eps=eps, rounding=norm).to(kind).contiguous()


def reference(
    e: Tensor, e_weight: Tensor | None, positions: Tensor | None, h: Tensor,
    h_weight: Tensor | None, *, e_eps: float, e_norm: str, h_eps: float, h_norm: str,
    hidden: str = "none", precise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``mtp_norms`` in plain PyTorch."""
    if positions is not None:
        gone = positions == 0 if hidden == "eq" else positions <= 0
        e = e.masked_fill(gone.unsqueeze(-1), 0.0)
    return (
        _normed(e, e_weight, e_eps, e_norm, precise), _normed(h, h_weight, h_eps, h_norm, precise)
    )  # fmt: skip


@torch.library.triton_op("dsv4fuse::mtp_norms", mutates_args=())
def mtp_norms(
    e: Tensor, e_weight: Tensor | None, positions: Tensor | None, h: Tensor,
    h_weight: Tensor | None, *, e_eps: float, e_norm: str, h_eps: float, h_norm: str,
    hidden: str = "none", precise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(e_out, h_out): see the module's docstring."""
    _check(e, e_weight, positions, h, h_weight, hidden)
    if common.use_reference(e):
        return reference(e, e_weight, positions, h, h_weight, e_eps=e_eps, e_norm=e_norm,
                         h_eps=h_eps, h_norm=h_norm, hidden=hidden, precise=precise)  # fmt: skip
    tokens, n, d = h.shape
    common.require_static(streams=n, hidden_size=d)
    e_out, h_out = allocate(e, e_weight, e_norm, h, h_weight, h_norm)
    block = triton.next_power_of_2(d)
    wrap_triton(mtp_norms_kernel)[(tokens * (n + 1),)](
        e, e if e_weight is None else e_weight, e_out, e if positions is None else positions,
        h, h if h_weight is None else h_weight, h_out, common.strides(e)[0],
        0 if positions is None else common.strides(positions)[0], *common.strides(h)[:2],
        N=n, D=d, BLOCK=block, HIDDEN=HIDDEN[hidden], E_NORM=common.NORMS[e_norm], E_EPS=e_eps,
        E_W=e_weight is not None, H_NORM=common.NORMS[h_norm], H_EPS=h_eps,
        H_W=h_weight is not None, PRECISE=precise, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return e_out, h_out


@mtp_norms.register_fake
def _(e, e_weight, positions, h, h_weight, *, e_norm, h_norm, hidden="none", **_):
    _check(e, e_weight, positions, h, h_weight, hidden)
    return allocate(e, e_weight, e_norm, h, h_weight, h_norm)


def traffic(e: Tensor, h: Tensor, *outputs: Tensor) -> int:
    """Bytes that must move: every input once, every output once."""
    return common.nbytes(e, h, *outputs)
