"""Inverse rope of the attention output [→ fp8 codes and scales in groups of heads]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _quants, _rope_mutants, _ropes
from ._case import BF16, FP16, FP32, Case, Draw, plain

NAME = "inv_rope_quant"
DIM, ROPE, HEADS, GROUPS, BLOCK = 64, 16, 4, 2, 32
BATCH, SEQ = 2, 5
Fn = Callable[..., Any]
BACK = _ropes.REAL["slices_and_stack"]


def _negated(rope: Fn) -> Fn:
    """The inverse by the other angle."""
    return lambda x, cos, sin: rope(x, cos, -sin)


def _conjugated(rope: Fn) -> Fn:
    return lambda x, freqs: rope(x, freqs.conj())


def _written_out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The signs of the transposed rotation, as kernels write it."""
    nope, r = x.split([DIM - ROPE, ROPE], dim=-1)
    even, odd = r.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1)
    return torch.cat((nope, turned.flatten(-2).to(x.dtype)), dim=-1)


def _inverse_flag(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference's shape of code: one function for both ways."""
    freqs = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))

    def apply(x: Tensor, freqs: Tensor, inverse: bool) -> Tensor:
        y = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        freqs = freqs.conj() if inverse else freqs
        x.copy_(torch.view_as_real(y * freqs).flatten(-2))
        return x

    x = x.clone()
    apply(x[..., -ROPE:], freqs, True)
    return x


def inputs(
    *lead: int, table: tuple[int, ...], dtype: torch.dtype = BF16, tables: Any = FP32
) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        draw = Draw()
        x, (cos, sin) = draw(*lead, DIM, dtype=dtype), draw.angles(*table, ROPE // 2)
        if tables is None:
            return x, torch.complex(cos, sin)
        return x, cos.to(tables), sin.to(tables)

    return make


def _usual(**more: Any) -> Callable[[], tuple[Tensor, ...]]:
    return inputs(BATCH, SEQ, HEADS, table=(BATCH, SEQ, 1), **more)


def _case(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    return Case(plain(fn), make or _usual(), {NAME: 1}, parts or ("Inverse rope",), **more)


def _back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return BACK(x, cos, -sin)


def grouped(o: Tensor, lead: int = 2, **pieces: Fn) -> tuple[Tensor, Tensor]:
    """Heads merged into groups, then codes and scales."""
    codes, s = _quants.quantise(o.reshape(*o.shape[:lead], GROUPS, -1), BLOCK, **pieces)
    return codes.flatten(-2), s.squeeze(-1)


def _merged(o: Tensor) -> Tensor:
    return o.reshape(*o.shape[:2], GROUPS, -1)


def _turned_about(y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of y, and of y with its first two axes exchanged."""
    return [_quants.quantise(t, BLOCK) for t in (y, y.transpose(0, 1))]


def _quant(lead: int = 2, **pieces: Fn) -> Fn:
    return lambda x, cos, sin: grouped(_back(x, cos, sin), lead, **pieces)


SPELLINGS: dict[str, Case] = {}
for _name, _rope in _ropes.REAL.items():
    SPELLINGS[f"rope: {_name}"] = _case(_negated(_rope))
for _name, _rope in _ropes.COMPLEX.items():
    SPELLINGS[f"rope: {_name}"] = _case(_conjugated(_rope), _usual(tables=None))
for _name, _rope in _ropes.EVERY.items():
    SPELLINGS[f"rope: {_name}"] = _case(_negated(_rope), _usual(tables=BF16))
for _dtype in (FP16, FP32):
    SPELLINGS[f"rope: hf, {_dtype}"] = _case(_negated(_ropes.REAL["hf"]), _usual(dtype=_dtype))
    SPELLINGS[f"rope: reference, {_dtype}"] = _case(
        _conjugated(_ropes.COMPLEX["reference"]), _usual(dtype=_dtype, tables=None)
    )
B, S, H = BATCH, SEQ, HEADS
SPELLINGS |= {
    "written out": _case(_written_out),
    "one function for both ways": _case(_inverse_flag),
    "minus one times sin": _case(lambda x, cos, sin: BACK(x, cos, sin * -1)),
    "minus the angle": _case(lambda x, cos, sin: BACK(x, cos, torch.neg(sin))),
    "rounded tables": _case(_negated(_ropes.REAL["hf"]), _usual(tables=BF16)),
    "dynamic": _case(_back, dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    "layout: heads first": _case(_back, inputs(B, H, S, table=(B, 1, S))),
    "layout: flat": _case(_back, inputs(S, H, table=(S, 1))),
    "layout: rows": _case(_back, inputs(S, table=(S,))),
    "layout: shared positions": _case(_back, inputs(B, S, H, table=(S, 1))),
    "layout: batch of one": _case(_back, inputs(1, S, H, table=(1, S, 1))),
    "layout: sequence of one": _case(_back, inputs(B, 1, H, table=(B, 1, 1))),
    "layout: decode at one position": _case(_back, inputs(B, 1, H, table=(1, 1, 1))),
    "layout: one position": _case(_back, inputs(B, H, table=())),
    "layout: heads by transpose": _case(
        lambda x, cos, sin: _back(x.transpose(1, 2), cos[:, None], sin[:, None]).transpose(1, 2),
        inputs(B, S, H, table=(B, S)),
    ),
    "layout: merged afterwards": _case(lambda x, c, s: _back(x, c, s).flatten(-2) * 2),
    "other readers": _case(
        lambda x, c, s: (lambda y: (y, y.float().mean(-1), (x[..., -1] * 2)))(_back(x, c, s))
    ),
    "quant: flat tokens": _case(
        _quant(1), inputs(S, H, table=(S, 1)), "nverse rope → fp8 quant in 2 groups"
    ),
    "quant: dynamic": _case(
        _quant(), None, "nverse rope → fp8 quant", dynamic={0: (1,), 1: (1,), 2: (1,)}
    ),
    "quant: one group": _case(
        lambda x, c, s: _quants.quantise(_back(x, c, s).flatten(-2), BLOCK), None, "in 1 groups"
    ),
    "quant: per head": _case(
        lambda x, c, s: _quants.quantise(_back(x, c, s), BLOCK), None, "in 4 groups"
    ),
    "quant: a block is a head": _case(
        lambda x, c, s: grouped(_back(x[..., -BLOCK:], c, s)), None, "fp8 quant in 2 groups"
    ),
    "quant: of one row": _case(
        lambda x, c, s: grouped(_back(x, c, s).view(-1).view(1, 1, H, DIM)),
        inputs(1, 1, H, table=(1, 1, 1)),
        "fp8 quant in 2 groups",
    ),
    "quant: scales groups first": _case(
        lambda x, c, s: (lambda q, t: (q, t.permute(2, 3, 0, 1)))(*grouped(_back(x, c, s))),
        None,
        "fp8 quant",
    ),
    "quant: of the reference's rope": _case(
        lambda x, f: grouped(_ropes.COMPLEX["reference"](x, f.conj())),
        _usual(tables=None),
        "fp8 quant in 2 groups",
    ),
}
for _name, _pieces in _quants.VARIANTS.items():
    SPELLINGS[f"quant: {_name}"] = _case(
        _quant(**_pieces), None, "fp8 quant in 2 groups", exact=_name not in _quants.LOOSE
    )

MUTANTS: dict[str, Case] = {}
_HF = SPELLINGS["rope: slices_and_stack"]
for _name, _rope in _rope_mutants.MUTANTS.items():
    # With cos and sin exchanged and sin negated, no angle is left that this would turn back by.
    _rest = _name in _rope_mutants.STILL_ROPES and _name != "cos_and_sin_exchanged"
    _left = {NAME: 1} if _rest else {}
    MUTANTS[f"rope: {_name}"] = Case(plain(_negated(_rope)), _usual(), _left, like=_HF)
for _name, _pieces in _quants.MUTANTS.items():
    MUTANTS[f"quant: {_name}"] = _case(
        _quant(**_pieces), None, "nverse rope", absent=("quant",), like=SPELLINGS["quant: default"]
    )
MUTANTS |= {
    # Turned forward: taken by the other fusion, as it should be.
    "forward": Case(
        plain(BACK), _usual(), {"norm_rope_cache": 1}, absent=("nverse",), like=_HF
    ),
    "cos negated": Case(plain(lambda x, c, s: BACK(x, -c, s)), _usual(), like=_HF, counts={}),
    "conjugate of the values": Case(
        plain(lambda x, f: _conjugate_of_values(x, f)),
        _usual(tables=None),
        like=SPELLINGS["rope: complex_cat"],
    ),
    "quant: heads in another order": _case(
        lambda x, c, s: grouped(_back(x, c, s).flip(2)),
        None,
        "nverse rope",
        absent=("quant",),
        like=SPELLINGS["quant: default"],
    ),
    "quant: tokens in another order": _case(
        lambda x, c, s: _turned_about(_merged(_back(x, c, s)))[1],
        inputs(S, S, H, table=(S, S, 1)),
        "nverse rope",
        absent=("quant",),
        like=SPELLINGS["quant: default"],
    ),
    "quant: scales of tokens in another order": _case(
        lambda x, c, s: [q[i] for i, q in enumerate(_turned_about(_merged(_back(x, c, s))))],
        inputs(S, S, H, table=(S, S, 1)),
        "nverse rope",
        like=SPELLINGS["quant: default"],
    ),
    "quant: of the input": _case(
        lambda x, c, s: (*grouped(x), _back(x, c, s)),
        None,
        "nverse rope",
        absent=("quant",),
        like=SPELLINGS["quant: default"],
    ),
    "quant: heads interleaved": _case(
        lambda x, c, s: grouped(_back(x, c, s).transpose(-1, -2).contiguous()),
        None,
        "nverse rope",
        absent=("quant",),
        like=SPELLINGS["quant: default"],
    ),
}


def _conjugate_of_values(x: Tensor, freqs: Tensor) -> Tensor:
    nope, r = x[..., :-ROPE], x[..., -ROPE:]
    z = torch.view_as_complex(r.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(z.conj() * freqs).flatten(-2)
    return torch.cat((nope, turned.to(x.dtype)), dim=-1)


KNOWN_MISSES: dict[str, Case] = {
    f"rope: {name}": _case(_negated(rope), why=why, exact=False)
    for name, (rope, why) in _ropes.MISSES.items()
}
for _name, (_pieces, _why) in _quants.MISSES.items():
    KNOWN_MISSES[f"quant: {_name}"] = _case(_quant(**_pieces), None, "fp8 quant", why=_why)
