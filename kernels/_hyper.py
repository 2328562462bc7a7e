"""Launches of the hyper-connections' kernels.

Two of them. ``mixes_kernel`` multiplies the flattened streams by ``fn`` in pieces of K, with the
sum of squares as one more column; ``finish_kernel`` adds the pieces and makes of each token's
mixes its collapsed streams (and their RMSNorm), ``post`` and ``comb``. How K is cut and in which
order its pieces are added depends on K alone: a row has the same bits in any batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from . import _common as common
from ._hyper_finish import finish_kernel
from ._hyper_mixes import mixes_kernel, split_kernel
from ._launch import wrap_triton

BF16, F32 = torch.bfloat16, torch.float32
STREAMS = 4  # hc_mult that the kernels are written for
OUTPUTS = STREAMS * (2 + STREAMS)
GROUPS = 8  # at most; groups of pieces that large batches add inside a program
TOKENS = 64  # per program of the product: the narrowest tile of a warp group's MMA
STEP = 128  # of K at a time: a piece


@dataclass(frozen=True)
class Cut:
    """K as ``groups`` × ``chunks`` pieces of ``step``."""

    groups: int
    chunks: int
    step: int


def cut(width: int) -> Cut:
    """How the flattened streams of ``width`` each are cut: by the width alone."""
    step = min(STEP, width & -width)
    pieces = STREAMS * width // step
    groups = min(GROUPS, pieces & -pieces)
    return Cut(groups, pieces // groups, step)


@dataclass(frozen=True)
class Launch:
    """The two launches at some number of tokens.

    ``whole``: a program of the product adds a whole group of pieces; ``ready``: fn is split into
    bf16 by a launch of its own, which pays off where many programs read it; ``rows``: tokens per
    program of post and comb; ``columns``: of y per program, where no norm asks for the whole row.
    """

    whole: bool
    rows: int
    columns: int
    warps: int
    ready: bool = False


LAUNCHES: tuple[tuple[int | None, Launch], ...] = (
    (64, Launch(whole=False, rows=1, columns=1024, warps=4)),
    (512, Launch(whole=False, rows=4, columns=4096, warps=4)),
    (None, Launch(whole=True, rows=32, columns=4096, warps=4, ready=True)),
)
NORM_WARPS = 8  # one number for any batch: the order of the norm's sum hangs on it


@dataclass(frozen=True)
class Norm:
    """The RMSNorm of the collapsed streams: ``atoms.rms_norm``'s arguments."""

    weight: Tensor | None
    eps: float
    rounding: str


def launch(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float,
    iters: int, norm: Norm | None, y: Tensor | None, normed_y: Tensor | None,
    post: Tensor | None, comb: Tensor | None, precise: bool,
) -> None:  # fmt: skip
    """Fill y ``[T,D]`` (or None), its norm, post ``[T,4]`` and comb ``[T,4,4]`` (None: a head)."""
    tokens, streams, d = x.shape
    common.require_static(streams=streams, hidden=d)
    outputs = fn.shape[0]
    n = triton.next_power_of_2(outputs + 1)
    config, c = _config(x), cut(d)
    partial = _partial(x, fn, config, n)
    block = triton.next_power_of_2(d)
    block = block if norm is not None else max(64, min(config.columns, block))
    weights = 0 if post is None else common.cdiv(tokens, config.rows)
    some = x if y is None else y
    wrap_triton(finish_kernel)[(weights + tokens * math.ceil(d / block),)](
        x, partial, scale, base, x if norm is None or norm.weight is None else norm.weight,
        some, some if normed_y is None else normed_y, some if post is None else post,
        some if comb is None else comb, tokens, weights, *common.strides(x)[:2],
        D=d, BLOCK=block, OUT=outputs, N=n, GROUPS=c.groups, CHUNKS=1 if config.whole else c.chunks,
        ROWS=config.rows,
        ITERS=iters, NORM_EPS=norm_eps, EPS=eps,
        NORM=common.NORMS[norm.rounding] if norm else 0, Y_EPS=norm.eps if norm else 0.0,
        HAS_W=norm is not None and norm.weight is not None, KEEP_Y=y is not None, PRECISE=precise,
        WEIGHTS=post is not None,
        num_warps=NORM_WARPS if norm is not None else 1 if block < 256 else config.warps,
    )  # fmt: skip


def _partial(x: Tensor, fn: Tensor, config: Launch, n: int) -> Tensor:
    """The product in pieces of K, ``[pieces, T, n]``; the sum of squares behind its columns."""
    tokens, _, d = x.shape
    c = cut(d)
    parts = c.groups if config.whole else c.groups * c.chunks
    partial = x.new_empty((parts, tokens, n), dtype=torch.float32)
    factor = thirds_of(fn) if config.ready else fn
    wrap_triton(mixes_kernel)[(parts * common.cdiv(tokens, TOKENS),)](
        x, factor, partial, tokens, *common.strides(x)[:2], common.strides(factor)[-2],
        D=d, OUT=fn.shape[0], N=n, STEP=c.step, CHUNKS=c.chunks if config.whole else 1,
        PARTS=parts, TOKENS=TOKENS, READY=config.ready, num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial


def _config(x: Tensor) -> Launch:
    found = common.launch_config(LAUNCHES, x.shape[0])
    return found if x.dtype == torch.bfloat16 else replace(found, ready=False)


def thirds_of(fn: Tensor) -> Tensor:
    """fn ``[m, K]`` as three bf16 ``[3, m, K]`` whose sum it is."""
    made = fn.new_empty((3, *fn.shape), dtype=torch.bfloat16)
    size, block = fn.shape[0] * fn.shape[1], 1024
    wrap_triton(split_kernel)[(common.cdiv(size, block),)](
        fn, made, size, common.strides(fn)[0], K=fn.shape[1], BLOCK=block, num_warps=4
    )
    return made


def check(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, outputs: int) -> None:
    common.require(x.dim() == 3 and x.shape[1] == STREAMS, "the kernel is written for 4 streams")
    common.require(x.shape[2] % 64 == 0, f"a hidden size of {x.shape[2]} is no multiple of 64")
    common.require(x.dtype in common.FLOATS, "the streams must be bf16, fp16 or fp32")
    common.require(x.stride(-1) == 1, "the last axis of the streams must be dense")
    wanted = (outputs, STREAMS * x.shape[2])
    common.require(tuple(fn.shape) == wanted, f"fn is {tuple(fn.shape)} instead of {wanted}")
    common.require(fn.stride(-1) == 1, "the last axis of fn must be dense")
    common.require(scale.dim() == base.dim() == 1, "scale and base are vectors")
    common.require(base.shape[0] == outputs, f"base has {base.shape[0]} elements, not {outputs}")
