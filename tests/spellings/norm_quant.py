"""RMSNorm → fp8 codes and scales [, a second norm], spelled and misspelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _norms, _quants, _ropes
from ._case import BF16, EPS, FP16, FP32, Case, Draw, plain

NAME = "norm_quant"
GROUP, WIDTH, KV = 32, 96, 64
Fn = Callable[..., Any]
NORM, UNIT = _norms.BF16_WEIGHT["hf_weighted"], _norms.PLAIN["once"]


def latent(*lead: int, dtype: torch.dtype = BF16, weight: torch.dtype | None = None) -> Fn:
    """q's latent and its weight."""

    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        return draw(*lead, WIDTH, dtype=dtype), draw(WIDTH, dtype=weight or dtype)

    return inputs


def latents(*lead: int) -> Fn:
    """q's and kv's latents as one projection makes them, and both weights."""

    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        return draw(*lead, WIDTH + KV), draw(WIDTH), draw(KV)

    return inputs


def _case(fn: Fn, inputs: Fn | None = None, *parts: str, **more: Any) -> Case:
    return Case(plain(fn), inputs or latent(5), {NAME: 1}, parts or ("fp8 quant",), **more)


def _normed(norm: Fn, **pieces: Any) -> Fn:
    return lambda x, w: _quants.quantise(norm(x, w), GROUP, **pieces)


def _both(both: Tensor, w: Tensor, kv_w: Tensor) -> Any:
    q, kv = both.split([WIDTH, KV], dim=-1)
    return *_quants.quantise(NORM(q, w), GROUP), NORM(kv, kv_w)


def _kv_first(both: Tensor, w: Tensor, kv_w: Tensor) -> Any:
    kv = _norms.FP32_WEIGHT["hf_523"](both[..., WIDTH:], kv_w.float())
    return kv, *_quants.quantise(NORM(both[..., :WIDTH], w), GROUP)


def _two_tensors(q: Tensor, w: Tensor, kv: Tensor) -> Any:
    return *_quants.quantise(NORM(q, w), GROUP), UNIT(kv, None)


def _two_layers(both: Tensor, w: Tensor, kv_w: Tensor) -> Any:
    first = _both(both, w, kv_w)
    return first, _both((both * 2).flip(-1), w, kv_w)


def _kept(x: Tensor, w: Tensor) -> Any:
    """The indexer reads the norm, too."""
    y = NORM(x, w)
    return *_quants.quantise(y, GROUP), y @ y.transpose(-1, -2)


def _kept_and_kv(both: Tensor, w: Tensor, kv_w: Tensor) -> Any:
    y = NORM(both[..., :WIDTH], w)
    return *_quants.quantise(y, GROUP), NORM(both[..., WIDTH:], kv_w), y * 2


def _busy(x: Tensor, w: Tensor) -> Any:
    """Intermediates have other readers, and unrelated work lies in between."""
    h = x.float()
    variance = h.pow(2).mean(-1, keepdim=True)
    rows = variance.squeeze(-1) + 1
    y = w * (h * torch.rsqrt(variance + EPS)).to(x.dtype)
    codes, scales = _quants.quantise(y, GROUP)
    return codes, scales, rows, scales.sum(), y.float().sum(-1)


def _linear_codes(x: Tensor, w: Tensor) -> Tensor:
    """The quantised product of an fp8 linear that is simulated: codes times scales."""
    codes, scales = _quants.quantise(NORM(x, w), GROUP)
    return (codes.float() * scales).flatten(-2) @ torch.ones(WIDTH, 3)


def _rows(x: Tensor, w: Tensor) -> Any:
    """The norm of a batch, its rows in one axis for a product that knows no batch."""
    return _quants.quantise(NORM(x, w).flatten(0, 1), GROUP)


def _product(y: Tensor, columns: int) -> Tensor:
    codes, scales = _quants.quantise(y.reshape(-1, WIDTH), GROUP)
    return (codes.float() * scales).flatten(-2) @ torch.ones(WIDTH, columns)


def _two_linears(x: Tensor, w: Tensor) -> Any:
    """Each fp8 linear quantises its own input: the same codes twice, a norm that nobody keeps."""
    y = NORM(x, w)
    return _product(y, 3), _product(y, 5)


def _one_of_twice(x: Tensor, w: Tensor) -> Any:
    """The second linear reads twice the norm, whose codes are the same and whose scales are not."""
    y = NORM(x, w)
    return _product(y, 3), _product(y * 2, 5)


def _codes_twice(x: Tensor, w: Tensor) -> Any:
    """Both leave the graph: two tensors, not one."""
    y = NORM(x, w)
    return *_quants.quantise(y, GROUP), *_quants.quantise(y, GROUP)


class Attention(nn.Module):
    """The down projection of an attention block, its norms in DeepSeek's spelling."""

    def __init__(self) -> None:
        super().__init__()
        draw = Draw(7)
        self.down = nn.Parameter(draw(WIDTH + KV, 16, scale=0.3))
        self.q_norm = nn.Parameter(draw(WIDTH, dtype=FP32))
        self.kv_norm = nn.Parameter(draw(KV, dtype=FP32))

    def forward(self, x: Tensor) -> Any:
        both = nn.functional.linear(x, self.down)
        norm = _norms.FP32_WEIGHT["reference_weighted"]
        q = norm(both[..., :WIDTH], self.q_norm)
        return *_quants.quantise(q, GROUP), norm(both[..., WIDTH:], self.kv_norm)


BOTH = ("Norm", "fp8 quant", "second norm")
SPELLINGS: dict[str, Case] = {}
for _name, _norm in (_norms.PLAIN | _norms.BF16_WEIGHT).items():
    SPELLINGS[f"norm: {_name}"] = _case(_normed(_norm), exact=_name not in _norms.LOOSE)
for _name, _norm in _norms.FP32_WEIGHT.items():
    SPELLINGS[f"norm: {_name}"] = _case(
        _normed(_norm), latent(5, weight=FP32), exact=_name not in _norms.LOOSE
    )
SPELLINGS["norm: fp32 weight after the cast"] = _case(_normed(NORM), latent(5, weight=FP32))
for _dtype in (FP16, FP32):
    SPELLINGS[f"dtype: {_dtype}"] = _case(_normed(NORM), latent(2, 3, dtype=_dtype))
for _name in (  # the others are spelled out with the SwiGLU in front
    "default", "view", "max_values", "no_floor", "times_inverse", "pow2", "pow2_by_pow",
    "not_saturated", "promoted", "pow2_reciprocal",
):  # fmt: skip
    SPELLINGS[f"quant: {_name}"] = _case(
        _normed(NORM, **_quants.VARIANTS[_name]), exact=_name not in _quants.LOOSE
    )
SPELLINGS |= {
    "flat": _case(
        lambda x, w: (lambda c, s: (c.flatten(-2), s.squeeze(-1)))(*_normed(NORM)(x, w))
    ),
    "batch": _case(_normed(NORM), latent(2, 3)),
    "one row": _case(_normed(NORM), latent(1)),
    "vector": _case(_normed(NORM), latent()),
    "dynamic rows": _case(_normed(NORM), dynamic={0: (0,)}),
    "dynamic batch": _case(_normed(NORM), latent(2, 3), dynamic={0: (0, 1)}),
    "rows of a batch": _case(_rows, latent(2, 3)),
    "rows of a batch, tokens first": _case(
        lambda x, w: _quants.quantise(NORM(x, w).transpose(0, 1).flatten(0, 1), GROUP),
        latent(2, 3),
    ),
    "rows of a batch, dynamic": _case(_rows, latent(2, 3), dynamic={0: (0, 1)}),
    "two linears": _case(_two_linears, None, "Norm", "fp8 quant", absent=("kept",)),
    "two linears, batch": _case(_two_linears, latent(2, 3), absent=("kept",)),
    "codes twice": _case(_codes_twice, None, "kept"),
    "codes only": _case(lambda x, w: _normed(NORM)(x, w)[0]),
    "codes into a product": _case(_linear_codes),
    "every second row": _case(lambda x, w: _normed(NORM)(x[::2], w), latent(10)),
    "kept": _case(_kept, None, "Norm", "kept"),
    "other readers": _case(_busy, None, "kept"),
    "two norms": _case(_both, latents(5), *BOTH),
    "two norms, batch": _case(_both, latents(2, 3), *BOTH),
    "two norms, dynamic": _case(_both, latents(2, 3), *BOTH, dynamic={0: (0, 1)}),
    "two norms, the second first": _case(_kv_first, latents(5), *BOTH),
    "two norms of two tensors": _case(
        _two_tensors, lambda: (*latent(5)(), Draw(4)(5, KV)), *BOTH
    ),
    "two norms, kept": _case(_kept_and_kv, latents(5), *BOTH, "kept"),
    "two norms, twice": dataclasses.replace(
        _case(_two_layers, latents(5), *BOTH), counts={NAME: 2}
    ),
    "a module": Case(
        Attention, lambda: (Draw(1)(2, 3, 16),), {NAME: 1}, BOTH, exact=True
    ),
}


# ---- mutants -----------------------------------------------------------------------------------


def _mutant(fn: Fn, like: str, *parts: str, **more: Any) -> Case:
    """No site at all, or what ``more`` says."""
    return Case(plain(fn), SPELLINGS[like].inputs, parts=parts, like=SPELLINGS[like], **more)


def _roped(both: Tensor, w: Tensor, kv_w: Tensor) -> Any:
    """kv's norm goes through a rope: it is part of another fusion."""
    q, kv = both.split([WIDTH, KV], dim=-1)
    half = torch.arange(8) * 0.1 + torch.arange(both.shape[0])[:, None]
    kv = _ropes.REAL["hf"](NORM(kv, kv_w), half.cos(), half.sin())
    return *_quants.quantise(NORM(q, w), GROUP), kv


def _dependent(both: Tensor, w: Tensor, kv_w: Tensor) -> Any:
    """The second norm reads the codes: no launch makes both."""
    q, kv = both.split([WIDTH, KV], dim=-1)
    codes, scales = _quants.quantise(NORM(q, w), GROUP)
    return codes, scales, NORM(kv + codes.flatten(-2)[..., :KV].to(kv.dtype), kv_w)


def _other_rows(both: Tensor, w: Tensor, kv_w: Tensor) -> Any:
    q, kv = both.split([WIDTH, KV], dim=-1)
    return *_quants.quantise(NORM(q, w), GROUP), NORM(kv[1:], kv_w)


def _scale_before(x: Tensor, w: Tensor) -> Any:
    """Scales of the latent, codes of its norm."""
    _, scales = _quants.quantise(x, GROUP)
    y = NORM(x, w).unflatten(-1, (-1, GROUP))
    return (y.float() / scales).clamp(-_quants.MAX, _quants.MAX).to(_quants.FP8), scales


def _reordered(x: Tensor, w: Tensor) -> Any:
    """The norm of rows in one order, quantised in another."""
    return _quants.quantise(NORM(x, w).transpose(0, 1), GROUP)


MUTANTS: dict[str, Case] = {
    "the second norm under a rope": _mutant(
        _roped, "two norms", "fp8 quant", counts={NAME: 1, "norm_rope_cache": 1},
        absent=("second",),
    ),
    "the second norm of the codes": _mutant(
        _dependent, "two norms", "fp8 quant", counts={NAME: 1}, absent=("second",)
    ),
    "the second norm of fewer rows": _mutant(
        _other_rows, "two norms", "fp8 quant", counts={NAME: 1}, absent=("second",)
    ),
    "two linears, one of twice the norm": _mutant(
        _one_of_twice, "two linears", "kept", counts={NAME: 1}
    ),
    "rows in another order": _mutant(
        lambda x, w: _quants.quantise(NORM(x, w).flatten(0, 1).flip(0), GROUP), "rows of a batch"
    ),
    "lanes cut into rows": _mutant(
        lambda x, w: _quants.quantise(NORM(x, w).reshape(-1, WIDTH // 3), GROUP), "rows of a batch"
    ),
    "no quant": _mutant(lambda x, w: (NORM(x, w), x * 2), "norm: hf_weighted"),
    "scales of the latent": _mutant(_scale_before, "norm: hf_weighted"),
    "other rows": _mutant(_reordered, "batch"),
    "scaled between": _mutant(
        lambda x, w: _quants.quantise(NORM(x, w) * 0.3, GROUP), "norm: hf_weighted"
    ),
    "rounded between": _mutant(
        lambda x, w: _quants.quantise(NORM(x, w).bfloat16(), GROUP), f"dtype: {FP32}"
    ),
    "lanes rotated between": _mutant(
        lambda x, w: _quants.quantise(NORM(x, w).roll(1, -1), GROUP), "norm: hf_weighted"
    ),
}  # fmt: skip
for _name, _norm in _norms.MUTANTS.items():
    if not _name.startswith("mean_over_heads"):  # rows have no heads here
        MUTANTS[f"norm: {_name}"] = _mutant(_normed(_norm), "norm: hf_weighted")
for _name in ("no_abs", "scale_of_next_block", "saturates_early", "rounded_quotient"):
    MUTANTS[f"quant: {_name}"] = _mutant(
        _normed(NORM, **_quants.MUTANTS[_name]), "quant: default"
    )

KNOWN_MISSES: dict[str, Case] = {
    f"norm: {name}": _case(_normed(norm), why=why, exact=False)
    for name, (norm, why) in _norms.MISSES.items()
}
_pieces, _ = _quants.MISSES["reciprocal"]
SPELLINGS["quant: reciprocal"] = _case(_normed(NORM, **_pieces))
