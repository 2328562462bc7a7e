"""The KV compressor: softmax over a window → sum → RMSNorm → rope [→ matrix] [→ quant] [→ write].

Math, per entry (b, n) and channel d, over the rows w of its window, older rows first:
``pooled = Σ_w kv[w] · softmax_w(gate[w] + bias[w])``, then ``y = rope(rms_norm(pooled))`` as
``dsv4fuse.atoms`` defines them, then optionally ``y = (y @ matrix) * factor`` as in ``indexer_q``,
then ``y[:D-R] = fake_quant(y[:D-R])``, or with quant_fp4 ``y = fake_quant(y, fp4=quant_fp4)``, and
``cache[seq, slot] = y``.

Shapes   kv, gate ``[B,N,W,D]``: the rows themselves (views of ``[B,S,D]`` cost nothing). Or, with
         ends ``[B,N]``, caches of rows ``[P,S,D]``: the entry pools the positions up to its end,
         a position p in row ``p % ring`` (ring > 0) or ``max(p, 0)`` (ring 0) of page[b,n]
         (``[B,N]``, by default b). bias ``[W,D]`` or None; cos, sin ``[B,N,R/2]``; matrix
         ``[D,D]``, D then a power of two from 16 to 512.
Overlap  kv_before, gate_before, bias_before: the same for the rows in front of those, of as many
         positions. shifted: ``kv_before[b,n]`` belongs to entry n + 1, and entry 0 has none; then
         N counts the entries, and the last row of kv_before is not read. masked: rows at
         positions below 0 have no weight.
Sizes    ``PLANS`` lists what is compiled; W a power of two, D a multiple of 16.
Dtypes   kv, gate, bias bf16, fp16 or fp32; cos and sin fp32 or a 16-bit float; page, ends, slot
         and seq int32 or int64; the cache has the output's dtype, the matrix that or fp32. Last
         strides are 1, but for cos, sin and the matrix; the others any, 0 included.
Output   ``[B,N,D]`` dense (shape [0] without keep); pool_dtype's promotion with the weight as in
         ``norm_rope_cache``.
Rounding gate + bias is fp32, with narrow_bias rounded to the gate's dtype. pool_rounding "once":
         fp32, rounded to pool_dtype at the end; "every": weights, products and the sum round to
         kv's dtype. norm, rope_rounding, precise as in ``norm_rope_cache``. With a matrix y is
         rounded to the output's dtype in front of it, behind the product (not of an fp32 one) and
         behind the factor; for ``precise`` nowhere before the quantiser. quant_fp4 names a form
         of ``atoms.e2m1``, nearest with ties to even; then quant_scale is "pow2".
Errors   ValueError for other sizes and dtypes, an unknown form, lanes that are no whole groups, a
         matrix with a quantiser that is not fp4.
Slots    as in ``norm_rope_cache``. With ``spare`` the cache's last row takes what is not wanted:
         nothing is written there, and without keep such an entry is not computed. A row that is
         skipped this way costs one load.
Source   TensorRT-LLM #14124 (reduction of a wide window over several warps, one list of valid
         configurations); ATOM #704 item 4 (the upcast folded in); V4's fp4_act_quant.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from . import _norm_rope as host
from . import norm_rope_cache as rows
from ._compress import compress_kernel
from ._fp4 import fp4_form
from ._launch import wrap_triton
from ._norms import out_dtype
from ._turn import turned
from ._windows import (
    check,
    check_turn,
    choose,
    columns_turned,
    finish_warps,
    in_a_row,
    rows_of,
    sizes,
)


def launch(
    kv: Tensor, gate: Tensor, kv_before: Tensor | None, gate_before: Tensor | None,
    bias: Tensor | None, bias_before: Tensor | None, weight: Tensor | None, cos: Tensor,
    sin: Tensor, ends: Tensor | None, page: Tensor | None, *, width: int, ring: int,
    shifted: bool, masked: bool, narrow_bias: bool, pool_rounding: str, pool_dtype: torch.dtype,
    eps: float, norm: str, rope_rounding: str, precise: bool, quant_group: int,
    quant_floor: float, quant_scale: str, via: str, quant_fp4: str = "",
    matrix: Tensor | None = None, factor: float = 1.0, cache: Tensor | None = None,
    slot: Tensor | None = None, seq: Tensor | None = None, slot_start: int = 0,
    seq_start: int = 0, flat_slot: bool = False, wrap: bool = True, keep: bool = True,
    spare: bool = False,
) -> Tensor:  # fmt: skip
    """Allocate the output and launch: once, or for a wide window pool and finish apart."""
    z = check(kv, gate, kv_before, gate_before, bias, bias_before, cos, sin, ends, width=width,
              pool_rounding=pool_rounding, pool_dtype=pool_dtype, shifted=shifted,
              masked=masked)  # fmt: skip
    out = allocate(kv, cos, weight, norm, pool_dtype, keep)
    check_turn(z, matrix, out.dtype, quant_group, quant_fp4)
    skips = spare and not keep
    if skips and in_a_row(z, page, slot, seq):
        swapped = (t.transpose(0, 1) for t in (cos, sin, ends, page, slot, seq))
        cos, sin, ends, page, slot, seq = swapped
        z = sizes(kv, kv_before, cos, width, pool_rounding)
    entries = z.batch * z.count
    few = skips and isinstance(z.count, int) and z.count <= 8
    groups = z.batch if few else entries
    chosen = choose(z, groups, few)
    step = min(chosen.step, z.width)
    block = triton.next_power_of_2(min(z.dim, chosen.columns or z.dim))
    pooled_dtype = torch.float32 if precise else pool_dtype
    pooled = kv.new_empty((entries, z.dim) if chosen.columns else (0,), dtype=pooled_dtype)
    arguments = dict(
        **rows_of(ends, kv, kv=kv, kvb=kv_before, gate=gate, gateb=gate_before),
        **host.cache_arguments(
            cache, slot, seq, slot_start, seq_start, flat_slot, wrap, out.dtype, None, kv
        ),
        **host.quant_arguments(kv, z.dim if quant_fp4 else z.dim - 2 * z.half, quant_group,
                               quant_floor, quant_scale, via, not quant_fp4),
        **common.named_strides(ends, "ends", "bs"), **common.named_strides(page, "page", "bs"),
        **common.named_strides(cos, "cos", "bsd"), **common.named_strides(sin, "sin", "bsd"),
        bias_ptr=kv if bias is None else bias, **common.named_strides(bias, "bias", "w"),
        biasb_ptr=kv if bias_before is None else bias_before,
        **common.named_strides(bias_before, "biasb", "w"),
        ends_ptr=kv if ends is None else ends, page_ptr=kv if page is None else page,
        w_ptr=kv if weight is None else weight, m_ptr=kv if matrix is None else matrix,
        **common.named_strides(matrix, "m", "io"), FACTOR=factor,
        cos_ptr=cos, sin_ptr=sin, pooled_ptr=pooled, out_ptr=out, length=z.count,
        entries=entries, D=z.dim, HALF=z.half, FLAT=common.flat_mode(z.batch, z.count),
        LANES=triton.next_power_of_2(z.count) if few else 0, STEP=step,
        TILES=min(chosen.tiles, z.width // max(step, 1)), STAGES=chosen.stages,
        WIDTH=z.width, BEFORE=z.before, SHIFTED=shifted, GATHER=ends is not None,
        HAS_PAGE=page is not None, RING=ring, MASKED=masked, HAS_BIAS=bias is not None,
        BIAS_NARROW=narrow_bias and not precise, NARROW=not precise, HAS_W=weight is not None,
        POOL_EVERY=pool_rounding == "every" and not precise, NORM=common.NORMS[norm], EPS=eps,
        EVERY=rope_rounding == "every" and not precise and cos.dtype == out.dtype,
        PRECISE=precise, KEEP=keep, SPARE=int(spare),
        FP4=fp4_form(quant_fp4, quant_group, quant_scale),
    )  # fmt: skip
    kernel = wrap_triton(compress_kernel)
    parts, whole = triton.cdiv(z.dim, block), triton.next_power_of_2(z.dim)
    turning = matrix is not None
    kernel[(groups * parts,)](
        **arguments, BLOCK=block, PARTS=parts, POOL=True, FINISH=not chosen.columns,
        COLUMNS=columns_turned(z.dim, quant_group, chosen.warps) if turning else 0,
        num_warps=chosen.warps,
    )  # fmt: skip
    if chosen.columns:
        warps = finish_warps(turning)
        kernel[(groups,)](
            **arguments, BLOCK=whole, PARTS=1, POOL=False, FINISH=True,
            COLUMNS=columns_turned(z.dim, quant_group, warps) if turning else 0, num_warps=warps,
        )  # fmt: skip
    return out


def allocate(
    kv: Tensor, cos: Tensor, weight: Tensor | None, norm: str, pool_dtype: torch.dtype, keep: bool
) -> Tensor:
    dtype = out_dtype(pool_dtype, weight, norm)
    return kv.new_empty((*cos.shape[:2], kv.shape[-1]) if keep else (0,), dtype=dtype)


def _window(
    x: Tensor, ends: Tensor | None, page: Tensor | None, first: int, width: int, ring: int
) -> Tensor:
    """Rows ``[B,N,W,D]`` at the positions ``ends + first + [0, width)``; x itself without ends."""
    if ends is None:
        return x
    at = ends.long().unsqueeze(-1) + torch.arange(first, first + width, device=x.device)
    at = at % ring if ring else at.clamp_min(0)
    batch = torch.arange(ends.shape[0], device=x.device).view(-1, 1)
    return x[(batch if page is None else page.long()).unsqueeze(-1), at]


def _absent(x: Tensor, count: int | torch.SymInt, value: float) -> Tensor:
    """The rows before entry n + 1, with rows of ``value`` before entry 0."""
    first = x.new_full((x.shape[0], 1, *x.shape[2:]), value)
    return torch.cat((first, x[:, : count - 1]), dim=1)


def reference(
    kv: Tensor, gate: Tensor, kv_before: Tensor | None, gate_before: Tensor | None,
    bias: Tensor | None, bias_before: Tensor | None, weight: Tensor | None, cos: Tensor,
    sin: Tensor, ends: Tensor | None, page: Tensor | None, *, width: int = 0, ring: int = 0,
    shifted: bool = False, masked: bool = False, narrow_bias: bool = False, pool_rounding: str,
    pool_dtype: torch.dtype, eps: float, norm: str, rope_rounding: str, precise: bool = False,
    quant_group: int = 0, quant_floor: float = 1e-4, quant_scale: str = "pow2",
    via: str = "div", quant_fp4: str = "", matrix: Tensor | None = None, factor: float = 1.0,
    cache: Tensor | None = None, slot: Tensor | None = None, seq: Tensor | None = None,
    slot_start: int = 0, seq_start: int = 0, flat_slot: bool = False, wrap: bool = True,
    keep: bool = True, spare: bool = False,
) -> Tensor:  # fmt: skip
    """Both ops in plain PyTorch, composed of atoms; writes ``cache`` in place if given."""
    z = check(kv, gate, kv_before, gate_before, bias, bias_before, cos, sin, ends, width=width,
              pool_rounding=pool_rounding, pool_dtype=pool_dtype, shifted=shifted,
              masked=masked)  # fmt: skip

    def biased(g: Tensor, b: Tensor | None) -> Tensor:
        if b is None:
            return g
        return g + b.to(g.dtype) if narrow_bias and not precise else g.float() + b.float()

    kv = _window(kv, ends, page, 1 - z.width, z.width, ring)
    gate = biased(_window(gate, ends, page, 1 - z.width, z.width, ring), bias)
    if kv_before is not None:
        first = 1 - 2 * z.width
        old = _window(kv_before, ends, page, first, z.width, ring)
        old_gate = biased(_window(gate_before, ends, page, first, z.width, ring), bias_before)
        if shifted:
            old, old_gate = _absent(old, z.count, 0.0), _absent(old_gate, z.count, float("-inf"))
        if masked:
            past = torch.arange(first, 1 - z.width, device=kv.device) + ends.unsqueeze(-1) < 0
            old_gate = old_gate.masked_fill(past.unsqueeze(-1), float("-inf"))
        kv, gate = torch.cat((old, kv), dim=2), torch.cat((old_gate, gate), dim=2)
    how = dict(rounding="once", dtype=torch.float32) if precise else dict(
        rounding=pool_rounding, dtype=pool_dtype)  # fmt: skip
    y = atoms.softmax_pool(kv, gate, **how)
    dtype = out_dtype(pool_dtype, weight, norm)
    check_turn(z, matrix, dtype, quant_group, quant_fp4)
    unrounded = precise and matrix is not None
    y = rows.reference_rows(
        y, cos, sin, weight, eps, norm, rope_rounding, precise,
        torch.float32 if unrounded else dtype,
    )  # fmt: skip
    y = y if matrix is None else turned(y, matrix, factor, precise, dtype).to(dtype)
    kw = dict(group=quant_group, floor=quant_floor, scale=quant_scale, via=via)
    if fp4_form(quant_fp4, quant_group, quant_scale):
        y = atoms.fake_quant(y, **kw, fp4=quant_fp4)
    elif quant_group:
        nope = z.dim - 2 * z.half
        y = torch.cat((atoms.fake_quant(y[..., :nope], **kw), y[..., nope:]), dim=-1)
    if cache is not None:
        last = cache[..., -1:, :].clone()
        if flat_slot:
            counted = slot_start + torch.arange(z.count, device=kv.device)[None, :]
            slot = counted if slot is None else slot
            seq, slot = rows.page_and_row(slot, cache.shape[0], cache.shape[-2], wrap)
        rows.write_rows(cache, y, slot, seq, slot_start, seq_start, wrap and not flat_slot)
        if spare:
            cache[..., -1:, :] = last
    return y.contiguous() if keep else y.new_empty((0,))


@torch.library.triton_op("dsv4fuse::compress_kv", mutates_args=())
def compress_kv(
    kv: Tensor, gate: Tensor, kv_before: Tensor | None, gate_before: Tensor | None,
    bias: Tensor | None, bias_before: Tensor | None, weight: Tensor | None, cos: Tensor,
    sin: Tensor, ends: Tensor | None, page: Tensor | None, matrix: Tensor | None = None, *,
    width: int = 0, ring: int = 0, shifted: bool = False, masked: bool = False,
    narrow_bias: bool = False, pool_rounding: str,
    pool_dtype: torch.dtype, eps: float, norm: str, rope_rounding: str, precise: bool = False,
    quant_group: int = 0, quant_floor: float = 1e-4, quant_scale: str = "pow2",
    via: str = "div", quant_fp4: str = "", factor: float = 1.0,
) -> Tensor:  # fmt: skip
    """Pooled, normed and turned entries, no cache: see the module's docstring."""
    run = reference if common.use_reference(kv) else launch
    return run(
        kv, gate, kv_before, gate_before, bias, bias_before, weight, cos, sin, ends, page,
        width=width, ring=ring, shifted=shifted, masked=masked, narrow_bias=narrow_bias,
        pool_rounding=pool_rounding, pool_dtype=pool_dtype, eps=eps, norm=norm,
        rope_rounding=rope_rounding, precise=precise, quant_group=quant_group,
        quant_floor=quant_floor, quant_scale=quant_scale, via=via, quant_fp4=quant_fp4,
        matrix=matrix, factor=factor,
    )  # fmt: skip


@torch.library.triton_op("dsv4fuse::compress_kv_cache", mutates_args=("cache",))
def compress_kv_cache(
    kv: Tensor, gate: Tensor, kv_before: Tensor | None, gate_before: Tensor | None,
    bias: Tensor | None, bias_before: Tensor | None, weight: Tensor | None, cos: Tensor,
    sin: Tensor, ends: Tensor | None, page: Tensor | None, cache: Tensor,
    slot: Tensor | None, seq: Tensor | None, matrix: Tensor | None = None, *, width: int = 0,
    ring: int = 0, shifted: bool = False, masked: bool = False, narrow_bias: bool = False,
    pool_rounding: str, pool_dtype: torch.dtype, eps: float, norm: str, rope_rounding: str,
    precise: bool = False, quant_group: int = 0, quant_floor: float = 1e-4,
    quant_scale: str = "pow2", via: str = "div", quant_fp4: str = "", factor: float = 1.0,
    slot_start: int = 0, seq_start: int = 0, flat_slot: bool = False, wrap: bool = True,
    keep: bool = True, spare: bool = False,
) -> Tensor:  # fmt: skip
    """The entries, and into the cache: see the module's docstring."""
    run = reference if common.use_reference(kv) else launch
    return run(
        kv, gate, kv_before, gate_before, bias, bias_before, weight, cos, sin, ends, page,
        width=width, ring=ring, shifted=shifted, masked=masked, narrow_bias=narrow_bias,
        pool_rounding=pool_rounding, pool_dtype=pool_dtype, eps=eps, norm=norm,
        rope_rounding=rope_rounding, precise=precise, quant_group=quant_group,
        quant_floor=quant_floor, quant_scale=quant_scale, via=via, quant_fp4=quant_fp4,
        matrix=matrix, factor=factor, cache=cache, slot=slot, seq=seq, slot_start=slot_start,
        seq_start=seq_start, flat_slot=flat_slot, wrap=wrap, keep=keep, spare=spare,
    )  # fmt: skip


@compress_kv_cache.register_fake
def _(*tensors, **how):
    return _fake(*tensors[:11], *tensors[14:], **how)


@compress_kv.register_fake
def _fake(kv, gate, kv_before, gate_before, bias, bias_before, weight, cos, sin, ends, page,
          matrix=None, *, width=0, shifted=False, masked=False, pool_rounding, pool_dtype, norm,
          quant_group=0, quant_fp4="", keep=True, **_):
    z = check(kv, gate, kv_before, gate_before, bias, bias_before, cos, sin, ends, width=width,
              pool_rounding=pool_rounding, pool_dtype=pool_dtype, shifted=shifted,
              masked=masked)  # fmt: skip
    out = allocate(kv, cos, weight, norm, pool_dtype, keep)
    check_turn(z, matrix, out.dtype, quant_group, quant_fp4)
    return out


def traffic(kv: Tensor, gate: Tensor, cos: Tensor, *, entries: int, rows: int, out: Tensor) -> int:
    """Bytes that must move: ``rows`` of kv and gate for each entry, the tables, the entry."""
    row = kv.shape[-1] * (kv.element_size() + gate.element_size())
    return entries * (rows * row + out.shape[-1] * out.element_size()) + 2 * common.nbytes(cos)
