"""A rotation of rows ``[.., D]`` by a matrix ``[D, D]``, as people write it: y, matrix → y."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 0.29  # no power of two


def hadamard(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return h


def matrix(n: int) -> Tensor:
    """One that is not its own transpose."""
    return hadamard(n).roll(1, 0)


def scaled(y: Tensor, m: Tensor) -> Tensor:
    return torch.matmul(y, m) * SCALE


ROTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": scaled,
    "operator": lambda y, m: (y @ m) * SCALE,
    "linear": lambda y, m: F.linear(y, m) * SCALE,
    "linear, transposed": lambda y, m: F.linear(y, m.t()) * SCALE,
    "einsum": lambda y, m: torch.einsum("...d,de->...e", y, m) * SCALE,
    "matrix scaled": lambda y, m: y @ (m * SCALE),
    "not scaled": lambda y, m: y @ m,
    "flattened": lambda y, m: (y.reshape(-1, y.shape[-1]) @ m).view(y.shape) * SCALE,
}


def wide(y: Tensor, m: Tensor) -> Tensor:
    """By an fp32 matrix, rounded once."""
    return ((y.float() @ m) * SCALE).to(y.dtype)


def rounded_first(y: Tensor, m: Tensor) -> Tensor:
    """By an fp32 matrix, rounded in front of the factor too."""
    return (y.float() @ m).to(y.dtype) * SCALE


def butterfly(y: Tensor, m: Tensor) -> Tensor:
    """The fast transform, log2(n) steps."""
    shape, n, h = y.shape, y.shape[-1], 1
    while h < n:
        a, b = y.view(*shape[:-1], n // (2 * h), 2, h).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).view(shape)
        h *= 2
    return y * SCALE
