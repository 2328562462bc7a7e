"""Terms run as programs of PyTorch, and the bit patterns that they are run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4fuse import atoms
from dsv4fuse.terms import Term

E4M3, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
FP32, FP64 = torch.float32, torch.float64
BITS = {E4M3: torch.uint8, BF16: torch.int16, FP16: torch.int16, FP32: torch.int32}
FLOATS = (BF16, FP16, FP32)

# ---- terms as programs of PyTorch --------------------------------------------------------------

OPS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg,
    "abs": torch.abs, "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal,
    "sigmoid": torch.sigmoid, "where": torch.where, "ceil": torch.ceil, "floor": torch.floor,
    "log1p": torch.log1p, "cos": torch.cos, "sin": torch.sin, "remainder": torch.remainder,
    "round": torch.round, "trunc": torch.trunc, "sign": torch.sign, "copysign": torch.copysign,
    "logical_not": torch.logical_not, "logical_and": torch.logical_and,
    "logical_or": torch.logical_or, "bitwise_and": torch.bitwise_and,
    "bitwise_or": torch.bitwise_or, "bitwise_not": torch.bitwise_not,
    "eq": torch.eq, "ne": torch.ne, "gt": torch.gt, "ge": torch.ge, "lt": torch.lt, "le": torch.le,
}  # fmt: skip


def evaluate(t: Term, env: dict[Term, Tensor]) -> Any:
    """The term's value as the graph would compute it, each operation rounding to its dtype."""
    if t.op == "load":
        return env[t]
    if t.op == "const":
        return t.args[0]
    if t.op == "fold":
        return getattr(torch, t.args[0])(evaluate(t.args[1], env), t.args[2]).to(t.dtype)
    args = [evaluate(a, env) for a in t.args]
    if t.op == "cast":
        return args[0].to(t.dtype)
    if t.op == "e2m1":
        return atoms.e2m1(args[0], form=atoms.E2M1[int(args[1])])
    if t.op in ("minimum", "maximum"):
        a, b = args if isinstance(args[0], Tensor) else args[::-1]
        if isinstance(b, Tensor):
            out = getattr(torch, t.op)(a, b)
        else:
            out = a.clamp_max(b) if t.op == "minimum" else a.clamp_min(b)
    else:
        out = OPS[t.op](*args)
    return out if out.dtype in (t.dtype, torch.bool) else out.to(t.dtype)


def every(dtype: torch.dtype) -> Tensor:
    """All bit patterns of an 8- or 16-bit float."""
    bits = 8 if dtype is E4M3 else 16
    return torch.arange(1 << bits, dtype=torch.int32).to(BITS[dtype]).view(dtype)


def specials(dtype: torch.dtype) -> Tensor:
    """Zeros, the smallest and largest subnormals and normals, ties, infinities, NaN; both signs."""
    f = torch.finfo(dtype)
    least = torch.ones((), dtype=BITS[dtype]).view(dtype).double().item()
    inf = [] if dtype is E4M3 else [float("inf")]
    some = [0.0, least, f.tiny - least, f.tiny, f.eps, 0.5, 1.0, 1 + f.eps, 1 + 2 * f.eps, 1.5, 2.0,
            3.0, 10.0, 87.5, 448.0, 1 / 3, f.max / 2, f.max, *inf, float("nan")]  # fmt: skip
    t = torch.tensor(some, dtype=FP64)
    return torch.cat((t, -t)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> None:
    """Equal bit for bit, signed zeros included; any NaN equals any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    x, y = a.double(), b.double()
    wrong = ~((x == y) & (x.signbit() == y.signbit()) | x.isnan() & y.isnan())
    assert not wrong.any(), f"{x[wrong][:5].tolist()} against {y[wrong][:5].tolist()}"
