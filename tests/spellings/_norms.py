"""RMSNorm as people write it: ``norm(x, w, eps)``, and edits that break it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import EPS

Norm = Callable[..., Tensor]
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


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


# ---- no weight ---------------------------------------------------------------------------------


@_in(PLAIN)
def hf_unweighted(x, w, eps=EPS):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype)


@_in(PLAIN)
def reference_in_place(x, w, eps=EPS):
    x = x.clone()
    x *= torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x


@_in(PLAIN)
def every_pow(x, w, eps=EPS):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


@_in(PLAIN)
def once(x, w, eps=EPS):
    wide = x.float()
    return (wide * _rstd(x, eps)).to(x.dtype)


@_in(PLAIN)
def swapped_product(x, w, eps=EPS):
    return (_rstd(x, eps) * x.float()).type_as(x)


@_in(PLAIN)
def implicit_promotion(x, w, eps=EPS):
    return (x * _rstd(x, eps)).to(x.dtype)  # bf16 times fp32 is in fp32


@_in(PLAIN)
def own_square(x, w, eps=EPS):
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + eps)).to(x.dtype)


@_in(PLAIN)
def star_star(x, w, eps=EPS):
    wide = x.type(torch.float32)
    return (wide * torch.rsqrt(eps + (wide**2).mean(dim=-1, keepdim=True))).to(x.dtype)


@_in(PLAIN)
def no_keepdim(x, w, eps=EPS):
    wide = x.float()
    return (wide * wide.square().mean(-1).add(eps).rsqrt().unsqueeze(-1)).to(x.dtype)


@_in(PLAIN)
def none_index(x, w, eps=EPS):
    wide = x.float()
    return (wide * (wide.square().mean(-1) + eps).rsqrt()[..., None]).to(x.dtype)


@_in(PLAIN)
def pow_minus_half(x, w, eps=EPS):
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5)).to(x.dtype)


@_in(PLAIN)
def over_sqrt(x, w, eps=EPS):
    wide = x.float()
    return (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@_in(PLAIN)
def times_one_over_sqrt(x, w, eps=EPS):
    wide = x.float()
    return (wide * (1.0 / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


@_in(PLAIN)
def over_half_power(x, w, eps=EPS):
    wide = x.float()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + eps) ** 0.5).to(x.dtype)


@_in(PLAIN)
def functional_unweighted(x, w, eps=EPS):
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


@_in(PLAIN)
def ops_in_place(x, w, eps=EPS):
    wide = x.float().clone()
    rstd = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return wide.mul_(rstd).to(x.dtype)


@_in(PLAIN)
def tensor_eps(x, w, eps=EPS):
    shift = torch.full((1,), eps)
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + shift)).to(x.dtype)


@_in(PLAIN)
def sum_over_n(x, w, eps=EPS):
    wide = x.float()
    mean = wide.pow(2).sum(-1, keepdim=True) / x.shape[-1]
    return (wide * torch.rsqrt(mean + eps)).to(x.dtype)


LOOSE |= {"sum_over_n", "over_sqrt", "times_one_over_sqrt", "over_half_power"}


# ---- weight in the activation's dtype ----------------------------------------------------------


@_in(BF16_WEIGHT)
def hf_weighted(x, w, eps=EPS):
    dtype = x.dtype
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + eps)
    return w * h.to(dtype)


@_in(BF16_WEIGHT)
def weight_last(x, w, eps=EPS):
    return (x.float() * _rstd(x, eps)).type_as(x) * w


@_in(BF16_WEIGHT)
def rstd_rounded(x, w, eps=EPS):
    return w * (x * _rstd(x, eps).to(x.dtype))


@_in(BF16_WEIGHT)
def every_weighted(x, w, eps=EPS):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


@_in(BF16_WEIGHT)
def widened_weight(x, w, eps=EPS):
    return (w.float() * (x.float() * _rstd(x, eps))).to(x.dtype)


@_in(BF16_WEIGHT)
def weight_as_row(x, w, eps=EPS):
    return (x.float() * _rstd(x, eps)).to(x.dtype) * w.view(1, -1)


@_in(BF16_WEIGHT)
def one_plus_weight(x, w, eps=EPS):
    return (x.float() * _rstd(x, eps) * (1.0 + w.float())).to(x.dtype)


@_in(BF16_WEIGHT)
def functional(x, w, eps=EPS):
    return F.rms_norm(x, (x.shape[-1],), w, eps)


# ---- weight in fp32 ----------------------------------------------------------------------------


@_in(FP32_WEIGHT)
def reference_weighted(x, w, eps=EPS):
    dtype = x.dtype
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (w * x).to(dtype)


@_in(FP32_WEIGHT)
def hf_523(x, w, eps=EPS):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (w * h).to(x.dtype)


@_in(FP32_WEIGHT)
def fp32_over_sqrt(x, w, eps=EPS):
    h = x.float()
    return (h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * w).to(x.dtype)


@_in(FP32_WEIGHT)
def scaled_in_place(x, w, eps=EPS):
    h = x.float() * _rstd(x, eps)
    h *= w
    return h.to(x.dtype)


LOOSE |= {"fp32_over_sqrt"}


# ---- not matched -------------------------------------------------------------------------------


def _by_norm(x, w, eps=EPS):
    wide = x.float()
    mean = wide.norm(dim=-1, keepdim=True).square() / x.shape[-1]
    return (wide * torch.rsqrt(mean + eps)).to(x.dtype)


def _weight_first(x, w, eps=EPS):
    return (x.float() * (_rstd(x, eps) * w.float())).to(x.dtype)


MISSES["by_norm"] = (_by_norm, "a root and its square round twice; not the same function")
MISSES["weight_first"] = (_weight_first, "x·(r·w) is another association than (x·r)·w")


# ---- mutants of hf_weighted --------------------------------------------------------------------


def _mutant(rstd: Callable[[Tensor, float], Tensor]) -> Norm:
    return lambda x, w, eps=EPS: w * (x.float() * rstd(x.float(), eps)).to(x.dtype)


MUTANTS["eps_outside_the_root"] = _mutant(
    lambda h, eps: 1.0 / (torch.sqrt(h.pow(2).mean(-1, keepdim=True)) + eps)
)
MUTANTS["eps_after_rsqrt"] = _mutant(
    lambda h, eps: torch.rsqrt(h.pow(2).mean(-1, keepdim=True)) + eps
)
MUTANTS["eps_inside_the_mean"] = _mutant(
    lambda h, eps: torch.rsqrt((h + eps).pow(2).mean(-1, keepdim=True))
)
MUTANTS["mean_over_heads"] = _mutant(
    lambda h, eps: torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + eps)
)
MUTANTS["mean_over_heads_and_lanes"] = _mutant(
    lambda h, eps: torch.rsqrt(h.pow(2).mean((-2, -1), keepdim=True) + eps)
)
MUTANTS["mean_over_half"] = _mutant(
    lambda h, eps: torch.rsqrt(h[..., ::2].pow(2).mean(-1, keepdim=True) + eps)
)
MUTANTS["mean_of_abs"] = _mutant(lambda h, eps: torch.rsqrt(h.abs().mean(-1, keepdim=True) + eps))
MUTANTS["cube"] = _mutant(lambda h, eps: torch.rsqrt(h.pow(3).mean(-1, keepdim=True).abs() + eps))
MUTANTS["variance"] = _mutant(
    lambda h, eps: torch.rsqrt((h - h.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + eps)
)
MUTANTS["sum"] = _mutant(lambda h, eps: torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + eps))
MUTANTS["sum_over_wrong_n"] = _mutant(
    lambda h, eps: torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / (h.shape[-1] - 1) + eps)
)
MUTANTS["maximum"] = _mutant(lambda h, eps: torch.rsqrt(h.pow(2).amax(-1, keepdim=True) + eps))
MUTANTS["rsqrt_twice"] = _mutant(
    lambda h, eps: torch.rsqrt(torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))
)
MUTANTS["next_row"] = _mutant(
    lambda h, eps: torch.rsqrt(h.roll(1, 0).pow(2).mean(-1, keepdim=True) + eps)
)
MUTANTS["product_of_neighbours"] = _mutant(
    lambda h, eps: torch.rsqrt((h * h.flip(-1)).mean(-1, keepdim=True).abs() + eps)
)
