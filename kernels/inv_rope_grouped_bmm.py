"""Inverse rope of the attention output [→ fp8 quant] → grouped output projection.

Math     ``y = rope(o, cos, sin, inverse)`` on the trailing R elements of each head; the H heads
         fall into G groups of H/G neighbours, whose K = H/G · D elements are one row:
         ``out[t, g, n] = Σ_k y[t, g, k] · w[g, n, k]``.
Shapes   o ``[B,S,H,D]``, cos and sin ``[B,S,R/2]``, w ``[G,N,K]``, w_scale
         ``[G, N/SN, K/SK]``; T = B·S, out ``[T,G,N]``. D a multiple of 16.
Dtypes   o bf16 or fp16; w of the same dtype, or e4m3 with fp32 block scales (used as they are
         on disk, never rounded again); out in out_dtype (None: o's).
Strides  of o, cos, sin, w any, o's last 1; out is dense (token_major) or a view of a dense
         ``[G,T,N]``, as a bmm leaves it.
Rounding y is rounded to o.dtype, and rope_rounding as ``atoms.rope``. e4m3 weights: ``w·scale``
         rounded to o.dtype as a module that dequantises does, or for ``scaled`` the fp32 scale
         on each block's exact product. Sums are fp32, in an order of the kernel's own.
Strategy "prologue": one kernel, heads turned while they are multiplied. "tail": the rope lanes
         turned into a buffer of R/D of the bytes, then one kernel that reads both. "copy": the
         whole of o turned into a new tensor, then cuBLAS. The op with a trailing underscore
         turns o itself, for an o that nothing else reads, then cuBLAS.
         inv_rope_grouped_fp8 quantises y in blocks as ``inv_rope_quant`` does (its scale rows
         are padded to 4 tokens) and multiplies codes: "batched" in one kernel, "groups" by
         torch's block-scaled product for each group.
Source   ATOM #676, #677 (measure and choose, scales without a second rounding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from . import inv_rope_quant as rope
from ._common import named_strides
from ._grouped import grouped_kernel, tail_kernel
from ._grouped_fp8 import inv_rope_grouped_fp8  # noqa: F401  (registers it beside these)
from ._launch import wrap_triton
from ._projection import (
    TILES,
    allocate,
    check,
    columns_of,
    output,
    power_of_two,
    product,
    weights,
)

TAIL_ROWS = 16  # heads per program of the kernel that turns rope lanes alone
STRATEGIES = ("prologue", "tail", "copy")


def _table(o: Tensor, cos: Tensor, sin: Tensor, rope_rounding: str, precise: bool) -> dict:
    common.require_static(heads=o.shape[2], head_dim=o.shape[3], rope_dim=cos.shape[-1])
    every = rope_rounding == "every" and not precise and cos.dtype == o.dtype
    return dict(cos_ptr=cos, sin_ptr=sin, **named_strides(cos, "cos", "bsd"),
                **named_strides(sin, "sin", "bsd"), length=o.shape[1],
                tokens=o.shape[0] * o.shape[1], FLAT=common.flat_mode(*o.shape[:2]),
                EVERY=every, PRECISE=precise)  # fmt: skip


def _turn_tail(o: Tensor, out: Tensor | None, table: dict) -> None:
    batch, length, heads, d = o.shape
    half = table["cos_ptr"].shape[-1]
    common.require(half & (half - 1) == 0, f"rope_dim {2 * half} is no power of two")
    # Inductor would realise o once more for each argument that it is, hence cos for nothing.
    to, place = (table["cos_ptr"], o) if out is None else (out, out)
    wrap_triton(tail_kernel)[(common.cdiv(batch * length * heads, TAIL_ROWS),)](
        o_ptr=o, out_ptr=to, **named_strides(o, "o", "bsh"), **named_strides(place, "r", "bsh"),
        **table,
        NOPE=d - 2 * half, HALF=half, HEADS=heads, ROWS=TAIL_ROWS, IN_PLACE=out is None,
        num_warps=1,
    )  # fmt: skip


def _launch(
    o: Tensor, w: Tensor, w_scale: Tensor | None, out: Tensor, table: dict, scaled: bool,
    with_tail: bool,
) -> None:  # fmt: skip
    batch, length, heads, d = o.shape
    groups, n, k = w.shape
    half = table["cos_ptr"].shape[-1]
    tile = common.launch_config(TILES["wide" if w_scale is None else "e4m3"], batch * length)
    lanes = power_of_two(d, tile.lanes)
    sn, sk = (n, k) if w_scale is None else (n // w_scale.shape[1], k // w_scale.shape[2])
    lanes = lanes if w_scale is None else min(lanes, sk)
    tail = None
    if with_tail:
        lanes = power_of_two(2 * half, power_of_two(d - 2 * half, lanes))
        common.require(lanes >= 16, "the rope lanes do not begin at a multiple of 16")
        tail = o.new_empty((batch, length, heads, 2 * half))
        _turn_tail(o, tail, table)
    single = tile.single and not with_tail and lanes >= 2 * half
    columns = columns_of(tile, groups, batch * length, n)
    grid = (groups * common.cdiv(batch * length, tile.rows) * common.cdiv(n, columns),)
    r, ws = (o if tail is None else tail), (w if w_scale is None else w_scale)
    nothing = table["cos_ptr"]
    wrap_triton(grouped_kernel)[grid](
        o_ptr=o, tail_ptr=nothing if tail is None else tail, w_ptr=w,
        ws_ptr=nothing if w_scale is None else w_scale, out_ptr=out,
        **named_strides(o, "o", "bsh"), **named_strides(r, "r", "bsh"),
        **named_strides(w, "w", "gnk"), **named_strides(ws, "ws", "gnk"),
        **named_strides(out, "out", "tg"), **table,
        D=d, NOPE=d - 2 * half, PER=heads // groups, N=n, SN=sn, SK=sk,
        WEIGHT=0 if w_scale is None else 2 if scaled else 1, TAIL=with_tail,
        SINGLE=single, BM=tile.rows, BN=columns, BK=lanes, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def reference(
    o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, w_scale: Tensor | None = None, *,
    rope_rounding: str, precise: bool = False, scaled: bool = False,
    out_dtype: torch.dtype | None = None, token_major: bool = True,
) -> Tensor:  # fmt: skip
    """``inv_rope_grouped_bmm`` in plain PyTorch."""
    y = atoms.rope(o.float() if precise else o, cos.unsqueeze(2), sin.unsqueeze(2), inverse=True,
                   rounding="once" if precise else rope_rounding).to(o.dtype)  # fmt: skip
    if w_scale is not None:
        w = weights(w, w_scale, torch.float32 if scaled else o.dtype)
    if scaled or out_dtype not in (None, o.dtype):
        y, w = y.float(), w.float()
    return product(y, w, token_major).to(output(o, out_dtype))


@torch.library.triton_op("dsv4fuse::inv_rope_grouped_bmm", mutates_args=())
def inv_rope_grouped_bmm(
    o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, w_scale: Tensor | None = None, *,
    rope_rounding: str, precise: bool = False, scaled: bool = False,
    out_dtype: torch.dtype | None = None, token_major: bool = True, strategy: str = "prologue",
) -> Tensor:  # fmt: skip
    """Inverse rope and grouped projection: see the module's docstring."""
    check(o, cos, sin, w, w_scale)
    common.require(strategy in STRATEGIES, f"no strategy {strategy!r} here")
    if common.use_reference(o):
        return reference(o, cos, sin, w, w_scale, rope_rounding=rope_rounding, precise=precise,
                         scaled=scaled, out_dtype=out_dtype, token_major=token_major)
    if strategy == "copy":
        same = w_scale is None and output(o, out_dtype) == o.dtype
        common.require(same, "cuBLAS takes and gives one dtype here")
        y = rope.inv_rope(o, cos, sin, rope_rounding=rope_rounding, precise=precise)
        return product(y, w, token_major)
    out = allocate(o, w, out_dtype, token_major)
    table = _table(o, cos, sin, rope_rounding, precise)
    _launch(o, w, w_scale, out, table, scaled, strategy == "tail")
    return out


@inv_rope_grouped_bmm.register_fake
def _(o, cos, sin, w, w_scale=None, *, out_dtype=None, token_major=True, **_):
    check(o, cos, sin, w, w_scale)
    return allocate(o, w, out_dtype, token_major)


@torch.library.triton_op("dsv4fuse::inv_rope_grouped_bmm_", mutates_args=("o",))
def inv_rope_grouped_bmm_(
    o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, *, rope_rounding: str, precise: bool = False,
    token_major: bool = True,
) -> Tensor:  # fmt: skip
    """The same by cuBLAS, o turned in place: for an o that nothing reads afterwards."""
    check(o, cos, sin, w, None)
    if common.use_reference(o):
        y = rope.reference(o, cos, sin, rope_rounding=rope_rounding, precise=precise)
        o.copy_(y)
    else:
        _turn_tail(o, None, _table(o, cos, sin, rope_rounding, precise))
    return product(o, w, token_major)


@inv_rope_grouped_bmm_.register_fake
def _(o, cos, sin, w, *, token_major=True, **_):
    check(o, cos, sin, w, None)
    return allocate(o, w, None, token_major)


def traffic(o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, w_scale: Tensor | None,
            out: Tensor) -> int:  # fmt: skip
    """Bytes that must move: every input once, the result once."""
    return common.nbytes(o, cos, sin, w, w_scale, out)
