"""RMSNorm → rope [→ fp8 fake-quant → cache write], for q and kv in one launch.

Math, per row x of D elements (a head of q, or a token of kv), R = 2 * cos.shape[-1]:
``y = rope(rms_norm(x, weight, eps), cos, sin)`` with rope on the trailing R elements as
interleaved pairs, as ``dsv4fuse.atoms`` defines both. For kv then optionally
``y[:D-R] = fake_quant(y[:D-R])`` and ``cache[seq, slot] = y``.

Shapes   q ``[B,S,H,D]``, kv ``[B,S,D]`` (one may be None), cos and sin ``[B,S,R/2]``; D a
         multiple of 16 up to 1024; cache ``[N,D]`` or ``[P,N,D]``; slot, seq ``[B,S]``.
Dtypes   q, kv bf16, fp16 or fp32; cos and sin fp32 or a 16-bit float; weights any of these;
         the cache has kv_out's dtype; slot and seq int32 or int64.
Strides  any, 0 included; q, kv and cache have last stride 1, cos and sin need not (the real
         view of complex frequencies has 2). Offsets are 64-bit.
Output   x.dtype, or the promotion with the weight where PyTorch multiplies after rounding
         ("rstd", "weight", "every"). q_out ``[B,S,H,D]``, dense in that order or, for
         q_heads_first, as ``[B,H,S,D]``. kv_out ``[B,S,D]`` dense.
Rounding q_norm, kv_norm: "none" or a ``rounding`` of ``atoms.rms_norm``; the normed value is
         rounded before rope; rope_rounding as ``atoms.rope``. ``precise``: fp32 from the load
         to the one store, whatever those names say. Fake-quant reads the rounded value.
Slots    row (b, s) goes to ``cache[seq[b,s], slot[b,s]]``, by default seq_start + b and
         slot_start + s. A negative index wraps around once as in Python (wrap=True) or skips
         the write (wrap=False; kv_out is still written). An index past the end is skipped. Two
         rows with one target: one of them, unspecified.
Source   ATOM PR #704, item 1 (norm, rope and window-cache write for q and kv in one launch).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from dsv4fuse import atoms

from . import _common as common
from ._common import INTERPRETED, Config
from ._rows import norm_rope_kernel

# Rows (heads) per program by token count. One warp holds a 512-row in 16 registers a lane and
# reduces without shared memory; few tokens want every row in a program of its own (latency),
# many want a second row in flight per warp (bandwidth).
CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (32, Config(rows=1, warps=1)),
    (None, Config(rows=2, warps=1)),
)


def out_dtype(x: Tensor, weight: Tensor | None, norm: str) -> torch.dtype:
    """What PyTorch's promotion gives: the weight counts where it multiplies a rounded value."""
    if weight is None or norm in ("none", "once"):
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def check(q: Tensor | None, kv: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    x = q if q is not None else kv
    if x is None:
        raise ValueError("norm_rope needs q, kv or both")
    d, half = x.shape[-1], cos.shape[-1]
    common.require(d % 16 == 0 and d <= 1024, f"head_dim {d} is not a multiple of 16 up to 1024")
    common.require(0 < 2 * half <= d, f"rope_dim {2 * half} is not within head_dim {d}")
    common.require(cos.dtype == sin.dtype, "cos and sin differ in dtype")
    for t in (q, kv):
        common.require(t is None or t.shape[-1] == d, "q and kv differ in head_dim")
        common.require(t is None or t.dtype in common.FLOATS, "q and kv must be bf16, fp16 or fp32")
        common.require(t is None or t.stride(-1) == 1, "the last axis of q and kv must be dense")
    return x


def allocate(
    q: Tensor | None, kv: Tensor | None, q_weight: Tensor | None, kv_weight: Tensor | None,
    q_norm: str, kv_norm: str, q_heads_first: bool, keep_kv: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The outputs, with the strides the docstring promises; what is absent has shape [0]."""
    if q is None:
        q_out = kv.new_empty((0,))
    else:
        dtype = out_dtype(q, q_weight, q_norm)
        b, s, h, d = q.shape
        shape = (b, h, s, d) if q_heads_first else (b, s, h, d)
        q_out = q.new_empty(shape, dtype=dtype)
        q_out = q_out.transpose(1, 2) if q_heads_first else q_out
    if kv is None:
        return q_out, q.new_empty((0,))
    shape = tuple(kv.shape) if keep_kv else (0,)
    return q_out, kv.new_empty(shape, dtype=out_dtype(kv, kv_weight, kv_norm))


def _strides(t: Tensor | None, prefix: str, axes: str) -> dict[str, int | torch.SymInt]:
    return {f"{prefix}_s{axis}": 0 if t is None else t.stride(i) for i, axis in enumerate(axes)}


def _cache_arguments(
    cache: Tensor | None, slot: Tensor | None, seq: Tensor | None, slot_start: int,
    seq_start: int, wrap: bool, kv_dtype: torch.dtype, filler: Tensor,
) -> dict[str, object]:  # fmt: skip
    paged = cache is not None and cache.dim() == 3
    if cache is not None:
        common.require(cache.dtype == kv_dtype, f"the cache is {cache.dtype}, kv is {kv_dtype}")
        common.require(cache.dim() in (2, 3), "the cache must be [N, D] or [P, N, D]")
        common.require(cache.stride(-1) == 1, "the last axis of the cache must be dense")
    return dict(
        cache_ptr=filler if cache is None else cache,
        slot_ptr=filler if slot is None else slot,
        seq_ptr=filler if seq is None else seq,
        pages=cache.shape[0] if paged else 1,
        slots=1 if cache is None else cache.shape[-2],
        cache_sp=cache.stride(0) if paged else 0,
        cache_sn=0 if cache is None else cache.stride(-2),
        **_strides(slot, "slot", "bs"), **_strides(seq, "seq", "bs"),
        slot_start=slot_start, seq_start=seq_start,
        HAS_CACHE=cache is not None, PAGED=paged, HAS_SLOT=slot is not None,
        HAS_SEQ=seq is not None, WRAP=wrap,
    )  # fmt: skip


def _quant_arguments(
    x: Tensor, nope: int, group: int, floor: float, scale: str, via: str
) -> dict[str, object]:
    if group:
        common.require(nope % group == 0, f"{nope} nope dims are no multiple of {group}")
        common.require(group & (group - 1) == 0, "quant_group must be a power of two")
        common.require(scale in ("fp32", "pow2"), f"no scale format {scale!r} here")
        common.require_fp8(x.device)
    return dict(GROUP=group, FLOOR=floor, POW2=scale == "pow2", VIA_MUL=via == "mul")


def _row_arguments(
    x: Tensor | None, name: str, filler: Tensor, weight: Tensor | None, norm: str, eps: float,
    every: bool, axes: str,
) -> dict[str, object]:  # fmt: skip
    up = name.upper()
    return {
        f"{name}_ptr": filler if x is None else x,
        f"{name}_w_ptr": filler if weight is None else weight,
        **_strides(x, name, axes), f"HAS_{up}": x is not None, f"{up}_W": weight is not None,
        f"{up}_NORM": common.NORMS[norm], f"{up}_EPS": eps, f"{up}_EVERY": every,
    }  # fmt: skip


def launch(
    q: Tensor | None, kv: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    kv_weight: Tensor | None, *, q_eps: float, kv_eps: float, q_norm: str, kv_norm: str,
    rope_rounding: str, precise: bool, q_heads_first: bool, quant_group: int,
    quant_floor: float, quant_scale: str, via: str, inverse: bool = False,
    cache: Tensor | None = None, slot: Tensor | None = None, seq: Tensor | None = None,
    slot_start: int = 0, seq_start: int = 0, wrap: bool = True, keep_kv: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Allocate the outputs and launch the kernel once."""
    x = check(q, kv, cos, sin)
    batch, length, d, half = x.shape[0], x.shape[1], x.shape[-1], cos.shape[-1]
    q_out, kv_out = allocate(q, kv, q_weight, kv_weight, q_norm, kv_norm, q_heads_first, keep_kv)
    tokens, heads = batch * length, 1 if q is None else q.shape[2]
    common.require_static(head_dim=d, rope_dim=half, heads=heads)
    config = common.launch_config(CONFIGS, tokens)
    q_programs = 0 if q is None else common.cdiv(tokens * heads, config.rows)
    kv_programs = 0 if kv is None else common.cdiv(tokens, config.rows)
    every = {"once": False, "every": not precise}[rope_rounding]
    q_every, kv_every = (every and cos.dtype == out.dtype for out in (q_out, kv_out))
    kernel = norm_rope_kernel if INTERPRETED else wrap_triton(norm_rope_kernel)
    kernel[(q_programs + kv_programs,)](
        **_row_arguments(q, "q", x, q_weight, q_norm, q_eps, q_every, "bsh"),
        **_row_arguments(kv, "kv", x, kv_weight, kv_norm, kv_eps, kv_every, "bs"),
        **_strides(None if q is None else q_out, "qo", "bsh"),
        **_strides(cos, "cos", "bsd"), **_strides(sin, "sin", "bsd"),
        **_cache_arguments(cache, slot, seq, slot_start, seq_start, wrap, kv_out.dtype, x),
        **_quant_arguments(x, d - 2 * half, quant_group, quant_floor, quant_scale, via),
        q_out_ptr=q_out, kv_out_ptr=kv_out, cos_ptr=cos, sin_ptr=sin, tokens=tokens,
        length=length, q_programs=q_programs, D=d, BLOCK=triton.next_power_of_2(d), HALF=half,
        HEADS=heads, ROWS=config.rows, FLAT=common.flat_mode(batch, length), INVERSE=inverse,
        PRECISE=precise, KEEP_KV=keep_kv, num_warps=config.warps,
    )  # fmt: skip
    return q_out, kv_out


def _reference_rows(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, norm: str,
    rope_rounding: str, precise: bool,
) -> Tensor:  # fmt: skip
    dtype = out_dtype(x, weight, norm)
    if precise:
        x, weight, rope_rounding = x.float(), None if weight is None else weight.float(), "once"
        norm = norm if norm == "none" else "once"
    if norm != "none":
        x = atoms.rms_norm(x, weight, eps=eps, rounding=norm)
    return atoms.rope(x, cos, sin, rounding=rope_rounding).to(dtype)


def reference(
    q: Tensor | None, kv: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    kv_weight: Tensor | None, *, q_eps: float, kv_eps: float, q_norm: str, kv_norm: str,
    rope_rounding: str, precise: bool = False, q_heads_first: bool = False,
    quant_group: int = 0, quant_floor: float = 1e-4, quant_scale: str = "pow2",
    via: str = "div", cache: Tensor | None = None, slot: Tensor | None = None,
    seq: Tensor | None = None, slot_start: int = 0, seq_start: int = 0, wrap: bool = True,
    keep_kv: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both ops in plain PyTorch, composed of atoms; writes ``cache`` in place if given."""
    check(q, kv, cos, sin)
    outs = allocate(q, kv, q_weight, kv_weight, q_norm, kv_norm, q_heads_first, keep_kv)
    if q is not None:
        table = cos.unsqueeze(2), sin.unsqueeze(2)
        y = _reference_rows(q, *table, q_weight, q_eps, q_norm, rope_rounding, precise)
        outs[0].copy_(y)
    if kv is None:
        return outs
    y = _reference_rows(kv, cos, sin, kv_weight, kv_eps, kv_norm, rope_rounding, precise)
    if quant_group:
        nope = kv.shape[-1] - 2 * cos.shape[-1]
        kw = dict(group=quant_group, floor=quant_floor, scale=quant_scale, via=via)
        y = torch.cat((atoms.fake_quant(y[..., :nope], **kw), y[..., nope:]), dim=-1)
    if keep_kv:
        outs[1].copy_(y)
    if cache is not None:
        write_rows(cache, y, slot, seq, slot_start, seq_start, wrap)
    return outs


def write_rows(
    cache: Tensor, rows: Tensor, slot: Tensor | None, seq: Tensor | None, slot_start: int,
    seq_start: int, wrap: bool,
) -> None:  # fmt: skip
    """``cache[seq, slot] = rows`` where both indices are valid, through one spare row.

    The spare row takes what is skipped: no shape depends on data, so it traces.
    """
    batch, length = rows.shape[:2]
    arange = lambda n: torch.arange(n, device=rows.device)  # noqa: E731
    slot = slot_start + arange(length)[None, :] if slot is None else slot.long()
    seq = seq_start + arange(batch)[:, None] if seq is None else seq.long()
    pages, slots = cache.shape[0] if cache.dim() == 3 else 1, cache.shape[-2]
    if cache.dim() == 2:
        seq = torch.zeros_like(slot)
    if wrap:
        slot = torch.where(slot < 0, slot + slots, slot)
        seq = torch.where(seq < 0, seq + pages, seq)
    valid = (slot >= 0) & (slot < slots) & (seq >= 0) & (seq < pages)
    index = torch.where(valid, seq * slots + slot, pages * slots).expand(batch, length)
    flat = torch.cat((cache.reshape(-1, cache.shape[-1]), cache.new_zeros(1, cache.shape[-1])))
    flat.index_put_((index.reshape(-1),), rows.reshape(-1, rows.shape[-1]))
    cache.copy_(flat[:-1].view(cache.shape))


@triton_op("dsv4fuse::norm_rope", mutates_args=())
def norm_rope(
    q: Tensor | None, kv: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    kv_weight: Tensor | None, *, q_eps: float, kv_eps: float, q_norm: str, kv_norm: str,
    rope_rounding: str, precise: bool = False, q_heads_first: bool = False,
    quant_group: int = 0, quant_floor: float = 1e-4, quant_scale: str = "pow2",
    via: str = "div",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm and rope of q and kv, no cache: see the module's docstring."""
    run = reference if common.use_reference(cos) else launch
    return run(
        q, kv, cos, sin, q_weight, kv_weight, q_eps=q_eps, kv_eps=kv_eps, q_norm=q_norm,
        kv_norm=kv_norm, rope_rounding=rope_rounding, precise=precise,
        q_heads_first=q_heads_first, quant_group=quant_group, quant_floor=quant_floor,
        quant_scale=quant_scale, via=via,
    )  # fmt: skip


@norm_rope.register_fake
def _(q, kv, cos, sin, q_weight, kv_weight, *, q_norm, kv_norm, q_heads_first=False, **_):
    check(q, kv, cos, sin)
    return allocate(q, kv, q_weight, kv_weight, q_norm, kv_norm, q_heads_first)


@triton_op("dsv4fuse::norm_rope_cache", mutates_args=("cache",))
def norm_rope_cache(
    q: Tensor | None, kv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    kv_weight: Tensor | None, cache: Tensor, slot: Tensor | None, seq: Tensor | None, *,
    q_eps: float, kv_eps: float, q_norm: str, kv_norm: str, rope_rounding: str,
    precise: bool = False, q_heads_first: bool = False, slot_start: int = 0,
    seq_start: int = 0, wrap: bool = True, keep_kv: bool = True, quant_group: int = 0,
    quant_floor: float = 1e-4, quant_scale: str = "pow2", via: str = "div",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm and rope of q and kv, and kv's rows into the cache: see the module's docstring."""
    run = reference if common.use_reference(cos) else launch
    return run(
        q, kv, cos, sin, q_weight, kv_weight, q_eps=q_eps, kv_eps=kv_eps, q_norm=q_norm,
        kv_norm=kv_norm, rope_rounding=rope_rounding, precise=precise,
        q_heads_first=q_heads_first, cache=cache, slot=slot, seq=seq, slot_start=slot_start,
        seq_start=seq_start, wrap=wrap, keep_kv=keep_kv, quant_group=quant_group,
        quant_floor=quant_floor, quant_scale=quant_scale, via=via,
    )  # fmt: skip


@norm_rope_cache.register_fake
def _(q, kv, cos, sin, q_weight, kv_weight, cache, slot, seq, *, q_norm, kv_norm,
      q_heads_first=False, keep_kv=True, **_):  # fmt: skip
    check(q, kv, cos, sin)
    return allocate(q, kv, q_weight, kv_weight, q_norm, kv_norm, q_heads_first, keep_kv)


def traffic(q: Tensor | None, kv: Tensor | None, cos: Tensor, sin: Tensor, *,
            cache: Tensor | None = None, keep_kv: bool = True) -> int:  # fmt: skip
    """Bytes that must move: every input once, every output once, the cache rows once."""
    written = common.nbytes(q) + common.nbytes(kv) * (int(keep_kv) + int(cache is not None))
    return common.nbytes(q, kv, cos, sin) + written
