"""fp4 (e2m1) fake quantisation as people write it, one piece of it changed at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX = 6.0
FLOOR = 0.5  # large enough that some blocks lie below it
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
Piece = Callable[..., Any]


def by_exponent(v: Tensor) -> Tensor:
    """Rounded in steps of half its power of two."""
    step = torch.exp2(v.abs().clamp(1.0, MAX).log2().floor() - 1)
    return torch.round(v / step) * step


def by_steps(v: Tensor) -> Tensor:
    """One of three steps."""
    a = v.abs()
    q = torch.where(a < 2, (a * 2).round() / 2, torch.where(a < 4, a.round(), (a / 2).round() * 2))
    return torch.copysign(q, v)


def by_where(v: Tensor) -> Tensor:
    """Compared from below, the even neighbour of a midpoint taking it."""
    a = v.abs()
    q = torch.full_like(a, MAX)
    for k in reversed(range(len(MIDPOINTS))):
        test = a <= MIDPOINTS[k] if k % 2 == 0 else a < MIDPOINTS[k]
        q = torch.where(test, CODES[k], q)
    return torch.where(v < 0, -q, q)


def by_sum(v: Tensor) -> Tensor:
    """A sum of what lies between codes."""
    a = v.abs()
    q = torch.zeros_like(a)
    for k, middle in enumerate(MIDPOINTS):
        test = a >= middle if k % 2 else a > middle
        q = q + test.float() * (CODES[k + 1] - CODES[k])
    return q * v.sign()


def by_masks(v: Tensor) -> Tensor:
    """Range after range assigned, as the tests of an engine do."""
    sign, a = torch.sign(v), torch.abs(v)
    a[(a >= 0.0) & (a <= 0.25)] = 0.0
    a[(a > 0.25) & (a < 0.75)] = 0.5
    a[(a >= 0.75) & (a <= 1.25)] = 1.0
    a[(a > 1.25) & (a < 1.75)] = 1.5
    a[(a >= 1.75) & (a <= 2.5)] = 2.0
    a[(a > 2.5) & (a < 3.5)] = 3.0
    a[(a >= 3.5) & (a <= 5.0)] = 4.0
    a[a > 5.0] = 6.0
    return a * sign


def _bounds(even: bool = True) -> list[float]:
    """Midpoints, the odd ones an fp32 step below, as a bound itself belongs to what is below it."""
    below = [torch.tensor(b).nextafter(torch.tensor(0.0)).item() for b in MIDPOINTS]
    return [below[k] if k % 2 and even else b for k, b in enumerate(MIDPOINTS)]


def by_table(v: Tensor, even: bool = True) -> Tensor:
    """Ranked among the midpoints, looked up."""
    table = torch.tensor(CODES)
    return torch.copysign(table[torch.bucketize(v.abs(), torch.tensor(_bounds(even)))], v)


def by_signed_table(v: Tensor) -> Tensor:
    """The table with its negatives."""
    table = torch.tensor([-c for c in CODES[:0:-1]] + list(CODES))
    bounds = [-b for b in MIDPOINTS[::-1]] + list(MIDPOINTS)
    low = torch.tensor(bounds)
    down, up = torch.searchsorted(low, v), torch.searchsorted(low, v, right=True)
    return table[torch.where(down % 2 == 1, down, up)]


def by_distance(v: Tensor) -> Tensor:
    """The nearest of a table, the first of two."""
    table = torch.tensor(CODES)
    return table[(v.abs().unsqueeze(-1) - table).abs().argmin(-1)] * v.sign()


def pow2(a: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(a / MAX)))


def fake(
    x: Tensor,
    group: int,
    *,
    amax: Piece = lambda b: b.float().abs().amax(-1, keepdim=True),
    floor: Piece = lambda a: a.clamp_min(FLOOR),
    scale: Piece = pow2,
    over: Piece = lambda b, s: b.float() / s,
    clamp: Piece = lambda v: v.clamp(-MAX, MAX),
    code: Piece = by_exponent,
    back: Piece = lambda q, s: q * s,
) -> Tensor:
    """x through fp4 and back."""
    b = x.unflatten(-1, (-1, group))
    s = scale(floor(amax(b)))
    return back(code(clamp(over(b, s))), s).flatten(-2).to(x.dtype)


VARIANTS: dict[str, dict[str, Piece]] = {
    "exponent": {},
    "steps": dict(code=by_steps),
    "where": dict(code=by_where),
    "sum": dict(code=by_sum),
    "masks": dict(code=by_masks),
    "table": dict(code=by_table),
    "signed table": dict(code=by_signed_table),
    "not clamped": dict(code=by_where, clamp=lambda v: v),
    "times inverse": dict(scale=lambda a: (a * (1 / MAX)).log2().ceil().exp2()),
    "reciprocal": dict(over=lambda b, s: b.float() * s.reciprocal()),
    "promoted": dict(over=lambda b, s: b / s),
    "least floor": dict(floor=lambda a: a.clamp_min(MAX * 2.0**-126)),
    "sign last": dict(code=lambda v: v, back=lambda v, s: v.sign() * (by_where(v.abs()) * s)),
}


def _ties(up: bool) -> Piece:
    """Midpoints to the larger, or to the smaller, whichever is even."""

    def code(v: Tensor) -> Tensor:
        a = v.abs()
        q = sum(
            (a >= m if up else a > m).float() * (CODES[k + 1] - CODES[k])
            for k, m in enumerate(MIDPOINTS)
        )
        return q * v.sign()  # type: ignore[operator]

    return code


MUTANTS: dict[str, dict[str, Piece]] = {  # of "exponent"
    "ties down": dict(code=_ties(up=False)),
    "ties up": dict(code=_ties(up=True)),
    "ties by table": dict(code=lambda v: by_table(v, even=False)),
    "nearest of a table": dict(code=by_distance),
    "truncated": dict(code=lambda v: torch.trunc(v * 2) / 2),
    "another code": dict(
        code=lambda v: torch.where(by_where(v).abs() == 3, by_where(v) * 5 / 6, by_where(v))
    ),
    "no sign": dict(code=lambda v: by_where(v).abs()),
    "int4": dict(code=torch.round),
    "other maximum": dict(scale=lambda a: torch.exp2(torch.ceil(torch.log2(a / 4)))),
    "scale not of 6": dict(scale=lambda a: torch.exp2(torch.floor(torch.log2(a / MAX)))),
    "scale of next block": dict(amax=lambda b: b.roll(1, -2).float().abs().amax(-1, keepdim=True)),
    "half the block": dict(amax=lambda b: b[..., ::2].float().abs().amax(-1, keepdim=True)),
    "not scaled back": dict(back=lambda q, s: q),
}
