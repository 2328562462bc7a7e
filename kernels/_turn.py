"""Rows times a square matrix behind a rope: a Hadamard rotation, or any other that a graph holds.

``y = (x @ matrix) * factor`` for rows x of dtype X. The product is rounded to X where the matrix is
of that dtype and not where it is fp32, and again behind the factor; ``precise`` rounds neither.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common as common
from ._common import round_to


def check_matrix(matrix: Tensor | None, dim: int, dtype: torch.dtype) -> None:
    """Raises ValueError for a matrix that does not turn rows of that many lanes of that dtype."""
    if matrix is not None:
        common.require(matrix.shape == (dim, dim), f"the matrix must be {dim} by {dim}")
        common.require(matrix.dtype in (dtype, torch.float32),
                       "the matrix is neither of the rows' dtype nor fp32")  # fmt: skip


def turned(y: Tensor, matrix: Tensor, factor: float, precise: bool, dtype: torch.dtype) -> Tensor:
    """The product in plain PyTorch, rounded to dtype; in fp32 for ``precise``."""
    y = y.float() @ matrix.float() if precise else y.to(matrix.dtype) @ matrix
    y = y if factor == 1.0 else y * factor
    return y if precise else y.to(dtype)


@triton.jit
def rounded_product(y, FACTOR: tl.constexpr, NARROW: tl.constexpr, PRECISE: tl.constexpr,
                    XD: tl.constexpr):  # fmt: skip
    """fp32 sums of products times FACTOR, rounded as the module does; NARROW: an XD matrix."""
    if NARROW and not PRECISE:
        y = round_to(y, XD)
    if FACTOR != 1.0:
        y = y * FACTOR
    if not PRECISE:
        y = round_to(y, XD)
    return y


@triton.jit
def turn_row(x, m_ptr, m_si, m_so, first, COLUMNS: tl.constexpr, D: tl.constexpr,
             FACTOR: tl.constexpr, PRECISE: tl.constexpr, XD: tl.constexpr):
    """COLUMNS lanes from ``first`` on of one fp32 row ``[D]`` of XD's values, turned.

    Sums of fp32 products on the ordinary cores: a row alone would leave most of a dot empty.
    """
    row, column = tl.arange(0, D), first + tl.arange(0, COLUMNS)
    m = tl.load(m_ptr + row[:, None] * m_si + column[None, :] * m_so).to(tl.float32)
    y = tl.sum(x[:, None] * m, axis=0)
    return rounded_product(y, FACTOR, m_ptr.dtype.element_ty == XD, PRECISE, XD)
