"""Arithmetic that the kernels share, against every operand there is."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from dsv4fuse.kernels._common import cdiv, divide

from ._kernels import BF16, DEVICE, FP16, FP32, GPU, MARKS

pytestmark = MARKS
EVERY = 1 << 23  # significands of fp32
# A Triton interpreter divides as NumPy does: a few there, so that the test itself is run.
COUNT = EVERY if GPU else 1 << 10


@triton.jit
def _differing(x_ptr, found_ptr, count, step, POW2: tl.constexpr, BLOCK: tl.constexpr):
    """How many quotients of x by the scales 1 ≤ s < 2 are not the IEEE ones."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = (0x3F800000 + at * step).to(tl.float32, bitcast=True)
    x = tl.load(x_ptr + tl.program_id(1) + at * 0).to(tl.float32)
    wrong = (divide(x, s, POW2, False, True) != tl.div_rn(x, s)) & (at < count)
    tl.atomic_add(found_ptr, tl.sum(wrong.to(tl.int64), axis=0))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_one_correction_divides_every_16_bit_value(dtype):
    """Each significand of 8 or 11 bits by each of fp32's; exponents only scale the quotient."""
    x = torch.arange(1, 2, torch.finfo(dtype).eps, dtype=FP32, device=DEVICE).to(dtype)
    x = x if GPU else x[:: len(x) // 8]
    found = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _differing[(cdiv(COUNT, 1024), len(x))](x, found, COUNT, EVERY // COUNT, False, BLOCK=1024)
    assert found.item() == 0
    if GPU:  # the count counts: an uncorrected product by the reciprocal is off in a quarter
        _differing[(cdiv(COUNT, 1024), len(x))](x, found, COUNT, 1, True, BLOCK=1024)
        assert found.item() > len(x) * COUNT // 8
