"""The pairs of a token and an expert, sorted by expert: a counting sort of one launch.

Math     ``values, order = sort(ids, stable=True)``; ``inverse[order[i]] = i``; ``ends[e]``: how
         many ids are not above e; ``counts[e]``: how many are e. ends without the ``negative``
         ids, as they come of counts, or with them, as a binary search counts. ``narrow``: ends and
         counts are those of ``ids.to(int32)``.
Shapes   ids ``[S]``, S below 2^30 and possibly 0; values, order and inverse ``[S]``; ends and
         counts ``[experts]``; ``experts ≤ bins``, ``1 ≤ bins ≤ 1024``.
Dtypes   ids int32 or int64, and values as they; order and inverse int64; ends and counts int32 or
         int64, as their arguments say. What is not asked for (``values``, ``inverse`` False;
         ``ends``, ``counts`` None) is an empty tensor.
Strides  any, 0 included; results are dense.
Range    Any numbers are sorted. From 0 to ``bins`` (which stands for an expert elsewhere) each has
         a program of its own, so that their order takes neither atomics nor scratch; those outside
         are ranked one at a time, in a time that grows as the square of S where there is any.
Order    Equal ids stay in their order, in every launch: the bits do not hang on the launch.
Errors   ValueError for other shapes and dtypes, or more bins or ids than these.
Source   vLLM's and SGLang's moe_align_block_size, which sort by expert in front of their products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common as common
from ._common import Config, long
from ._launch import wrap_triton
from ._stores import stores

MOST = 1024  # bins
INTEGERS = (torch.int32, torch.int64)
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# By the number of ids: a block of ``rows`` of them at a time. One block is read once. Four ids a
# thread: of several blocks, eight take 128 registers and spill.
CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (32, Config(rows=32, warps=1)),
    (128, Config(rows=128, warps=1)),
    (512, Config(rows=512, warps=4)),
    (None, Config(rows=1024, warps=8)),
)


@triton.jit
def _bins(v, live, BINS: tl.constexpr):
    """int32 that order as the numbers do, but for those outside: -1 and BINS + 1 stand for them.
    What is not there is behind all."""
    bounded = tl.minimum(tl.maximum(v, -1), BINS + 1).to(tl.int32)
    return tl.where(live, bounded, BINS + 2)


@triton.jit
def _counted(v, bin, live, BINS: tl.constexpr, NARROW: tl.constexpr):
    """The bins by which ends and counts go."""
    if NARROW:
        return _bins(v.to(tl.int32), live, BINS)
    else:
        return bin


@triton.jit
def _up_to(bin, own, NEGATIVE: tl.constexpr):
    if NEGATIVE:
        return (bin <= own).to(tl.int32)
    else:
        return ((bin <= own) & (bin >= 0)).to(tl.int32)


@triton.jit
def _placed(v, at, to, mine, values_ptr, order_ptr, inverse_ptr,
            VALUES: tl.constexpr, INVERSE: tl.constexpr):  # fmt: skip
    if VALUES:
        tl.store(values_ptr + to, v, mask=mine)
    tl.store(order_ptr + to, at, mask=mine)
    if INVERSE:
        tl.store(inverse_ptr + at, to, mask=mine)


@triton.jit
def _in_front(other, i, v, at, own, BINS: tl.constexpr):
    """Is the i-th id one of this bin, whose numbers may differ, and in front of each of these?"""
    bin = tl.minimum(tl.maximum(other, -1), BINS + 1).to(tl.int32)
    return (bin == own) & ((other < v) | ((other == v) & (i < at)))


@stores(
    "order_ptr", values_ptr="VALUES", inverse_ptr="INVERSE", ends_ptr="ENDS", counts_ptr="COUNTS"
)
@triton.jit(do_not_specialize=("count",))
def expert_sort_kernel(
    ids_ptr, values_ptr, order_ptr, inverse_ptr, ends_ptr, counts_ptr, count, step,
    BINS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    VALUES: tl.constexpr, INVERSE: tl.constexpr, ENDS: tl.constexpr, COUNTS: tl.constexpr,
    NEGATIVE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """One program: the numbers of one bin. WHOLE: all ids are one block.

    Ids are loaded here alone: or torch, by which the tests check @stores, would read that they are
    written (NOTES.md).
    """
    own = tl.program_id(0) - 1
    lane = tl.arange(0, BLOCK)
    v = tl.load(ids_ptr + lane.to(tl.int64) * step, mask=lane < count, other=0)
    bin = _bins(v, lane < count, BINS)
    counted = _counted(v, bin, lane < count, BINS, NARROW)
    smaller, up_to = (bin < own).to(tl.int32), _up_to(counted, own, NEGATIVE)
    equal = (counted == own).to(tl.int32)
    if not WHOLE:
        # Unrolled, for the loads to be under way together: there is no barrier in between.
        for start in tl.range(BLOCK, count, BLOCK, loop_unroll_factor=4):
            at = start + lane
            w = tl.load(ids_ptr + at.to(tl.int64) * step, mask=at < count, other=0)
            other = _bins(w, at < count, BINS)
            smaller += (other < own).to(tl.int32)
            other = _counted(w, other, at < count, BINS, NARROW)
            up_to += _up_to(other, own, NEGATIVE)
            equal += (other == own).to(tl.int32)
    if (own >= 0) & (own < EXPERTS):
        if ENDS:
            tl.store(ends_ptr + own, tl.sum(up_to, axis=0))
        if COUNTS:
            tl.store(counts_ptr + own, tl.sum(equal, axis=0))
    first = tl.sum(smaller, axis=0)
    apart = (own < 0) | (own > BINS)
    for start in range(0, BLOCK if WHOLE else count, BLOCK):
        at = start + lane
        if not WHOLE:
            v = tl.load(ids_ptr + at.to(tl.int64) * step, mask=at < count, other=0)
            bin = _bins(v, at < count, BINS)
        mine = bin == own
        here = tl.sum(mine.to(tl.int32), axis=0)
        if here > 0:
            if apart:
                to = tl.zeros((BLOCK,), tl.int32)
                for i in range(0, count):
                    other = tl.load(ids_ptr + long(i) * step)
                    to += (_in_front(other, i, v, at, own, BINS) & mine).to(tl.int32)
            else:
                to = tl.cumsum(mine.to(tl.int32), axis=0) - 1
            to += first
            _placed(v, at, to, mine, values_ptr, order_ptr, inverse_ptr, VALUES, INVERSE)
            first += tl.where(apart, 0, here)


def _check(
    ids: Tensor, bins: int, experts: int, ends: torch.dtype | None, counts: torch.dtype | None
) -> None:
    common.require(ids.dim() == 1, "ids must be [S]")
    common.require(ids.dtype in INTEGERS, "ids must be int32 or int64")
    common.require(1 <= bins <= MOST, f"{bins} experts are not 1 to {MOST}")
    common.require(0 <= experts <= bins, f"ends of {experts} experts, of {bins}")
    kinds = (None, *INTEGERS)
    common.require(ends in kinds and counts in kinds, "ends and counts must be int32 or int64")
    large = isinstance(ids.shape[0], int) and ids.shape[0] >= 1 << 30
    common.require(not large, "there are 2^30 ids or more")


def _empty(
    ids: Tensor, experts: int, ends: torch.dtype | None, counts: torch.dtype | None, values: bool,
    inverse: bool,
) -> Outputs:  # fmt: skip
    order = ids.new_empty(ids.shape, dtype=torch.int64)
    return (
        ids.new_empty(ids.shape if values else (0,)),
        order,
        order.new_empty(order.shape if inverse else (0,)),
        *(ids.new_empty((experts if d else 0,), dtype=d or torch.int32) for d in (ends, counts)),
    )  # type: ignore[return-value]


def reference(
    ids: Tensor, *, bins: int, experts: int = 0, ends: torch.dtype | None = None,
    counts: torch.dtype | None = None, values: bool = True, inverse: bool = True,
    negative: bool = False, narrow: bool = False,
) -> Outputs:  # fmt: skip
    """``expert_sort`` in plain PyTorch."""
    found = _empty(ids, experts, ends, counts, values, inverse)
    held, order = ids.sort(stable=True)
    counted = ids.to(torch.int32).sort().values if narrow else held
    every = torch.arange(experts, device=ids.device, dtype=counted.dtype)
    below, above = (torch.searchsorted(counted, every, right=right) for right in (False, True))
    hidden = 0 if negative else (counted < 0).sum()
    if inverse:
        found[2].scatter_(0, order, torch.arange(ids.shape[0], device=ids.device))
    return (
        held if values else found[0],
        order,
        found[2],
        (above - hidden).to(ends) if ends else found[3],
        (above - below).to(counts) if counts else found[4],
    )


@torch.library.triton_op("dsv4fuse::expert_sort", mutates_args=())
def expert_sort(
    ids: Tensor, *, bins: int, experts: int = 0, ends: torch.dtype | None = None,
    counts: torch.dtype | None = None, values: bool = True, inverse: bool = True,
    negative: bool = False, narrow: bool = False,
) -> Outputs:  # fmt: skip
    """values, order, inverse, ends, counts: see the module's docstring."""
    _check(ids, bins, experts, ends, counts)
    if common.use_reference(ids):
        return reference(ids, bins=bins, experts=experts, ends=ends, counts=counts, values=values,
                         inverse=inverse, negative=negative, narrow=narrow)  # fmt: skip
    found = _empty(ids, experts, ends, counts, values, inverse)
    size = ids.shape[0]
    config = common.launch_config(CONFIGS, size)
    held, order, inverted, ended, counted = found
    wrap_triton(expert_sort_kernel)[(bins + 3,)](
        ids, held if values else ids, order, inverted if inverse else ids,
        ended if ends else ids, counted if counts else ids, size, *common.strides(ids),
        BINS=bins, EXPERTS=experts, BLOCK=config.rows,
        WHOLE=isinstance(size, int) and size <= config.rows, VALUES=values, INVERSE=inverse,
        ENDS=ends is not None, COUNTS=counts is not None, NEGATIVE=negative,
        NARROW=narrow and ids.dtype != torch.int32, num_warps=config.warps,
    )  # fmt: skip
    return found


@expert_sort.register_fake
def _(ids, *, bins, experts=0, ends=None, counts=None, values=True, inverse=True, **_):
    _check(ids, bins, experts, ends, counts)
    return _empty(ids, experts, ends, counts, values, inverse)
