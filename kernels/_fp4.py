"""fp4 (e2m1) in the kernels: rounded and widened again, for no value leaves them in it."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4fuse import atoms

from ._common import abs_max, block_scale, divide, min_nan, require


def fp4_form(fp4: str, group: int, scale: str) -> int:
    """The kernels' number for a form of ``atoms.e2m1``, 0 for none; ValueError for no such form."""
    if not fp4:
        return 0
    require(fp4 in atoms.E2M1, f"no form {fp4!r} of e2m1; there are {', '.join(atoms.E2M1)}")
    require(group > 0 and scale == "pow2", "fp4 has groups, with powers of two for scales")
    return atoms.E2M1.index(fp4) + 1


@triton.jit
def e2m1(v, FORM: tl.constexpr):
    """``atoms.e2m1`` of fp32: a sum with 2^23 times the step leaves whole steps, ties to even."""
    bits = v.to(tl.uint32, bitcast=True)
    a = min_nan((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), 6.0)
    whole = tl.where(a < 2.0, 4194304.0, tl.where(a < 4.0, 8388608.0, 16777216.0))
    q = (a + whole) - whole
    if FORM > 3:
        q = tl.where(v == v, q, 6.0 if FORM > 6 else 0.0)
    sign = bits & 0x80000000
    if FORM % 3 == 2:
        sign = tl.where(v < 0.0, sign, 0)
    if FORM % 3 == 0:
        sign = tl.where((v < 0.0) & (q > 0.0), sign, 0)
    return (q.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def fake_fp4(y, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, FLOOR: tl.constexpr,
             VIA_MUL: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    """``atoms.fake_quant`` to fp4 of fp32 rows ``[ROWS, BLOCK]``."""
    blocks = tl.reshape(y, (ROWS, BLOCK // GROUP, GROUP))
    scale = block_scale(abs_max(blocks, 2), FLOOR, True, VIA_MUL, 6.0)[:, :, None]
    return tl.reshape(e2m1(divide(blocks, scale, True, False), FORM) * scale, (ROWS, BLOCK))
