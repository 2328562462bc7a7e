"""RMSNorm → rope [→ fp8 → cache write], for q and kv in one launch.

Math, per row x of D elements (a head of q, or a token of kv), R = 2 * cos.shape[-1]:
``y = rope(rms_norm(x, weight, eps), cos, sin)`` with rope on the trailing R elements as
interleaved pairs, as ``dsv4fuse.atoms`` defines both. For kv then optionally
``y[:D-R] = fake_quant(y[:D-R])`` and ``cache[seq, slot] = y``, or y as bytes into the cache.

Shapes   q ``[B,S,H,D]``, kv ``[B,S,D]`` (one may be None), cos and sin ``[B,S,R/2]``; D a
         multiple of 16 up to 1024; cache ``[N,D]``, ``[P,N,D]`` or ``[P,1,N,D]``; slot, seq
         ``[B,S]``. One axis more in front of q or kv: partial results of a split product, up to
         16, summed in fp32 as they are loaded and rounded to ``sum_dtype`` (None: their own dtype).
Dtypes   q, kv bf16, fp16 or fp32; cos and sin fp32 or a 16-bit float; weights any of these;
         the cache has kv_out's dtype; slot and seq int32 or int64.
Strides  any, 0 included; q, kv and cache have last stride 1, cos and sin need not (the real
         view of complex frequencies has 2). Offsets are 64-bit.
Output   x.dtype, or the promotion with the weight where PyTorch multiplies after rounding
         ("rstd", "weight", "every"). q_out ``[B,S,H,D]``, dense in that order or, for
         q_heads_first, as ``[B,H,S,D]``. kv_out ``[B,S,D]`` dense, of shape [0] for keep_kv=False.
Rounding q_norm, kv_norm: "none" or a ``rounding`` of ``atoms.rms_norm``; the normed value is
         rounded before rope; rope_rounding as ``atoms.rope``. ``precise``: fp32 from the load
         to the one store, whatever those names say. Quantised is the rounded value.
Slots    row (b, s) goes to ``cache[seq[b,s], slot[b,s]]``, by default seq_start + b and
         slot_start + s; for flat_slot to row ``slot[b,s]`` of ``cache.view(-1, D)``, whether or
         not there is such a view. A negative index wraps around once as in Python (wrap=True) or
         skips the write (wrap=False; kv_out is still written). An index past the end is skipped.
         Two rows with one target: one of them, unspecified.
Bytes    norm_rope_cache_fp8: cache uint8 ``[P, bytes]``, page ``slot // page_size``. A row is
         D-R e4m3 codes and R bf16 (448 + 128 bytes), its scales D/group e8m0 bytes (7, and 1 of
         zero padding). layout "page": the rows of a page, then their scales (what sparse
         attention kernels read); "row": each row's scales behind it (584 bytes). kv_out is not
         quantised. Bytes that no slot names keep their value.
Source   ATOM PR #704, item 1 (norm, rope and window-cache write for q and kv in one launch).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from ._norm_rope import Packed, allocate, check, launch, summed
from ._norms import out_dtype


def reference_rows(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, norm: str,
    rope_rounding: str, precise: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
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
    sum_dtype: torch.dtype | None = None, quant_group: int = 0, quant_floor: float = 1e-4,
    quant_scale: str = "pow2", via: str = "div", cache: Tensor | None = None,
    slot: Tensor | None = None, seq: Tensor | None = None, slot_start: int = 0,
    seq_start: int = 0, flat_slot: bool = False, wrap: bool = True, keep_kv: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both ops in plain PyTorch, composed of atoms; writes ``cache`` in place if given."""
    check(q, kv, cos, sin)
    outs = allocate(
        q, kv, q_weight, kv_weight, q_norm, kv_norm, q_heads_first, True, sum_dtype
    )
    sum_to = torch.float32 if precise else sum_dtype
    for i, (x, rank, weight, eps, norm) in enumerate(
        ((q, 4, q_weight, q_eps, q_norm), (kv, 3, kv_weight, kv_eps, kv_norm))
    ):
        if x is not None:
            table = (cos, sin) if i else (cos.unsqueeze(2), sin.unsqueeze(2))
            y = reference_rows(summed(x, rank, sum_to), *table, weight, eps, norm,
                               rope_rounding, precise, outs[i].dtype)  # fmt: skip
            outs[i].copy_(y)
    if kv is not None and quant_group:
        nope = kv.shape[-1] - 2 * cos.shape[-1]
        kw = dict(group=quant_group, floor=quant_floor, scale=quant_scale, via=via)
        outs[1][..., :nope] = atoms.fake_quant(outs[1][..., :nope], **kw)
    if cache is not None:
        if flat_slot:
            if slot is None:
                slot = slot_start + torch.arange(kv.shape[-2], device=kv.device)[None, :]
            seq, slot = page_and_row(slot, cache.shape[0], cache.shape[-2], wrap)
        write_rows(cache, outs[1], slot, seq, slot_start, seq_start, wrap and not flat_slot)
    return outs[0], outs[1] if keep_kv else outs[1].new_empty((0,))


def page_and_row(slot: Tensor, pages: int, rows: int, wrap: bool) -> tuple[Tensor, Tensor]:
    """(page, row in it) of slots that count through pages; −1 for what is no slot."""
    slot = slot.long()
    slot = torch.where(slot < 0, slot + pages * rows, slot) if wrap else slot
    return torch.where(slot < 0, -1, slot // rows), slot % rows


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
    pages, slots = cache.shape[0] if cache.dim() > 2 else 1, cache.shape[-2]
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


@torch.library.triton_op("dsv4fuse::norm_rope", mutates_args=())
def norm_rope(
    q: Tensor | None, kv: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    kv_weight: Tensor | None, *, q_eps: float, kv_eps: float, q_norm: str, kv_norm: str,
    rope_rounding: str, precise: bool = False, q_heads_first: bool = False,
    sum_dtype: torch.dtype | None = None, quant_group: int = 0, quant_floor: float = 1e-4,
    quant_scale: str = "pow2", via: str = "div",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm and rope of q and kv, no cache: see the module's docstring."""
    run = reference if common.use_reference(cos) else launch
    return run(
        q, kv, cos, sin, q_weight, kv_weight, q_eps=q_eps, kv_eps=kv_eps, q_norm=q_norm,
        kv_norm=kv_norm, rope_rounding=rope_rounding, precise=precise,
        q_heads_first=q_heads_first, quant_group=quant_group, quant_floor=quant_floor,
        quant_scale=quant_scale, via=via, sum_dtype=sum_dtype,
    )  # fmt: skip


@norm_rope.register_fake
def _(q, kv, cos, sin, q_weight, kv_weight, *, q_norm, kv_norm, q_heads_first=False,
      sum_dtype=None, **_):  # fmt: skip
    check(q, kv, cos, sin)
    return allocate(q, kv, q_weight, kv_weight, q_norm, kv_norm, q_heads_first, True, sum_dtype)


@torch.library.triton_op("dsv4fuse::norm_rope_cache", mutates_args=("cache",))
def norm_rope_cache(
    q: Tensor | None, kv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    kv_weight: Tensor | None, cache: Tensor, slot: Tensor | None, seq: Tensor | None, *,
    q_eps: float, kv_eps: float, q_norm: str, kv_norm: str, rope_rounding: str,
    precise: bool = False, q_heads_first: bool = False, sum_dtype: torch.dtype | None = None,
    slot_start: int = 0, seq_start: int = 0, flat_slot: bool = False, wrap: bool = True,
    keep_kv: bool = True, quant_group: int = 0, quant_floor: float = 1e-4,
    quant_scale: str = "pow2", via: str = "div",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm and rope of q and kv, and kv's rows into the cache: see the module's docstring."""
    run = reference if common.use_reference(cos) else launch
    return run(
        q, kv, cos, sin, q_weight, kv_weight, q_eps=q_eps, kv_eps=kv_eps, q_norm=q_norm,
        kv_norm=kv_norm, rope_rounding=rope_rounding, precise=precise,
        q_heads_first=q_heads_first, cache=cache, slot=slot, seq=seq, slot_start=slot_start,
        seq_start=seq_start, flat_slot=flat_slot, wrap=wrap, keep_kv=keep_kv,
        quant_group=quant_group, quant_floor=quant_floor, quant_scale=quant_scale, via=via,
        sum_dtype=sum_dtype,
    )  # fmt: skip


@norm_rope_cache.register_fake
def _(q, kv, cos, sin, q_weight, kv_weight, cache, slot, seq, *, q_norm, kv_norm,
      q_heads_first=False, keep_kv=True, sum_dtype=None, **_):  # fmt: skip
    check(q, kv, cos, sin)
    return allocate(q, kv, q_weight, kv_weight, q_norm, kv_norm, q_heads_first, keep_kv, sum_dtype)


def layout_of(
    cache: Tensor, kv: Tensor, cos: Tensor, page_size: int, layout: str, group: int
) -> Packed:
    """Where the bytes of a row go; raises ValueError if they do not fit the cache."""
    d, nope = kv.shape[-1], kv.shape[-1] - 2 * cos.shape[-1]
    flat = cache.dtype == torch.uint8 and cache.dim() == 2
    common.require(flat, "the cache must be uint8 [P, bytes]")
    common.require(cache.stride(1) == 1, "the bytes of a page must be dense")
    common.require(layout in ("page", "row"), f"no layout {layout!r} here")
    common.require(d % group == 0 and nope % group == 0, f"{nope} of {d} dims are not in {group}s")
    data, scales = nope + 2 * (d - nope), d // group
    row = data + scales
    fits = cache.shape[1] >= page_size * row and cache.stride(0) % 2 == 0
    common.require(fits, f"a page needs an even number of bytes, {page_size * row} at least")
    if layout == "page":
        return Packed(page_size, data, page_size * data, scales, data)
    common.require(row % 2 == 0, f"rows of {row} bytes put bf16 on odd addresses")
    return Packed(page_size, row, data, row, data)


def packed_rows(rows: Tensor, packed: Packed, group: int, floor: float, via: str) -> Tensor:
    """bf16 rows ``[B,S,D]`` as bytes: codes, the rest in bf16, scale bytes, zeros."""
    d = rows.shape[-1]
    nope = 2 * d - packed.data
    kw = dict(group=group, floor=floor, scale="pow2", via=via)
    codes, scales = atoms.group_quant(rows[..., :nope], **kw)
    tail = rows[..., nope:].contiguous().view(torch.uint8)
    byte = scales.to(torch.float8_e8m0fnu).view(torch.uint8)
    pad = byte.new_zeros(*byte.shape[:-1], d // group - byte.shape[-1])
    return torch.cat((codes.view(torch.uint8), tail, byte, pad), -1)


def write_packed(
    cache: Tensor, rows: Tensor, slot: Tensor, packed: Packed, wrap: bool = False
) -> None:
    """The bytes of each row to its page, through a spare one for what has no slot."""
    pages = cache.shape[0]
    page, at = page_and_row(slot, pages, packed.page, wrap)
    page = torch.where((page < 0) | (page >= pages), pages, page).reshape(-1, 1)
    at = at.reshape(-1, 1)
    flat = torch.cat((cache, torch.zeros_like(cache[:1])))
    data = packed.data
    for piece, start, step in (
        (rows[..., :data], 0, packed.row), (rows[..., data:], packed.scales, packed.step)
    ):  # fmt: skip
        lanes = torch.arange(piece.shape[-1], device=cache.device)
        flat.index_put_((page, start + at * step + lanes), piece.reshape(-1, piece.shape[-1]))
    cache.copy_(flat[:-1])


@torch.library.triton_op("dsv4fuse::norm_rope_cache_fp8", mutates_args=("cache",))
def norm_rope_cache_fp8(
    q: Tensor | None, kv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    kv_weight: Tensor | None, cache: Tensor, slot: Tensor, *, page_size: int, q_eps: float,
    kv_eps: float, q_norm: str, kv_norm: str, rope_rounding: str, precise: bool = False,
    q_heads_first: bool = False, sum_dtype: torch.dtype | None = None, layout: str = "page",
    wrap: bool = False, keep_kv: bool = False, group: int = 64, floor: float = 1e-4,
    via: str = "div",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm and rope of q and kv, and kv's rows as fp8 bytes into a paged cache: see above."""
    packed = layout_of(cache, kv, cos, page_size, layout, group)
    check(q, kv, cos, sin)
    dtype = out_dtype(kv.dtype if kv.dim() == 3 else sum_dtype or kv.dtype, kv_weight, kv_norm)
    common.require(dtype == torch.bfloat16, f"the rows' tail is bf16, kv is {dtype}")
    kw = dict(q_eps=q_eps, kv_eps=kv_eps, q_norm=q_norm, kv_norm=kv_norm,
              rope_rounding=rope_rounding, precise=precise, q_heads_first=q_heads_first,
              sum_dtype=sum_dtype)  # fmt: skip
    if common.use_reference(cos):
        outs = reference(q, kv, cos, sin, q_weight, kv_weight, **kw)
        rows = packed_rows(outs[1], packed, group, floor, via)
        write_packed(cache, rows, slot, packed, wrap)
        return outs[0], outs[1] if keep_kv else outs[1].new_empty((0,))
    return launch(
        q, kv, cos, sin, q_weight, kv_weight, **kw, cache=cache, slot=slot, flat_slot=True,
        wrap=wrap, keep_kv=keep_kv, packed=packed, quant_group=group, quant_floor=floor,
        quant_scale="pow2", via=via,
    )  # fmt: skip


@norm_rope_cache_fp8.register_fake
def _(q, kv, cos, sin, q_weight, kv_weight, cache, slot, *, page_size, q_norm, kv_norm,
      q_heads_first=False, sum_dtype=None, layout="page", keep_kv=False, group=64, **_):
    check(q, kv, cos, sin)
    layout_of(cache, kv, cos, page_size, layout, group)
    return allocate(q, kv, q_weight, kv_weight, q_norm, kv_norm, q_heads_first, keep_kv, sum_dtype)


def traffic(q: Tensor | None, kv: Tensor | None, cos: Tensor, sin: Tensor, *,
            cache: Tensor | None = None, keep_kv: bool = True) -> int:  # fmt: skip
    """Bytes that must move: every input once, every output once, the cache rows once."""
    written = common.nbytes(q) + common.nbytes(kv) * (int(keep_kv) + int(cache is not None))
    return common.nbytes(q, kv, cos, sin) + written
