"""The op that launches the Hopper attention kernel, and which launches are its."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _common as common
from . import _hopper as hopper
from ._common import cdiv
from ._flash_arguments import Keys, Mask, arguments, live_tiles, some
from ._launch import opaque

KERNEL = ("_flash_hopper", "hopper_attention_kernel")
REGISTERS = 88  # of a thread that loads


def takes(q: Tensor, keys: Keys, rows: int, block: int, splits: int, live: int) -> bool:
    """Is this launch the Hopper kernel's? ``rows`` of a program, of them ``live`` of heads that
    there are, ``block`` keys of a tile, a program's keys in so many ``splits``."""
    return refusal(q, keys, rows, block, splits, live) is None


def refusal(q: Tensor, keys: Keys, rows: int, block: int, splits: int, live: int) -> str | None:
    """Why it is not, or None."""
    if (why := hopper.refusal(q.device, kernel())) is not None:
        return why
    if q.shape[3] != 512:
        return "It is for heads of 512 lanes."
    if rows != 64 or block != 64:
        return "Its programs have 64 rows, heads of one token or of several, and tiles of 64 keys."
    if splits > 2 and 4 * live <= rows:
        return "There are few programs, and most of their rows would be empty."
    steps = (s for t in (q, keys.kv, keys.far) if t is not None for s in t.stride()[:-1])
    if any(common.size_hint(s) % 16 for s in steps):
        return "Rows do not start at multiples of 32 bytes."
    return None


def kernel() -> Any:
    return hopper.gluon_kernel(*KERNEL)


def launch(
    q: Tensor, keys: Keys, mask: Mask | None, sinks: Tensor, numbers: tuple[Tensor, Tensor] | None,
    out: Tensor, parts: tuple[Tensor, Tensor] | None, **how: Any,
) -> None:  # fmt: skip
    """numbers: the live tiles and their counts, if they were listed. parts: where the splits'
    accumulators and the maxima with the denominators go, instead of a result to ``out``."""
    torch.ops.dsv4fuse.attention_hopper(
        q, keys.kv, keys.far, keys.index, keys.page, mask.tensor if mask else None, sinks,
        *(numbers or (None, None)), *((None, *parts) if parts else (out, None, None)),
        wrap=keys.wrap, mask_kind=mask.kind if mask else "add",
        fill=mask.fill if mask and mask.fill > -math.inf else None, **how,
    )  # fmt: skip


@torch.library.custom_op("dsv4fuse::attention_hopper", mutates_args=("out", "part", "stat"))
def attention_hopper(
    q: Tensor, kv: Tensor | None, far: Tensor | None, index: Tensor | None, page: Tensor | None,
    mask: Tensor | None, sinks: Tensor, tiles: Tensor | None, counts: Tensor | None,
    out: Tensor | None, part: Tensor | None, stat: Tensor | None,
    *, wrap: bool, mask_kind: str, fill: float | None, scale: float, rounded: str, wide: bool,
    nan_empty: bool, tokens: int, width: int, splits: int,
) -> None:  # fmt: skip
    """``launch``; opaque, for a graph of torch takes launches of Triton kernels only."""
    q = hopper.aligned(q)
    keys = Keys(*(None if t is None else hopper.aligned(t) for t in (kv, far)), index, page, wrap)
    hidden = -math.inf if fill is None else fill
    shared = arguments(
        q, keys, None if mask is None else Mask(mask, mask_kind, hidden), sinks, out, scale=scale,
        rounded=rounded, wide=wide, nan_empty=nan_empty, tokens=tokens, width=width,
    )  # fmt: skip
    count = q.shape[0] * shared["blocks"] * cdiv(q.shape[2], width)
    opaque(kernel())[(min(count * splits, hopper.processors(q.device)),)](
        **shared, **live_tiles((tiles, counts), q), most=cdiv(keys.near, 64), parts=count,
        splits=splits, part_ptr=some(part, q), stat_ptr=some(stat, q), SPLIT=splits > 1,
        REGISTERS=REGISTERS, num_warps=8,
    )  # fmt: skip


@attention_hopper.register_fake
def _(q, *_, **__):
    return None
