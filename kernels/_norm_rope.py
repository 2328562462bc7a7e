"""The launch of norm_rope, norm_rope_cache and their kin: checks, outputs, kernel arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _common as common
from ._common import Config
from ._launch import wrap_triton
from ._norms import out_dtype
from ._rows import norm_rope_kernel

# Rows per program by the number of rows (heads of all tokens). One warp holds a 512-row in 16
# registers a lane and reduces without shared memory; few rows want a program each (latency), many
# a second row in flight per warp (bandwidth).
CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (1024, Config(rows=1, warps=1)),
    (None, Config(rows=2, warps=1)),
)


TYPES = {dtype: code for code, dtype in enumerate(common.FLOATS)}  # as the kernel is told
MAX_SPLIT = 16


@dataclass(frozen=True)
class Packed:
    """A cache of bytes: rows of codes and bf16, then (or between) the rows' scale bytes."""

    page: int  # rows of a page
    row: int  # bytes from one row's codes to the next
    scales: int  # from the page's first byte to its first scale
    step: int  # from one row's scales to the next
    data: int  # bytes of codes and bf16 in a row


def check(q: Tensor | None, kv: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Raises ValueError where no launch is possible; q or kv, the first of the two there is."""
    x = q if q is not None else kv
    if x is None:
        raise ValueError("norm_rope needs q, kv or both")
    d, half = x.shape[-1], cos.shape[-1]
    common.require(d % 16 == 0 and d <= 1024, f"head_dim {d} is not a multiple of 16 up to 1024")
    common.require(0 < 2 * half <= d, f"rope_dim {2 * half} is not within head_dim {d}")
    common.require(cos.dtype == sin.dtype, "cos and sin differ in dtype")
    for name, t, rank in (("q", q, 4), ("kv", kv, 3)):
        if t is None:
            continue
        common.require(t.dim() in (rank, rank + 1), f"{name} has {t.dim()} axes")
        common.require(t.shape[-1] == d, "q and kv differ in head_dim")
        common.require(t.dtype in common.FLOATS, "q and kv must be bf16, fp16 or fp32")
        common.require(t.stride(-1) == 1, "the last axis of q and kv must be dense")
        common.require(
            t.dim() == rank or 1 <= t.shape[0] <= MAX_SPLIT,
            f"{name} is in {t.shape[0]} parts, at most {MAX_SPLIT} are summed",
        )
    return x


def summed(t: Tensor, rank: int, dtype: torch.dtype | None) -> Tensor:
    """What the partial results of a split product add up to, as an eager module adds them."""
    if t.dim() == rank:
        return t
    return t.sum(0, dtype=torch.float32).to(dtype or t.dtype)


def allocate(
    q: Tensor | None, kv: Tensor | None, q_weight: Tensor | None, kv_weight: Tensor | None,
    q_norm: str, kv_norm: str, q_heads_first: bool, keep_kv: bool = True,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The outputs, with the strides the docstring promises; what is absent has shape [0]."""
    if q is None:
        q_out = kv.new_empty((0,))
    else:
        b, s, h, d = q.shape[-4:]
        shape = (b, h, s, d) if q_heads_first else (b, s, h, d)
        q_out = q.new_empty(shape, dtype=out_dtype(_dtype(q, 4, sum_dtype), q_weight, q_norm))
        q_out = q_out.transpose(1, 2) if q_heads_first else q_out
    if kv is None:
        return q_out, q.new_empty((0,))
    shape = tuple(kv.shape[-3:]) if keep_kv else (0,)
    dtype = out_dtype(_dtype(kv, 3, sum_dtype), kv_weight, kv_norm)
    return q_out, kv.new_empty(shape, dtype=dtype)


def _dtype(t: Tensor, rank: int, sum_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a row once its parts are summed."""
    return t.dtype if t.dim() == rank else sum_dtype or t.dtype


def cache_arguments(
    cache: Tensor | None, slot: Tensor | None, seq: Tensor | None, slot_start: int,
    seq_start: int, flat_slot: bool, wrap: bool, kv_dtype: torch.dtype, packed: Packed | None,
    filler: Tensor,
) -> dict[str, object]:  # fmt: skip
    paged = cache is not None and (cache.dim() > 2 or packed is not None)
    if cache is not None and packed is None:
        common.require(cache.dtype == kv_dtype, f"the cache is {cache.dtype}, kv is {kv_dtype}")
        fits = cache.dim() in (2, 3) or cache.dim() == 4 and cache.shape[1] == 1
        common.require(fits, "the cache must be [N, D], [P, N, D] or [P, 1, N, D]")
        common.require(cache.stride(-1) == 1, "the last axis of the cache must be dense")
        common.require(paged or not flat_slot, "slots count through pages of a [P, N, D] cache")
    rows = 1 if cache is None else packed.page if packed else cache.shape[-2]
    step = 0 if cache is None else packed.row if packed else common.strides(cache)[-2]
    return dict(
        cache_ptr=filler if cache is None else cache,
        slot_ptr=filler if slot is None else slot,
        seq_ptr=filler if seq is None else seq,
        pages=cache.shape[0] if paged else 1, slots=rows,
        cache_sp=common.strides(cache)[0] if paged else 0, cache_sn=step,
        **common.named_strides(slot, "slot", "bs"), **common.named_strides(seq, "seq", "bs"),
        slot_start=slot_start, seq_start=seq_start,
        scales_at=packed.scales if packed else 0, scales_step=packed.step if packed else 0,
        HAS_CACHE=cache is not None, PAGED=paged, HAS_SLOT=slot is not None,
        HAS_SEQ=seq is not None, FLAT_SLOT=flat_slot, WRAP=wrap, PACKED=packed is not None,
    )  # fmt: skip


def quant_arguments(
    x: Tensor, width: int, group: int, floor: float, scale: str, via: str, fp8: bool = True
) -> dict[str, object]:
    """``width``: how many lanes are quantised."""
    if group:
        common.require(width % group == 0, f"{width} lanes are no multiple of {group}")
        common.require(group & (group - 1) == 0, "quant_group must be a power of two")
        common.require(scale in ("fp32", "pow2"), f"no scale format {scale!r} here")
        if fp8:
            common.require_fp8(x.device)
    return dict(GROUP=group, FLOOR=floor, POW2=scale == "pow2", VIA_MUL=via == "mul")


def _row_arguments(
    x: Tensor | None, name: str, filler: Tensor, weight: Tensor | None, norm: str, eps: float,
    every: bool, axes: str, sum_dtype: torch.dtype | None,
) -> dict[str, object]:  # fmt: skip
    up = name.upper()
    split = x is not None and x.dim() > len(axes) + 1
    common.require_static(parts=x.shape[0] if split else 1)
    dtype = torch.bfloat16 if x is None else _dtype(x, len(axes) + 1, sum_dtype)
    return {
        f"{name}_ptr": filler if x is None else x,
        f"{name}_w_ptr": filler if weight is None else weight,
        f"{name}_sk": common.strides(x)[0] if split else 0,
        f"{up}_SPLIT": x.shape[0] if split else 1, f"{up}_TYPE": TYPES[dtype],
        **{f"{name}_s{a}": 0 if x is None else common.strides(x)[i - len(axes) - 1]
           for i, a in enumerate(axes)},
        f"HAS_{up}": x is not None, f"{up}_W": weight is not None,
        f"{up}_NORM": common.NORMS[norm], f"{up}_EPS": eps, f"{up}_EVERY": every,
    }  # fmt: skip


def launch(
    q: Tensor | None, kv: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    kv_weight: Tensor | None, *, q_eps: float, kv_eps: float, q_norm: str, kv_norm: str,
    rope_rounding: str, precise: bool, q_heads_first: bool, quant_group: int,
    quant_floor: float, quant_scale: str, via: str, inverse: bool = False,
    cache: Tensor | None = None, slot: Tensor | None = None, seq: Tensor | None = None,
    slot_start: int = 0, seq_start: int = 0, flat_slot: bool = False, wrap: bool = True,
    keep_kv: bool = True, sum_dtype: torch.dtype | None = None, packed: Packed | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Allocate the outputs and launch the kernel once."""
    x = check(q, kv, cos, sin)
    batch, length = q.shape[-4:-2] if q is not None else kv.shape[-3:-1]
    d, half = x.shape[-1], cos.shape[-1]
    q_out, kv_out = allocate(
        q, kv, q_weight, kv_weight, q_norm, kv_norm, q_heads_first, keep_kv, sum_dtype
    )
    tokens, heads = batch * length, 1 if q is None else q.shape[-2]
    common.require_static(head_dim=d, rope_dim=half, heads=heads)
    config = common.launch_config(CONFIGS, tokens * heads)
    q_programs = 0 if q is None else common.cdiv(tokens * heads, config.rows)
    # Beside q or quantised a kv row has a program of its own: two would cost q registers.
    kv_rows = config.rows if q is None and not quant_group else 1
    kv_programs = 0 if kv is None else common.cdiv(tokens, kv_rows)
    every = {"once": False, "every": not precise}[rope_rounding]
    q_every, kv_every = (every and cos.dtype == out.dtype for out in (q_out, kv_out))
    wrap_triton(norm_rope_kernel)[(q_programs + kv_programs,)](
        **_row_arguments(q, "q", cos, q_weight, q_norm, q_eps, q_every, "bsh", sum_dtype),
        **_row_arguments(kv, "kv", cos, kv_weight, kv_norm, kv_eps, kv_every, "bs",
                         sum_dtype),
        **common.named_strides(None if q is None else q_out, "qo", "bsh"),
        **common.named_strides(cos, "cos", "bsd"), **common.named_strides(sin, "sin", "bsd"),
        **cache_arguments(cache, slot, seq, slot_start, seq_start, flat_slot, wrap, kv_out.dtype,
                           packed, x),
        **quant_arguments(x, d - 2 * half, quant_group, quant_floor, quant_scale, via),
        q_out_ptr=q_out, kv_out_ptr=kv_out, cos_ptr=cos, sin_ptr=sin, tokens=tokens,
        length=length, q_programs=q_programs, D=d, BLOCK=triton.next_power_of_2(d), HALF=half,
        HEADS=heads, ROWS=config.rows, KV_ROWS=kv_rows, FLAT=common.flat_mode(batch, length),
        INVERSE=inverse, PRECISE=precise, KEEP_KV=keep_kv, num_warps=config.warps,
    )  # fmt: skip
    return q_out, kv_out
