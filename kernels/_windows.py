"""The windows of compress_kv: their sizes, what is asked of them, how each is launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _common as common
from ._turn import check_matrix


@dataclass(frozen=True)
class Launch:
    """``columns`` per pooling program, the rest of the work in a second launch; 0: all in one.

    ``step``: rows of each window whose sums run on, ``tiles`` times as many loaded at a time, and
    while ``stages`` - 1 times as many are on their way; 0: a program holds all rows at once.
    """

    columns: int
    warps: int
    step: int = 0
    tiles: int = 4
    stages: int = 1


Launches = tuple[tuple[int | None, Launch], ...]  # bound on the count of windows → launch


@dataclass(frozen=True)
class Plan:
    """Windows of up to ``width`` rows (those before included), entries of up to ``dim`` channels,
    pooled with a rounding at each step or at the end."""

    width: int
    dim: int
    every: bool
    launches: Launches
    decoding: Launches = ()  # where of several tokens at most one wants a window, often none


# All that is compiled; the first plan that holds the sizes is taken. A narrow window with what
# follows it fits the registers of one program. Wide ones are cut into columns, so that an entry
# keeps many multiprocessors busy, each with all rows of its columns. In a decode step one program
# does each, a few rows at a time, and nothing waits for a second launch, where there are so few
# requests that most steps close none, and where there are enough for all multiprocessors. Measured
# on an H200 at 128 and 512 channels, which the models have; with "every", 2 warps are five times as
# fast as 4.
FEW, MANY = 8, 64  # requests
WHOLE = Launch(0, 8, 2)
CUT = ((64, Launch(32, 4)), (None, Launch(64, 4)))
PLANS = (
    Plan(8, 128, True, ((None, Launch(0, 1)),)),
    Plan(8, 128, False, ((None, Launch(0, 2, 1)),)),
    Plan(8, 512, True, ((None, Launch(0, 2)),)),
    Plan(8, 512, False, ((64, Launch(0, 4, 1)), (None, Launch(0, 2)))),
    Plan(8, 1024, True, ((None, Launch(0, 4)),)),
    Plan(8, 1024, False, ((None, Launch(0, 8)),)),
    Plan(128, 1024, True, CUT),
    Plan(128, 512, False, CUT, ((FEW, WHOLE), (MANY, Launch(32, 4)), (None, WHOLE))),
    Plan(128, 1024, False, CUT),
)
HELD = 128  # values of a matrix that a thread holds at a time


def finish_warps(turning: bool) -> int:
    """Of the second launch, a program for each entry: a matrix takes more than a row does."""
    return 4 if turning else 1


def columns_turned(dim: int, group: int, warps: int) -> int:
    """How many lanes of a row are turned at a time: whole groups, what the registers hold."""
    return min(dim, max(32, group, HELD * 32 * warps // dim))


def plan(width: int, dim: int, every: bool) -> Plan:
    """The first of ``PLANS`` for that many rows and channels; raises ValueError."""
    fits = (p for p in PLANS if width <= p.width and dim <= p.dim and every == p.every)
    found = next(fits, None)
    if found is None:
        largest = PLANS[-1]
        raise ValueError(
            f"a window of {width} rows of {dim} channels is larger than "
            f"{largest.width} of {largest.dim}, the largest that is compiled"
        )
    return found


@dataclass(frozen=True)
class Sizes:
    batch: int | torch.SymInt
    count: int | torch.SymInt  # entries of each
    width: int  # rows of a window
    before: int  # rows in front of those
    dim: int
    half: int  # pairs that are turned
    every: bool  # pooled with a rounding at each step


def sizes(
    kv: Tensor, kv_before: Tensor | None, cos: Tensor, width: int, pool_rounding: str
) -> Sizes:
    """``width`` counts the rows of a gathered window; of others kv says it."""
    batch, count = cos.shape[:2]
    width = kv.shape[2] if kv.dim() == 4 else width
    before = 0 if kv_before is None else width
    every = pool_rounding == "every"
    return Sizes(batch, count, width, before, kv.shape[-1], cos.shape[-1], every)


def check(
    kv: Tensor, gate: Tensor, kv_before: Tensor | None, gate_before: Tensor | None,
    bias: Tensor | None, bias_before: Tensor | None, cos: Tensor, sin: Tensor,
    ends: Tensor | None, *, width: int, pool_rounding: str, pool_dtype: torch.dtype,
    shifted: bool, masked: bool,
) -> Sizes:  # fmt: skip
    z = sizes(kv, kv_before, cos, width, pool_rounding)
    common.require(kv.dim() == (4 if ends is None else 3), "ends go with caches of rows, and only")
    common.require(z.dim % 16 == 0, f"head_dim {z.dim} is not a multiple of 16")
    common.require(0 < 2 * z.half <= z.dim, f"rope_dim {2 * z.half} is not within {z.dim}")
    common.require(cos.dtype == sin.dtype, "cos and sin differ in dtype")
    common.require(pool_rounding in ("once", "every"), f"no pool_rounding {pool_rounding!r} here")
    common.require(pool_rounding == "once" or pool_dtype == kv.dtype, "every: pool_dtype is kv's")
    common.require(not (shifted and masked), "rows before are shifted or masked, not both")
    common.require((kv_before is None) == (gate_before is None), "kv_before without gate_before")
    for name, t in (("kv", kv), ("gate", gate), ("kv_before", kv_before),
                    ("gate_before", gate_before)):  # fmt: skip
        common.require(t is None or t.dtype in common.FLOATS, f"{name} must be bf16, fp16 or fp32")
        common.require(t is None or t.stride(-1) == 1, f"the last axis of {name} must be dense")
        common.require(t is None or t.dim() == kv.dim() and t.shape[-1] == z.dim,
                       f"{name} is not shaped like kv")  # fmt: skip
    for name, t, count in (("kv", kv, z.count), ("gate", gate, z.count),
                           ("kv_before", kv_before, z.count - int(shifted)),
                           ("gate_before", gate_before, z.count - int(shifted))):  # fmt: skip
        fixed = t is not None and t.dim() == 4 and all(
            isinstance(n, int) for n in (*t.shape, z.batch, z.count)
        )
        fits = not fixed or t.shape[0] == z.batch and t.shape[1] >= count and t.shape[2] == z.width
        common.require(fits, f"{name} does not have {z.width} rows for each entry")
    for t, rows in ((bias, z.width), (bias_before, z.before)):
        fits = t is None or tuple(t.shape) == (rows, z.dim) and t.stride(-1) == 1
        common.require(fits, f"a bias must be [{rows}, {z.dim}], its last axis dense")
    common.require(z.before == 0 or (bias is None) == (bias_before is None), "half of a bias")
    return z


def check_turn(
    z: Sizes, matrix: Tensor | None, dtype: torch.dtype, group: int, fp4: str
) -> None:
    """Raises ValueError for a matrix that the kernel does not take."""
    if matrix is not None:
        power = isinstance(z.dim, int) and z.dim & (z.dim - 1) == 0
        common.require(power and 16 <= z.dim <= 512,
                       f"a matrix turns 16 to 512 lanes, a power of two, not {z.dim}")  # fmt: skip
        check_matrix(matrix, z.dim, dtype)
        common.require(not group or bool(fp4), "rows turned by a matrix are quantised to fp4 only")


def rows_of(ends: Tensor | None, filler: Tensor, **given: Tensor | None) -> dict[str, object]:
    """Pointers and strides of what holds the rows, which ``ends`` look for."""
    out: dict[str, object] = {}
    for name, t in given.items():
        out[f"{name}_ptr"] = filler if t is None else t
        out |= {f"{name}_ss": 0} | common.named_strides(t, name, "bsw" if ends is None else "bw")
    return out


def in_a_row(z: Sizes, *places: Tensor | None) -> bool:
    """Does a single batch hold many requests, each with its own page and place? A program takes a
    batch, and looks at its entries one after another: each request should be a batch then."""
    many = (
        t is not None and t.dim() == 2 and t.stride(1) != 0 and not common.is_one(t.shape[1])
        for t in places
    )
    return isinstance(z.batch, int) and z.batch == 1 and all(many)


def choose(z: Sizes, windows: int | torch.SymInt, decoding: bool) -> Launch:
    """The launch for that many windows, of the plan for those sizes; raises ValueError."""
    common.require_static(width=z.width, head_dim=z.dim, rope_dim=z.half)
    common.require(z.width & (z.width - 1) == 0 < z.width, f"{z.width} rows: not a power of two")
    found = plan(z.width + z.before, z.dim, z.every)
    return common.launch_config((decoding and found.decoding) or found.launches, windows)
