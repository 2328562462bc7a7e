"""The experts' grouped product: a weight is read once, as fast as it comes.

Math     ``out[m] = x[m] @ w[e]`` for ``ends[e - 1] ≤ m < ends[e]``, ``ends[-1]`` counting as 0.
Shapes   x ``[S,K]``, w ``[E,K,N]``, ends ``[E]``; out ``[S,N]``. ``E ≤ 4096``.
Dtypes   x, w, out bf16; ends int32.
Strides  x any; w any (a transposed ``[E,N,K]`` is read along K); out is dense.
Rounding products are summed in fp32 and rounded once, as torch's grouped product does.
Rows     from the last of ends on are left as they are, whatever is there; so are those of torch.
Errors   ValueError for other shapes, dtypes or more experts.
Source   vLLM's and SGLang's fused_moe: programs are handed the tiles of experts that have rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common as common
from ._common import INTERPRET, narrow
from ._launch import wrap_triton
from ._projection import Tile
from ._stores import stores

# By rows for each expert: a tile holds most experts' rows, so that a weight is read once.
TILES: tuple[tuple[int | None, Tile], ...] = (
    (8, Tile(16, 128, 64, 4, 5)),
    (24, Tile(32, 128, 64, 4, 4)),
    (48, Tile(64, 128, 64, 4, 4)),
    (96, Tile(128, 128, 64, 8, 3)),
    (None, Tile(128, 256, 64, 8, 3)),
)


@triton.jit
def tile_of(every, starts, ends, j, ROWS: tl.constexpr):
    """(expert, its first row in tile j, behind its last) of the j-th tile of all experts' rows."""
    tiles = (tl.maximum(ends - starts, 0) + ROWS - 1) // ROWS
    behind = tl.cumsum(tiles, axis=0)
    this = (j < behind) & (j >= behind - tiles)
    first = starts + (j - behind + tiles) * ROWS
    return (tl.sum(tl.where(this, every, 0), axis=0), tl.sum(tl.where(this, first, 0), axis=0),
            tl.sum(tl.where(this, ends, 0), axis=0))  # fmt: skip


@stores("out_ptr")
@triton.jit(do_not_specialize=("rows",))
def expert_mm_kernel(
    x_ptr, w_ptr, ends_ptr, out_ptr, rows, x_ss, x_sk, w_se, w_sk, w_sn,
    K: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of an expert's rows by COLUMNS of its weight, transposed: the weight has 64 rows for
    the tensor cores, a row of x is one of their columns."""
    # Loaded here: or torch, by which the tests check @stores, would read that ends are written.
    every = tl.arange(0, BE)
    ends = tl.load(ends_ptr + every, mask=every < E, other=0)
    starts = tl.load(ends_ptr + every - 1, mask=(every > 0) & (every < E), other=0)
    e, first, last = tile_of(every, starts, ends, tl.program_id(0) // PARTS, ROWS)
    last = tl.minimum(last, rows)
    if first < last:
        n = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
        m, k = first + tl.arange(0, ROWS), tl.arange(0, DEPTH)
        live, there = (m < last)[None, :], (n < N)[:, None]
        w_at = w_ptr + e.to(tl.int64) * w_se + n.to(tl.int64)[:, None] * w_sn + k[None, :] * w_sk
        x_at = x_ptr + m.to(tl.int64)[None, :] * x_ss + k[:, None] * x_sk
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
        for start in range(0, K, DEPTH):
            inside = start + k < K
            w = tl.load(w_at + start * w_sk, mask=there & inside[None, :], other=0.0)
            x = tl.load(x_at + start * x_sk, mask=live & inside[:, None], other=0.0)
            if INTERPRET:  # whose dot takes bf16 for integers
                w, x = w.to(tl.float32), x.to(tl.float32)
            acc = tl.dot(w, x, acc)
        at = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(at, narrow(acc, out_ptr.dtype.element_ty), mask=live & there)


def _check(x: Tensor, w: Tensor, ends: Tensor) -> None:
    common.require(x.dim() == 2 and w.dim() == 3, "x must be [S, K] and w [E, K, N]")
    common.require(x.shape[1] == w.shape[1], "the last axis of x is not the weights'")
    common.require(tuple(ends.shape) == (w.shape[0],), "ends must have one number for each expert")
    common.require(x.dtype == w.dtype == torch.bfloat16, "x and w must be bf16")
    common.require(ends.dtype == torch.int32 and ends.stride(0) == 1, "ends must be dense int32")


def launch(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    rows, (experts, depth, columns) = x.shape[0], w.shape
    common.require_static(experts=experts, K=depth, N=columns)
    common.require(experts <= 4096, f"{experts} experts are more than 4096")
    out = x.new_empty((rows, columns))
    t = common.launch_config(TILES, common.size_hint(rows) // experts)
    width = min(t.columns, max(16, triton.next_power_of_2(columns)))
    step = min(t.lanes, max(16, triton.next_power_of_2(depth)))
    parts, most = triton.cdiv(columns, width), rows // t.rows + experts
    tiles = most if isinstance(rows, torch.SymInt) else max(1, min(rows, most))
    wrap_triton(expert_mm_kernel)[(tiles * parts,)](
        x, w, ends, out, rows, *common.strides(x), *common.strides(w), K=depth, N=columns,
        E=experts, BE=triton.next_power_of_2(experts), PARTS=parts, ROWS=t.rows, COLUMNS=width,
        DEPTH=step, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out


def reference(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """``expert_mm`` in plain PyTorch: torch's own."""
    return torch.ops.aten._grouped_mm.default(x, w, ends)


@torch.library.triton_op("dsv4fuse::expert_mm", mutates_args=())
def expert_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """``[S,N]``: see the module's docstring."""
    _check(x, w, ends)
    return reference(x, w, ends) if common.use_reference(x) else launch(x, w, ends)


@expert_mm.register_fake
def _(x, w, ends):
    _check(x, w, ends)
    return x.new_empty((x.shape[0], w.shape[2]))
