"""fp4 (e2m1) known by what is computed, for PyTorch has no arithmetic in it.

People compare with midpoints, look up tables, or round what they divide by a power of two. Each is
a function of ``v = x / s``, with s a power of two and x of 16 bits: v then has as few bits as x, at
any exponent. So the term is run on every such value. One that gives ``atoms.e2m1`` on all becomes
``e2m1(v, form)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4fuse import atoms, compat
from dsv4fuse.terms import Term

NARROW = (torch.bfloat16, torch.float16)
# Every code, every midpoint and what lies around them: most other functions end here.
FEW = (*(k / 8 for k in range(-64, 65)), -0.0, math.inf, -math.inf, math.nan)


def rounding(a: tuple[Term, ...], d: torch.dtype | None, make: Callable[..., Term]) -> Term | None:
    """f(x / s)·s = e2m1(x / s)·s for a power of two s, and g·(f·s) where g is a sign."""
    if d is not torch.float32:
        return None
    for f, s in (a, a[::-1]):
        for g, body, scale in _factors(f, s, make):
            v = _quotient(body, scale)
            form = None if v is None or not _sign(g, v) else _form(body, v)
            if form is not None:
                coded = make("e2m1", (v, make("const", (float(form),), None)), d)
                return make("mul", (coded, scale), d)
    return None


def _factors(
    f: Term, s: Term, make: Callable[..., Term]
) -> Iterator[tuple[Term | None, Term, Term]]:
    """(None, f, s), and of g·(f·s) also (g, g·f, s)."""
    if _power_of_two(s):
        yield None, f, s
    if s.op == "mul":
        for g, p in (s.args, s.args[::-1]):
            if _power_of_two(p):
                yield f, make("mul", (f, g), torch.float32), p


def _sign(g: Term | None, v: Term) -> bool:
    """Is g a sign, with which a product is never rounded?"""
    if g is None:
        return True
    with compat.outside_compilation():
        found = _run(g, {v: every(_source(v))})
        return found is not None and bool(((found == found.sign()) | found.isnan()).all())


def _power_of_two(s: Term) -> bool:
    return s.op == "exp2" and s.args[0].op == "ceil"


def _inner(t: Term) -> Iterator[Term]:
    """Every term in t once, but nothing in reductions and leaves."""
    seen, stack = set(), [t]
    while stack:
        t = stack.pop()
        if t not in seen:
            seen.add(t)
            yield t
            stack += [] if t.op in ("fold", "e2m1") else [x for x in t.args if isinstance(x, Term)]


def _quotient(t: Term, s: Term) -> Term | None:
    """The one x / s in t, or x·(1 / s), where x is wider than it need be."""

    def over(q: Term) -> bool:
        if q.op == "div" and q.args[1] is s:
            return q.args[0].op == "cast" and q.args[0].args[0].dtype in NARROW
        inverse = q.op == "mul" and next((x for x in q.args if x.op == "div"), None)
        if not inverse or inverse.args[1] is not s or inverse.args[0].args[:1] != (1.0,):
            return False
        x = q.args[1 - q.args.index(inverse)]
        return x.op == "cast" and x.args[0].dtype in NARROW

    found = [q for q in _inner(t) if over(q)]
    return found[0] if len(found) == 1 and found[0] is not t else None


def _form(t: Term, v: Term) -> int | None:
    """The form of ``atoms.e2m1`` that t is, as a function of v."""
    forms = list(range(len(atoms.E2M1)))
    with compat.outside_compilation():
        for values in (torch.tensor(FEW), every(_source(v))):
            found = _run(t, {v: values})
            if found is None:
                return None
            forms = [k for k in forms if _same(found, values, atoms.E2M1[k])]
    return forms[0] if forms else None


def _source(v: Term) -> torch.dtype:
    """The dtype of the x that v is a quotient of."""
    return next(x.args[0].dtype for x in v.args if x.op == "cast")


@functools.cache
def every(dtype: torch.dtype) -> Tensor:
    """fp32: all with as few significant bits as a dtype has, and all powers of two."""
    spare = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    x = (torch.arange(1 << (32 - spare)) << spare).to(torch.int32).view(torch.float32)
    powers = torch.exp2(torch.arange(-149.0, 128.0))
    return torch.cat((x, powers, -powers))


def _same(f: Tensor, v: Tensor, form: str) -> bool:
    """Is f ``atoms.e2m1`` of v, but for the sign of what NaN becomes?"""
    wanted = atoms.e2m1(v, form=form)
    equal = (f == wanted) & (f.signbit() == wanted.signbit()) | f.isnan() & wanted.isnan()
    return bool((equal | v.isnan() & (f.abs() == wanted.abs())).all())


def _run(t: Term, known: dict[Term, Tensor]) -> Tensor | None:
    """t with the values of a term in it; None if it holds more than that and numbers."""
    values: dict[Any, Tensor] = dict(known)
    for x in _ordered(t, known):
        if x.op == "const":
            values[x] = torch.tensor(x.args[0], dtype=torch.float64)  # no axes: promotes nothing
            continue
        op = Tensor.clone if x.op == "cast" else getattr(torch, x.op, None)
        if op is None or not x.args or not all(y in values for y in x.args):
            return None
        values[x] = op(*(values[y] for y in x.args)).to(x.dtype)
    return values[t]


def _ordered(t: Term, known: Collection[Term]) -> list[Term]:
    """What t is made of, operands first, down to the terms that are known."""
    out: dict[Term, None] = {}
    stack = [(t, False)]
    while stack:
        x, done = stack.pop()
        if done:
            out[x] = None
        elif x not in out and x not in known:
            stack += [(x, True), *((y, False) for y in x.args if isinstance(y, Term))]
    return list(out)
