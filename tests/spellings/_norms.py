"""RMSNorm as people write it: ``norm(x, w)``, and edits that break it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import EPS

Norm = Callable[[Tensor, Tensor], Tensor]
PLAIN: dict[str, Norm] = {}  # ignores w
BF16_WEIGHT: dict[str, Norm] = {}
FP32_WEIGHT: dict[str, Norm] = {}
LOOSE: set[str] = set()  # matched through an ulp rule
MISSES: dict[str, tuple[Norm, str]] = {}
MUTANTS: dict[str, Norm] = {}  # of hf_weighted


def _in(table: dict[str, Norm], *names: str) -> Callable[[Norm], Norm]:
    def register(fn: Norm) -> Norm:
        table.update(dict.fromkeys(names or (fn.__name__.strip("_"),), fn))
        return fn

    return register


def _rstd(x: Tensor) -> Tensor:
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)


# ---- no weight ---------------------------------------------------------------------------------


@_in(PLAIN)
def hf_unweighted(x, w):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype)


@_in(PLAIN)
def reference_in_place(x, w):
    x = x.clone()
    x *= torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return x


@_in(PLAIN)
def every_pow(x, w):
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()


@_in(PLAIN)
def once(x, w):
    wide = x.float()
    return (wide * _rstd(x)).to(x.dtype)


@_in(PLAIN)
def swapped_product(x, w):
    return (_rstd(x) * x.float()).type_as(x)


@_in(PLAIN)
def implicit_promotion(x, w):
    return (x * _rstd(x)).to(x.dtype)  # bf16 times fp32 is in fp32


@_in(PLAIN)
def own_square(x, w):
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + EPS)).to(x.dtype)


@_in(PLAIN)
def star_star(x, w):
    wide = x.type(torch.float32)
    return (wide * torch.rsqrt(EPS + (wide**2).mean(dim=-1, keepdim=True))).to(x.dtype)


@_in(PLAIN)
def no_keepdim(x, w):
    wide = x.float()
    return (wide * wide.square().mean(-1).add(EPS).rsqrt().unsqueeze(-1)).to(x.dtype)


@_in(PLAIN)
def none_index(x, w):
    wide = x.float()
    return (wide * (wide.square().mean(-1) + EPS).rsqrt()[..., None]).to(x.dtype)


@_in(PLAIN)
def pow_minus_half(x, w):
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.5)).to(x.dtype)


@_in(PLAIN)
def over_sqrt(x, w):
    wide = x.float()
    return (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


@_in(PLAIN)
def times_one_over_sqrt(x, w):
    wide = x.float()
    return (wide * (1.0 / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype)


@_in(PLAIN)
def over_half_power(x, w):
    wide = x.float()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + EPS) ** 0.5).to(x.dtype)


@_in(PLAIN)
def functional_unweighted(x, w):
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


@_in(PLAIN)
def ops_in_place(x, w):
    wide = x.float().clone()
    rstd = wide.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_()
    return wide.mul_(rstd).to(x.dtype)


@_in(PLAIN)
def tensor_eps(x, w):
    eps = torch.full((1,), EPS)
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@_in(PLAIN)
def sum_over_n(x, w):
    wide = x.float()
    mean = wide.pow(2).sum(-1, keepdim=True) / x.shape[-1]
    return (wide * torch.rsqrt(mean + EPS)).to(x.dtype)


LOOSE |= {"sum_over_n", "over_sqrt", "times_one_over_sqrt", "over_half_power"}


# ---- weight in the activation's dtype ----------------------------------------------------------


@_in(BF16_WEIGHT)
def hf_weighted(x, w):
    dtype = x.dtype
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + EPS)
    return w * h.to(dtype)


@_in(BF16_WEIGHT)
def weight_last(x, w):
    return (x.float() * _rstd(x)).type_as(x) * w


@_in(BF16_WEIGHT)
def rstd_rounded(x, w):
    return w * (x * _rstd(x).to(x.dtype))


@_in(BF16_WEIGHT)
def every_weighted(x, w):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w


@_in(BF16_WEIGHT)
def widened_weight(x, w):
    return (w.float() * (x.float() * _rstd(x))).to(x.dtype)


@_in(BF16_WEIGHT)
def weight_as_row(x, w):
    return (x.float() * _rstd(x)).to(x.dtype) * w.view(1, -1)


@_in(BF16_WEIGHT)
def one_plus_weight(x, w):
    return (x.float() * _rstd(x) * (1.0 + w.float())).to(x.dtype)


@_in(BF16_WEIGHT)
def functional(x, w):
    return F.rms_norm(x, (x.shape[-1],), w, EPS)


# ---- weight in fp32 ----------------------------------------------------------------------------


@_in(FP32_WEIGHT)
def reference_weighted(x, w):
    dtype = x.dtype
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return (w * x).to(dtype)


@_in(FP32_WEIGHT)
def hf_523(x, w):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (w * h).to(x.dtype)


@_in(FP32_WEIGHT)
def fp32_over_sqrt(x, w):
    h = x.float()
    return (h / (h.square().mean(-1, keepdim=True) + EPS).sqrt() * w).to(x.dtype)


@_in(FP32_WEIGHT)
def scaled_in_place(x, w):
    h = x.float() * _rstd(x)
    h *= w
    return h.to(x.dtype)


LOOSE |= {"fp32_over_sqrt"}


# ---- not matched -------------------------------------------------------------------------------


def _by_norm(x, w):
    wide = x.float()
    mean = wide.norm(dim=-1, keepdim=True).square() / x.shape[-1]
    return (wide * torch.rsqrt(mean + EPS)).to(x.dtype)


def _weight_first(x, w):
    return (x.float() * (_rstd(x) * w.float())).to(x.dtype)


MISSES["by_norm"] = (_by_norm, "a root and its square round twice; not the same function")
MISSES["weight_first"] = (_weight_first, "x·(r·w) is another association than (x·r)·w")


# ---- mutants of hf_weighted --------------------------------------------------------------------


def _mutant(rstd: Callable[[Tensor], Tensor]) -> Norm:
    return lambda x, w: w * (x.float() * rstd(x.float())).to(x.dtype)


MUTANTS["eps_outside_the_root"] = _mutant(
    lambda h: 1.0 / (torch.sqrt(h.pow(2).mean(-1, keepdim=True)) + EPS)
)
MUTANTS["eps_after_rsqrt"] = _mutant(lambda h: torch.rsqrt(h.pow(2).mean(-1, keepdim=True)) + EPS)
MUTANTS["eps_inside_the_mean"] = _mutant(
    lambda h: torch.rsqrt((h + EPS).pow(2).mean(-1, keepdim=True))
)
MUTANTS["mean_over_heads"] = _mutant(lambda h: torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + EPS))
MUTANTS["mean_over_heads_and_lanes"] = _mutant(
    lambda h: torch.rsqrt(h.pow(2).mean((-2, -1), keepdim=True) + EPS)
)
MUTANTS["mean_over_half"] = _mutant(
    lambda h: torch.rsqrt(h[..., ::2].pow(2).mean(-1, keepdim=True) + EPS)
)
MUTANTS["mean_of_abs"] = _mutant(lambda h: torch.rsqrt(h.abs().mean(-1, keepdim=True) + EPS))
MUTANTS["cube"] = _mutant(lambda h: torch.rsqrt(h.pow(3).mean(-1, keepdim=True).abs() + EPS))
MUTANTS["variance"] = _mutant(
    lambda h: torch.rsqrt((h - h.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + EPS)
)
MUTANTS["sum"] = _mutant(lambda h: torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + EPS))
MUTANTS["sum_over_wrong_n"] = _mutant(
    lambda h: torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / (h.shape[-1] - 1) + EPS)
)
MUTANTS["maximum"] = _mutant(lambda h: torch.rsqrt(h.pow(2).amax(-1, keepdim=True) + EPS))
MUTANTS["rsqrt_twice"] = _mutant(
    lambda h: torch.rsqrt(torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))
)
MUTANTS["next_row"] = _mutant(
    lambda h: torch.rsqrt(h.roll(1, 0).pow(2).mean(-1, keepdim=True) + EPS)
)
MUTANTS["product_of_neighbours"] = _mutant(
    lambda h: torch.rsqrt((h * h.flip(-1)).mean(-1, keepdim=True).abs() + EPS)
)
