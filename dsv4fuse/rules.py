"""Rules that bring elementwise terms to normal form: one line each, with its reason.

``exact`` rules hold bit for bit on every input, NaN, infinities and signed zeros included (the
sign and payload of a NaN aside). ``ulp`` rules hold up to a few rounding steps of the result, five
at most as measured; a site that used one says so. Nothing else is a rule: no reassociation, no
distribution, since both change rounding. A rule is a function of (op, args, dtype, make) that
answers the new term or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4fuse import e2m1
from dsv4fuse.terms import Term

Make = Callable[..., Term]
WIDER = {  # casts that keep every value
    torch.float8_e4m3fn: (torch.bfloat16, torch.float16, torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
INTEGERS = (torch.int32, torch.int64)  # of indices, the narrower first


@dataclass(frozen=True)
class Rule:
    """One rewriting step; ``ops`` are the operations it looks at."""

    name: str
    kind: str  # "exact" or "ulp"
    ops: tuple[str, ...]
    apply: Callable[[tuple[Term, ...], torch.dtype | None, Make], Term | None]


def widens(narrow: torch.dtype | None, wide: torch.dtype | None) -> bool:
    return narrow is not None and wide in WIDER.get(narrow, ())


def number(t: Term) -> float | None:
    return t.args[0] if t.op == "const" else None


def scaled(t: Term) -> tuple[Term, float]:
    """(x, c) of c·x; c is 1 where t is no such product."""
    if t.op == "mul":
        for x, c in (t.args, t.args[::-1]):
            value = number(c)
            if value is not None:
                return x, value
    return t, 1.0


def rounded(value: float, dtype: torch.dtype) -> float:
    """The number that dtype holds for a value."""
    return torch.tensor(value, dtype=torch.float64).to(dtype).item()


def holds(value: float, dtype: torch.dtype | None) -> bool:
    """True when dtype represents the value exactly."""
    if dtype is None or not dtype.is_floating_point:
        return False
    return rounded(value, dtype) == value


SELECTING = ("minimum", "maximum", "neg", "abs")  # each result is an operand, but for its sign


def _narrowed(t: Term, d: torch.dtype | None, make: Make) -> Term | None:
    """t in d, where it only selects among widened values of d, numbers that d holds, and signs."""
    if t.op == "const":
        return t if holds(t.args[0], d) else None
    if t.op == "cast":
        return t.args[0] if t.args[0].dtype is d and widens(d, t.dtype) else None
    if t.op not in SELECTING or d not in (torch.bfloat16, torch.float16):
        return None
    args = [_narrowed(x, d, make) for x in t.args]
    return None if None in args else make(t.op, tuple(args), d)


def _cast(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    (x,) = a
    if x.op == "const":
        held = d is not None and d.is_floating_point
        return make("const", (rounded(x.args[0], d),), None) if held else None
    if x.dtype is d:
        return x  # a cast to the same dtype
    if x.op == "cast" and x.args[0].dtype is d and widens(d, x.dtype):
        return x.args[0]  # narrow ∘ widen
    if x.op == "cast" and widens(x.args[0].dtype, x.dtype) and widens(x.dtype, d):
        return make("cast", (x.args[0],), d)  # widen ∘ widen
    if not widens(x.dtype, d):
        return _narrowed(x, d, make) if x.op in SELECTING else None
    if x.op in ("neg", "abs"):
        return make(x.op, (make("cast", x.args, d),), d)  # sign changes commute with widening
    if x.op in ("minimum", "maximum") and all(
        t.op != "const" or holds(t.args[0], x.dtype) for t in x.args
    ):  # selecting commutes with widening where the bound itself is representable
        return make(x.op, tuple(t if t.op == "const" else make("cast", (t,), d) for t in x.args), d)
    return None


def _signs(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    """(-x)·y = -(x·y): signs move outward."""
    for i, t in enumerate(a):
        if t.op == "neg" and t.dtype is d:
            return make("neg", (make("mul", (*a[:i], t.args[0], *a[i + 1 :]), d),), d)
    return None


def _negated(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    (x,) = a
    if x.op == "const":
        return make("const", (-x.args[0],), None)
    return x.args[0] if x.op == "neg" else None


def _no_sign(t: Term) -> bool:
    """Is t above or +0, or NaN?"""
    if t.op in ("mul", "div"):
        return _no_sign(t.args[0]) and (_no_sign(t.args[1]) or (number(t.args[1]) or 0.0) > 0.0)
    if t.op == "maximum" and t.dtype is not None and t.dtype.is_floating_point:
        # A bound that the dtype rounds to 0 would leave the sign of -0 open.
        return any((number(x) or 0.0) >= torch.finfo(t.dtype).tiny for x in t.args)
    return t.op in ("abs", "exp")


def _clamp_order(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    """max(min(x, hi), lo) = min(max(x, lo), hi) for lo ≤ hi."""
    for inner, lo in (a, a[::-1]):
        if number(lo) is None or inner.op != "minimum":
            continue
        for x, hi in (inner.args, inner.args[::-1]):
            if number(hi) is not None and lo.args[0] <= hi.args[0] and number(x) is None:
                return make("minimum", (make("maximum", (x, lo), d), hi), d)
    return None


def _unit(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    for x, c in (a, a[::-1]):
        if number(c) == 1.0 and x.dtype is d:
            return x
        if number(c) == -1.0 and x.dtype is d:
            return make("neg", (x,), d)
    return None


def _where(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    """where(x > c, c, x) = min(x, c), where(x < c, c, x) = max(x, c); NaN stays x in both.

    Not with ≥ or ≤: at c = 0 they answer c's zero for x = -0, the clamp either. The test's c is
    the number as it is written, the other one as x's dtype holds it, to which the test rounds too.
    """
    test, yes, no = a
    if test.op not in ("gt", "lt") or test.args[0] is not no or no.dtype is not d:
        return None
    bound, held = number(test.args[1]), number(yes)
    if bound is None or held is None or d is None or not d.is_floating_point:
        return None
    if repr(held) not in (repr(bound), repr(rounded(bound, d))):  # 0.0 == -0.0, in a clamp too
        return None
    return make("minimum" if test.op == "gt" else "maximum", (no, test.args[1]), d)


def _where_whole(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    """where(i < n, n, i) = max(i, n) of integers, which have no NaN and one zero; so with ≤, > and
    ≥, and with the values the other way round."""
    test, yes, no = a
    if d not in INTEGERS or test.op not in ("lt", "le", "gt", "ge"):
        return None
    i, n = test.args
    if i.dtype is not d or {yes, no} != {i, n}:
        return None
    smaller = (yes is i) == (test.op in ("lt", "le"))
    return make("minimum" if smaller else "maximum", (i, n), d)


def _is(t: Term, op: str) -> bool:
    return t.op == op


def _one_plus_exp_neg(t: Term) -> Term | None:
    """x of 1 + exp(-x)."""
    if t.op == "add":
        for e, one in (t.args, t.args[::-1]):
            if number(one) == 1.0 and e.op == "exp" and e.args[0].op == "neg":
                return e.args[0].args[0]
    return None


def _over_root(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    """1/sqrt(y) ~ rsqrt(y), x/sqrt(y) ~ x·rsqrt(y)."""
    x, y = a
    if y.op != "sqrt":
        return None
    root = make("rsqrt", y.args, d)
    return root if number(x) == 1.0 else make("mul", (x, root), d)


def _mean(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    """sum(x) / N ~ mean(x), where a narrow sum cannot overflow first."""
    x, n = a
    wide = d in (torch.float32, torch.float64)
    if not wide or x.op != "fold" or x.args[0] != "sum" or number(n) is None:
        return None
    extents = [x.args[3][axis] for axis in x.args[2]]
    if not all(isinstance(e, int) for e in extents) or math.prod(extents) != n.args[0]:
        return None
    return make("fold", ("mean", *x.args[1:]), d)


def _silu(a: tuple[Term, ...], d: torch.dtype | None, make: Make) -> Term | None:
    """x·sigmoid(x) ~ x/(1+exp(-x)), the form that PyTorch's own silu computes.

    In fp32 and wider only: in fp16 exp(-x) overflows where the product is still 2e-4.
    """
    if d not in (torch.float32, torch.float64):
        return None
    for x, gate in (a, a[::-1]):
        inner = gate.args[0] if gate.op == "sigmoid" else None
        if gate.op == "div" and number(gate.args[0]) == 1.0:
            inner = _one_plus_exp_neg(gate.args[1])
        if inner is x:
            e = make("exp", (make("neg", (x,), d),), d)
            return make("div", (x, make("add", (make("const", (1.0,), None), e), d)), d)
    return None


RULES: tuple[Rule, ...] = (
    Rule("cast", "exact", ("cast",), _cast),  # values that survive the trip
    Rule("unit factor", "exact", ("mul",), _unit),  # x·1 = x, x·-1 = -x
    Rule("sign of product", "exact", ("mul",), _signs),  # rounding is symmetric
    Rule("sign of sign", "exact", ("neg",), _negated),  # -(-x) = x, -(c) is a number
    Rule(
        "abs of sign",
        "exact",
        ("abs",),
        lambda a, d, make: make("abs", a[0].args, d) if _is(a[0], "neg") else None,
    ),  # |-x| = |x|
    Rule(
        "abs of unsigned", "exact", ("abs",), lambda a, d, make: a[0] if _no_sign(a[0]) else None
    ),  # |max(x, c)| = max(x, c) for c > 0
    Rule("clamp order", "exact", ("maximum",), _clamp_order),  # lo ≤ hi
    Rule("clamp by where", "exact", ("where",), _where),
    Rule("clamp of integers by where", "exact", ("where",), _where_whole),
    Rule(
        "difference",
        "exact",
        ("sub",),
        lambda a, d, make: make("add", (a[0], make("neg", (a[1],), d)), d),
    ),  # x - y = x + (-y)
    Rule("divide by root", "ulp", ("div",), _over_root),  # x/sqrt(y) ~ x·rsqrt(y)
    Rule("mean by sum", "ulp", ("div",), _mean),  # sum(x)/N ~ mean(x)
    Rule("silu by sigmoid", "ulp", ("mul",), _silu),  # x·sigmoid(x) ~ x/(1+exp(-x))
    Rule(
        "reciprocal",
        "exact",
        ("reciprocal",),
        lambda a, d, make: make("div", (make("const", (1.0,), None), a[0]), d),
    ),  # 1/x is a division
    Rule("e2m1", "exact", ("mul",), e2m1.rounding),  # run on every value
)
