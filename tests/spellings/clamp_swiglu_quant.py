"""Clamp → SwiGLU [→ routing weight] [→ fp8 codes and scales], spelled and misspelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _quants
from ._case import BF16, FP16, FP32, Case, Draw, plain
from ._swiglus import CLAMP, LIMIT, LIMITS, LOOSE_SILU, PACKED, SILU, SILUS, WIDTH, act

NAME = "clamp_swiglu_quant"
GROUP = 32
CLAMP_MISSES = {
    "where_or_equal": "where with ≥ answers the bound's zero for the other zero, a clamp does not"
}


def _packed(*lead: int, dtype: torch.dtype = BF16) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (Draw()(*lead, 2 * WIDTH, dtype=dtype),)


def _case(fn: Callable[..., Any], inputs: Any = None, **more: Any) -> Case:
    parts = more.pop("parts", ("Clamp", "swiglu"))
    return Case(plain(fn), inputs or _packed(7), {NAME: 1}, parts, **more)


def _with(**pieces: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: act(x, **pieces)


def _weighted(x: Tensor, w: Tensor, how: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    if how == "before":  # the reference: in fp32, before the cast
        gate, up = CLAMP["clamp"](gate.float(), up.float())
        return (w * (F.silu(gate) * up)).to(x.dtype)
    gate, up = CLAMP["clamp"](gate, up)
    return F.silu(gate) * up * w


def _weights(*lead: int, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        return draw(*lead, 2 * WIDTH), draw(*lead, 1, dtype=dtype)

    return inputs


def _quant(**pieces: Any) -> Callable[[Tensor], Any]:
    return lambda x: _quants.quantise(act(x), GROUP, **pieces)


def _layers(xs: Tensor) -> Any:
    return [act(x) for x in xs.unbind(0)]


def _busy(x: Tensor) -> Any:
    """Every intermediate has another reader, and unrelated work lies in between."""
    gate, up = x.chunk(2, dim=-1)
    other = x.float().sum(-1)
    g = gate.float().clamp(max=LIMIT)
    rows = g.amax(-1) + other
    u = up.float().clamp(-LIMIT, LIMIT)
    s = F.silu(g)
    y = (s * u).to(x.dtype)
    return y, s.mean(), u.sum(0), rows, y.float().square().sum()


def _routed(x: Tensor, weights: Tensor, rows: Tensor, top: Tensor) -> Tensor:
    return _weighted(x, weights[rows, top, None], "before")


def _two(gate: Tensor, up: Tensor) -> Tensor:
    return act(None, pack=lambda _: (gate, up))


SPELLINGS: dict[str, Case] = {}
for _name, _silu in SILU.items():
    _loose = {"exact": _name not in LOOSE_SILU}
    SPELLINGS[f"silu: {_name}"] = _case(_with(silu=_silu), **_loose)
for _name, _clamp in CLAMP.items():
    _parts = {"parts": ("wiglu",)} if _name == "none" else {}
    if _name not in CLAMP_MISSES:
        SPELLINGS[f"clamp: {_name}"] = _case(_with(clamp=_clamp), **_parts)
        SPELLINGS[f"clamp: {_name}, narrow"] = _case(_with(clamp=_clamp, wide=False), **_parts)
for _name, _pack in PACKED.items():
    SPELLINGS[f"packed: {_name}"] = _case(_with(pack=_pack))
for _dtype in (BF16, FP16, FP32):
    for _wide in (True, False):
        SPELLINGS[f"dtype: {_dtype}, {_wide}"] = _case(
            _with(wide=_wide), _packed(2, 3, dtype=_dtype)
        )
SPELLINGS |= {
    "up first": _case(_with(product=lambda s, u: u * s)),
    "product in place": _case(_with(product=lambda s, u: s.mul_(u))),
    "integer limit": _case(_with(clamp=lambda g, u: (g.clamp(max=1), u.clamp(-1, 1)))),
    "two tensors": _case(_two, lambda: (Draw(1)(7, WIDTH), Draw(2)(7, WIDTH))),
    "two tensors, heads": _case(_two, lambda: (Draw(1)(2, 3, 4, WIDTH), Draw(2)(2, 3, 4, WIDTH))),
    "broadcast up": _case(_two, lambda: (Draw(1)(2, 3, WIDTH), Draw(2)(1, 1, WIDTH))),
    "one row": _case(act, _packed(1)),
    "vector": _case(act, _packed()),
    "batch": _case(act, _packed(2, 3)),
    "experts": _case(act, _packed(4, 2, 3)),
    "rows of a wider tensor": _case(act, lambda: (Draw()(7, 4 * WIDTH)[:, WIDTH : 3 * WIDTH],)),
    "every second row": _case(act, lambda: (Draw()(14, 2 * WIDTH)[::2],)),
    "dynamic rows": _case(act, dynamic={0: (0,)}),
    "dynamic batch": _case(act, _packed(2, 3), dynamic={0: (0, 1)}),
    "weight before the cast": _case(
        lambda x, w: _weighted(x, w, "before"), _weights(7, dtype=FP32), parts=("routing weight",)
    ),
    "weight after the cast": _case(
        lambda x, w: _weighted(x, w, "after"), _weights(7, dtype=BF16), parts=("routing weight",)
    ),
    "weight unsqueezed": _case(
        lambda x, w: _weighted(x, w.squeeze(-1)[:, None], "before"),
        _weights(7, dtype=FP32),
        parts=("routing weight",),
    ),
    "weight of a batch": _case(
        lambda x, w: _weighted(x, w, "before"), _weights(2, 3, dtype=FP32), parts=("routing",)
    ),
    "weight gathered": _case(
        _routed,
        lambda: (
            Draw()(7, 2 * WIDTH),
            Draw(1)(7, 4, dtype=FP32),
            torch.arange(7),
            torch.arange(7) % 4,
        ),
        parts=("routing weight",),
    ),
    "other readers": _case(_busy),
    "layers": dataclasses.replace(_case(_layers, _packed(3, 7)), counts={NAME: 3}),
    "quant of the weighted": _case(
        lambda x, w: _quants.quantise(_weighted(x, w, "before"), GROUP),
        _weights(7, dtype=FP32),
        parts=("routing weight", "fp8 quant"),
    ),
    "quant, flat": _case(
        lambda x: (lambda c, s: (c.flatten(-2), s.squeeze(-1)))(*_quants.quantise(act(x), GROUP)),
        parts=("fp8 quant",),
    ),
    "quant, rows of a batch": _case(
        lambda x: _quants.quantise(act(x).flatten(0, 1), GROUP), _packed(2, 3), parts=("fp8 quant",)
    ),
    "quant of one block a row": _case(
        _quant(), lambda: (Draw()(5, 2 * GROUP),), parts=("fp8 quant",), absent=("weight",)
    ),
    "quant, batch": _case(_quant(), _packed(2, 3), parts=("fp8 quant",)),
    "quant, dynamic": _case(_quant(), dynamic={0: (0,)}, parts=("fp8 quant",)),
    "quant, codes only": _case(lambda x: _quants.quantise(act(x), GROUP)[0], parts=("fp8 quant",)),
}
for _name, _pieces in _quants.VARIANTS.items():
    _loose = {"exact": _name not in _quants.LOOSE}
    SPELLINGS[f"quant: {_name}"] = _case(_quant(**_pieces), parts=("fp8 quant",), **_loose)
SPELLINGS["quant: where, a bound that fp32 does not hold"] = _case(
    _quant(floor=lambda a: torch.where(a < 1e-4, 1e-4, a)), parts=("fp8 quant",)
)


# ---- mutants -----------------------------------------------------------------------------------


def _mutant(fn: Callable[..., Any], like: str, **more: Any) -> Case:
    """No site at all, or what ``more`` says."""
    return Case(plain(fn), SPELLINGS[like].inputs, like=SPELLINGS[like], **more)


def _gone(**pieces: Any) -> Case:
    return _mutant(_with(**pieces), "packed: chunk", absent=("wiglu",))


# Clamping is absorbed as part of gate or up where only a limit is off: SwiGLU of clamped tensors
# is still SwiGLU without a limit. Then it is taken, and the outputs must be equal.
MUTANTS: dict[str, Case] = {
    name: _mutant(_with(clamp=clamp), "packed: chunk", absent=("Clamp",), counts={NAME: 1})
    for name, clamp in LIMITS.items()
}
MUTANTS |= {name: _gone(silu=silu) for name, silu in SILUS.items()}
MUTANTS["gelu"] = dataclasses.replace(MUTANTS["gelu"], exact=False)  # torch's own decomposition
MUTANTS |= {
    "gate clamped on both sides": _mutant(  # below by itself, then as the fusion does
        _with(clamp=lambda g, u: (g.clamp(-LIMIT, LIMIT), u.clamp(-LIMIT, LIMIT))),
        "packed: chunk",
        counts={NAME: 1},
    ),
    "silu on up": _mutant(
        _with(silu=lambda g: g, product=lambda g, u: g * F.silu(u)),
        "packed: chunk",
        absent=("Clamp",),
        counts={NAME: 1},
    ),
    "sum for product": _gone(product=lambda s, u: s + u),
    "halves of the next row": _mutant(
        _with(pack=lambda x: (x.chunk(2, -1)[0], x.roll(1, 0).chunk(2, -1)[1])),
        "packed: chunk",
        counts={NAME: 1},
    ),
    "clamped after": _mutant(
        lambda x: (lambda g, u: (F.silu(g.float()).clamp(max=LIMIT) * u).to(x.dtype))(
            *x.chunk(2, -1)
        ),
        "clamp: none",
        absent=("wiglu",),
    ),
    "weight per lane": _mutant(
        lambda x, w: _weighted(x, w.expand(-1, WIDTH).cumsum(-1), "before"),
        "weight before the cast",
        counts={NAME: 1},
        absent=("routing weight",),
    ),
    "weight of the next row": _mutant(
        lambda x, w: _weighted(x, w.roll(1, 0), "before"), "weight before the cast",
        counts={NAME: 1},
    ),  # fmt: skip
}
for _name, _pieces in _quants.MUTANTS.items():
    MUTANTS[f"quant: {_name}"] = _mutant(
        _quant(**_pieces), "quant: default", counts={NAME: 1}, absent=("quant",)
    )
MUTANTS["quant: scale of another tensor"] = _mutant(
    _quant(codes=lambda b, s: (b.float() / s.roll(1, 0)).to(_quants.FP8)),
    "quant: default",
    counts={NAME: 1},
    absent=("quant",),
)

KNOWN_MISSES: dict[str, Case] = {
    "transposed rows": _case(
        lambda x: act(x.transpose(0, 1)),
        _packed(2, 3),
        why="declined: eager keeps the transposed strides, the kernel writes dense rows",
    ),
    "silu in bf16 by sigmoid": _case(
        _with(silu=SILU["times_sigmoid"], wide=False),
        why="sigmoid and product round to bf16 one by one; no reference rounds there",
    ),
    "silu by tanh": _case(
        _with(silu=lambda g: 0.5 * g * (1 + torch.tanh(0.5 * g))), why="no rule for tanh (ulp)"
    ),
}
for _name, (_pieces, _why) in _quants.MISSES.items():
    _found = SPELLINGS if _name == "reciprocal" else KNOWN_MISSES
    _found[f"quant: {_name}"] = _case(_quant(**_pieces), parts=("fp8 quant",), why=_why)
for _name, _why in CLAMP_MISSES.items():
    KNOWN_MISSES[f"clamp: {_name}, narrow"] = _case(
        _with(clamp=CLAMP[_name], wide=False), why=_why
    )
    KNOWN_MISSES[f"clamp: {_name}"] = _case(_with(clamp=CLAMP[_name]), why=_why)
