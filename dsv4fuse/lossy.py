"""Weights that their owner chooses to keep in fewer bits: a step of its own, never the compiler's.

A compiler sees a weight as an input of its graph: a copy that it made could go stale, and the
module would keep the weight all the same. So the module itself is changed, once and in view: its
weight becomes e4m3 codes with the scale of each 128 × 128 block, and reads as their product. What
is computed from it, eager or compiled, is exact for that weight; the fused projection can read the
codes as they are stored (``inv_rope_grouped_bmm``, by the strategy that was measured to be faster).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dsv4fuse.atoms import FP8, FP8_MAX

BLOCK = 128
WO_A = r"(^|\.)(o_a_proj|wo_a)$"


@dataclass(frozen=True)
class Lossy:
    """A weight that was quantised.

    ``error``: its relative error, by Frobenius norms; ``saved``: bytes that the module holds less.
    """

    name: str
    error: float
    saved: int


class Blocks(nn.Module):
    """Codes ``[N,K]`` e4m3 and scales ``[N/rows, K/columns]`` fp32 → weight, a parametrisation."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.columns, self.dtype = rows, columns, dtype

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        wide = self._cut(codes.float()) * scales[:, None, :, None]
        return wide.view(codes.shape).to(self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self._cut(weight.detach().float())
        scales = blocks.abs().amax((1, 3)).clamp_min(1e-12) / FP8_MAX
        codes = (blocks / scales[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        return codes.view(weight.shape), scales

    def _cut(self, t: Tensor) -> Tensor:
        return t.view(t.shape[0] // self.rows, self.rows, -1, self.columns)


def quantise_wo_a(model: nn.Module, names: str = WO_A) -> list[Lossy]:
    """Keep the weights of a model's grouped output projections in fp8, in place; lossy.

    ``names``: a regular expression of the modules' names, whose ``weight [G·N, K]`` is bf16 or
    fp16; ``n_groups``, where a module has it, is G, and no block reaches over two groups.
    ``torch.nn.utils.parametrize.remove_parametrizations(module, "weight")`` makes the weight, as it
    then is, an ordinary one again. Raises ValueError where no module has such a name or weight.
    """
    found = [(n, m) for n, m in model.named_modules() if re.search(names, n)]
    if not found:
        raise ValueError(f"No module of {type(model).__name__} has a name like {names!r}.")
    for name, module in found:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            raise ValueError(f"{name} has no weight of two axes, or one that is parametrised.")
        if weight.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"The weight of {name} is {weight.dtype}, neither bf16 nor fp16.")
    return [_quantised(name, module) for name, module in found]


@torch.no_grad()
def _quantised(name: str, module: nn.Module) -> Lossy:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = weight.shape
    rows //= int(getattr(module, "n_groups", 1))
    weight.requires_grad_(False)  # of codes there is no gradient
    made = Blocks(math.gcd(rows, BLOCK), math.gcd(columns, BLOCK), weight.dtype)
    parametrize.register_parametrization(module, "weight", made)
    held = module.parametrizations.weight
    left = sum(t.nbytes for t in (held.original0, held.original1))
    wide = weight.float()
    error = (module.weight.float() - wide).norm() / wide.norm()
    return Lossy(name, error.item(), weight.nbytes - left)
