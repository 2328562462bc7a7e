"""compress_kv in plain PyTorch, composed of atoms."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms

from . import norm_rope_cache as rows
from ._fp4 import fp4_form
from ._norms import out_dtype
from ._turn import turned
from ._windows import check, check_turn


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
