"""Every rule proved on bit patterns: both sides computed by PyTorch, operation by operation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4fuse import rules
from dsv4fuse.lower import Lowering
from dsv4fuse.terms import Term

from ._bits import (
    BF16,
    BITS,
    E4M3,
    FLOATS,
    FP16,
    FP32,
    evaluate,
    every,
    same_bits,
    specials,
)

# ---- one instance of a rule --------------------------------------------------------------------


@dataclass(frozen=True)
class Instance:
    """A term in which the rule fires: ``build`` gets ``make`` without rules and the leaves."""

    rule: str
    label: str
    op: str
    build: Callable[..., tuple[tuple[Term, ...], torch.dtype]]
    leaves: tuple[torch.dtype, ...]
    steps: float = 0.0  # of an ulp rule: how far its sides are apart at most, as measured here

    def __str__(self) -> str:
        return f"{self.rule}: {self.label}"


class Bench:
    """The two sides of an instance."""

    def __init__(self, instance: Instance) -> None:
        low = Lowering()
        raw = low.interner.make
        self.leaves = [raw("load", (k, None), d) for k, d in enumerate(instance.leaves)]
        args, dtype = instance.build(raw, low.interner.const, *self.leaves)
        rule = next(r for r in rules.RULES if r.name == instance.rule)
        self.left = raw(instance.op, args, dtype)
        assert instance.op in rule.ops
        self.right = rule.apply(args, dtype, low.make)
        assert self.right is not None, "the rule does not fire here"
        assert self.right is not self.left

    def sides(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        env = dict(zip(self.leaves, values, strict=True))
        return evaluate(self.left, env), evaluate(self.right, env)


def _unary(
    rule: str, op: str, dtypes: Any, build: Any, label: str = "", steps: Any = None
) -> Iterator[Instance]:
    for d in dtypes:
        yield Instance(
            rule, f"{label} {d}", op, lambda m, c, x, d=d: build(m, c, x, d), (d,),
            steps[d] if steps else 0.0,
        )  # fmt: skip


def _casts() -> Iterator[Instance]:
    for narrow, wides in rules.WIDER.items():
        for wide in wides:
            yield Instance(
                "cast", f"{narrow} through {wide}", "cast",
                lambda m, c, x, n=narrow, w=wide: ((m("cast", (x,), w),), n), (narrow,),
            )  # fmt: skip
            for wider in rules.WIDER.get(wide, ()):
                yield Instance(
                    "cast", f"{narrow} to {wide} to {wider}", "cast",
                    lambda m, c, x, w=wide, v=wider: ((m("cast", (x,), w),), v), (narrow,),
                )  # fmt: skip
            for op in ("neg", "abs"):
                if narrow is not E4M3:  # PyTorch has no arithmetic in e4m3
                    yield Instance(
                        "cast", f"{op} of {narrow} to {wide}", "cast",
                        lambda m, c, x, n=narrow, w=wide, o=op: ((m(o, (x,), n),), w), (narrow,),
                    )  # fmt: skip
            for op, bound in itertools.product(
                ("minimum", "maximum"), (0.0, -0.0, -1.5, 10.0, float("inf"))
            ):
                if narrow is not E4M3:
                    yield Instance(
                        "cast", f"{op} with {bound} of {narrow} to {wide}", "cast",
                        lambda m, c, x, n=narrow, w=wide, o=op, b=bound: (
                            (m(o, (x, c(b)), n),), w),
                        (narrow,),
                    )  # fmt: skip
    for narrow, bound in itertools.product((BF16, FP16), (0.0, -0.0, -1.5, 10.0, float("inf"))):
        yield Instance(
            "cast", f"clamped by {bound} in fp32, to {narrow}", "cast",
            lambda m, c, x, n=narrow, b=bound: (
                (m("maximum", (m("neg", (m("cast", (x,), FP32),), FP32), c(b)), FP32),), n),
            (narrow,),
        )  # fmt: skip
    yield from _unary("cast", "cast", (E4M3, *FLOATS), lambda m, c, x, d: ((x,), d), "itself")


def _wheres() -> Iterator[Instance]:
    for op, bound in itertools.product(("gt", "lt"), (10.0, -1.5, 1.3, 0.0, -0.0)):
        yield from _unary(
            "clamp by where", "where", FLOATS,
            lambda m, c, x, d, o=op, b=bound: ((m(o, (x, c(b)), torch.bool), c(b), x), d),
            f"{op} {bound}",
        )  # fmt: skip


def _clamps() -> Iterator[Instance]:
    for lo, hi in ((-10.0, 10.0), (0.0, 1.3), (-1.3, 0.0), (2.0, 2.0), (-448.0, 448.0),
                   (-0.0, 0.0), (0.0, -0.0), (float("-inf"), float("inf"))):  # fmt: skip
        yield from _unary(
            "clamp order", "maximum", FLOATS,
            lambda m, c, x, d, a=lo, b=hi: ((m("minimum", (x, c(b)), d), c(a)), d),
            f"{lo} to {hi}",
        )  # fmt: skip


def _e2m1(m: Any, c: Any, x: Term) -> tuple[tuple[Term, ...], torch.dtype]:
    """f(x / s)·s for s = 2^⌈min(|x|, 3)⌉ and f rounding in steps of ½, 1 and 2."""

    def op(name: str, *args: Any) -> Term:
        terms = (a if isinstance(a, Term) else c(a) for a in args)
        return m(name, tuple(terms), torch.bool if name == "lt" else FP32)

    wide = op("cast", x)
    s = op("exp2", op("ceil", op("minimum", op("abs", wide), 3.0)))
    v = op("div", wide, s)
    a = op("minimum", op("abs", v), 6.0)
    step = op("where", op("lt", a, 4.0), 1.0, 2.0)
    large = op("mul", op("round", op("div", a, step)), step)
    small = op("mul", op("round", op("mul", a, 2.0)), 0.5)
    return (op("copysign", op("where", op("lt", a, 2.0), small, large), v), s), FP32


UNARY = [
    *_casts(),
    *_wheres(),
    *_clamps(),
    *_unary("unit factor", "mul", FLOATS, lambda m, c, x, d: ((x, c(1.0)), d), "one"),
    *_unary("unit factor", "mul", FLOATS, lambda m, c, x, d: ((x, c(-1.0)), d), "minus one"),
    *_unary("sign of sign", "neg", FLOATS, lambda m, c, x, d: ((m("neg", (x,), d),), d)),
    *_unary("abs of sign", "abs", FLOATS, lambda m, c, x, d: ((m("neg", (x,), d),), d)),
    *_unary(
        "abs of unsigned", "abs", FLOATS,
        lambda m, c, x, d: ((m("maximum", (x, c(0.3)), d),), d), "above a bound",
    ),
    *_unary(
        "abs of unsigned", "abs", FLOATS,
        lambda m, c, x, d: ((m("div", (m("abs", (x,), d), c(448.0)), d),), d), "a quotient",
    ),
    *_unary("reciprocal", "reciprocal", FLOATS, lambda m, c, x, d: ((x,), d)),
    *_unary("difference", "sub", FLOATS, lambda m, c, x, d: ((c(0.3), x), d), "from a number"),
    *_unary(
        "sign of product", "mul", FLOATS,
        lambda m, c, x, d: ((m("neg", (x,), d), c(0.3)), d), "by a number",
    ),
    *_unary("e2m1", "mul", (BF16, FP16), lambda m, c, x, d: _e2m1(m, c, x)),
]  # fmt: skip


def _binary(
    rule: str, op: str, build: Any, label: str = "", steps: Any = None
) -> Iterator[Instance]:
    for d in FLOATS:
        yield Instance(
            rule, f"{label} {d}", op, lambda m, c, x, y, d=d: (build(m, x, y, d), d), (d, d),
            steps[d] if steps else 0.0,
        )  # fmt: skip


BINARY = [
    *_binary("sign of product", "mul", lambda m, x, y, d: (m("neg", (x,), d), y)),
    *_binary("sign of product", "mul", lambda m, x, y, d: (x, m("neg", (y,), d)), "second"),
    *_binary("difference", "sub", lambda m, x, y, d: (x, y)),
    *(
        Instance(
            "cast", f"{op} of two {n} to fp32", "cast",
            lambda m, c, x, y, n=n, o=op: ((m(o, (x, y), n),), FP32), (n, n),
        )
        for n in (BF16, FP16) for op in ("minimum", "maximum")
    ),
    *(
        Instance(
            "cast", f"{op} in fp32 of two {n}", "cast",
            lambda m, c, x, y, n=n, o=op: (
                (m(o, (m("cast", (x,), FP32), m("cast", (y,), FP32)), FP32),), n),
            (n, n),
        )
        for n in (BF16, FP16) for op in ("minimum", "maximum")
    ),
]  # fmt: skip

def _one_plus_exp(m: Any, c: Any, x: Term, d: torch.dtype) -> Term:
    return m("add", (c(1.0), m("exp", (m("neg", (x,), d),), d)), d)


ROOT, QUOTIENT = {BF16: 1.0, FP16: 1.0, FP32: 2.0}, {BF16: 2.0, FP16: 2.0, FP32: 3.0}
LOOSE = [
    *_unary("divide by root", "div", FLOATS,
            lambda m, c, x, d: ((c(1.0), m("sqrt", (x,), d)), d), "one", ROOT),
    *_unary("silu by sigmoid", "mul", (FP32,),
            lambda m, c, x, d: ((x, m("sigmoid", (x,), d)), d), "", {FP32: 5.0}),
    *_unary("silu by sigmoid", "mul", (FP32,),
            lambda m, c, x, d: ((x, m("div", (c(1.0), _one_plus_exp(m, c, x, d)), d)), d),
            "written out", {FP32: 5.0}),
]  # fmt: skip
LOOSE_BINARY = [
    *_binary("divide by root", "div", lambda m, x, y, d: (x, m("sqrt", (y,), d)), "any", QUOTIENT)
]
ROWS = 1000
LOOSE_FOLD = [
    Instance(
        "mean by sum", f"over {n} {d}", "div",
        lambda m, c, x, n=n, d=d: (
            (m("fold", ("sum", x, (1,), (ROWS, n), (ROWS, 1)), d), c(float(n))), d),
        (d,), steps,
    )
    for n, steps in {1: 0.0, 3: 1.0, 48: 1.0, 96: 1.0, 512: 0.0, 1000: 1.0}.items()
    for d in (FP32,)
]  # fmt: skip
WHOLE = [
    Instance(
        "clamp of integers by where", f"{op} {bound}, {order} {d}", "where",
        lambda m, c, i, d=d, o=op, b=bound, order=order: (
            (m(o, (i, c(b)), torch.bool), *((c(b), i) if order == "bound first" else (i, c(b)))),
            d), (d,),
    )
    for d in rules.INTEGERS for op in ("lt", "le", "gt", "ge") for bound in (0, -3, 4)
    for order in ("bound first", "bound last")
]  # fmt: skip
# Below this nothing is promised of silu: exp(-x) overflows where x·sigmoid(x) is still a number.
SILU_FLOOR = 2e-37


def test_every_rule_is_proved():
    proved = {i.rule for i in (*UNARY, *BINARY, *WHOLE, *LOOSE, *LOOSE_BINARY, *LOOSE_FOLD)}
    assert {r.name for r in rules.RULES} == proved
    measured = {i.rule for i in (*LOOSE, *LOOSE_BINARY, *LOOSE_FOLD)}
    assert {r.name for r in rules.RULES if r.kind == "ulp"} == measured
    assert {r.kind for r in rules.RULES} == {"exact", "ulp"}


def _inputs(dtype: torch.dtype) -> Tensor:
    """All patterns, or for fp32 the specials and a million at random."""
    if dtype is not FP32:
        return every(dtype)
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=g, dtype=torch.int64)
    return torch.cat((specials(FP32), bits.to(torch.int32).view(FP32)))


@pytest.mark.parametrize("instance", UNARY, ids=str)
def test_exact_on_every_pattern(instance):
    same_bits(*Bench(instance).sides(_inputs(instance.leaves[0])))


@pytest.mark.parametrize("instance", WHOLE, ids=str)
def test_exact_on_integers(instance):
    (d,) = instance.leaves
    ends = torch.iinfo(d)
    left, right = Bench(instance).sides(torch.tensor([*range(-9, 9), ends.min, ends.max], dtype=d))
    assert left.dtype == right.dtype == d and torch.equal(left, right)


@pytest.mark.parametrize("dtype", [E4M3, *FLOATS])
@pytest.mark.parametrize("value", [0.1, -0.0, 1e-7, 300.0, 1e6, math.inf])
def test_a_number_is_what_its_dtype_holds(value, dtype):
    low = Lowering()
    number = low.make("cast", (low.interner.const(value),), dtype)
    assert number.op == "const" and number.dtype is None
    held = torch.tensor([value], dtype=torch.float64).to(dtype)
    same_bits(torch.tensor([number.args[0]], dtype=torch.float64), held.double())


_numbers = st.one_of(
    st.integers(0, 39).map(lambda k: ("special", k)),
    st.integers(0, 2**32 - 1).map(lambda b: ("bits", b)),
)


def _drawn(draws: list[Any], dtype: torch.dtype) -> Tensor:
    known = specials(dtype)
    wide = torch.tensor([b for _, b in draws], dtype=torch.int64)
    bits = wide.to(BITS[dtype]).view(dtype)
    pick = torch.tensor([kind == "special" for kind, _ in draws])
    return torch.where(pick, known[wide.clamp(0, len(known) - 1)], bits)


@pytest.mark.parametrize("instance", BINARY, ids=str)
@settings(max_examples=25)
@given(pairs=st.lists(st.tuples(_numbers, _numbers), min_size=1, max_size=40))
def test_exact_on_pairs(instance, pairs):
    d = instance.leaves[0]
    known = specials(d)
    x = torch.cat((_drawn([a for a, _ in pairs], d), known.repeat_interleave(len(known))))
    y = torch.cat((_drawn([b for _, b in pairs], d), known.repeat(len(known))))
    same_bits(*Bench(instance).sides(x, y))


def _apart(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """The largest difference in rounding steps of the larger, NaN and zeros' signs being equal.

    Infinity counts as the number that comes after the largest; steps below the smallest normal
    number are the subnormals'.
    """
    info = torch.finfo(a.dtype)
    beyond = 2.0 ** (math.floor(math.log2(info.max)) + 1)
    x, y = (t.double().nan_to_num(nan=math.nan, posinf=beyond, neginf=-beyond) for t in (a, b))
    assert torch.equal(x.isnan(), y.isnan())
    larger = torch.maximum(x.abs(), y.abs())
    assert torch.equal(x.signbit()[larger > 0], y.signbit()[larger > 0])
    step = info.eps * torch.exp2(torch.floor(torch.log2(larger.clamp_min(info.tiny))))
    return torch.where(larger > floor, (x - y).abs() / step, 0.0).nan_to_num().max().item()


def _as_measured(worst: float, instance: Instance) -> None:
    """No farther apart than is said, and what is said is no wide guess."""
    assert instance.steps / 2 <= worst <= instance.steps, worst


@pytest.mark.parametrize("instance", LOOSE, ids=str)
def test_ulp_on_every_pattern(instance):
    (d,) = instance.leaves
    inputs, floor = _inputs(d), 0.0
    if instance.rule == "silu by sigmoid":
        inputs = torch.cat((inputs, torch.linspace(-110, 110, 1 << 18)))
        floor = SILU_FLOOR
    left, right = Bench(instance).sides(inputs)
    _as_measured(_apart(left, right, floor), instance)
    assert (left - right)[left.abs() <= floor].abs().nan_to_num().max() <= floor


@pytest.mark.parametrize("instance", LOOSE_BINARY, ids=str)
def test_ulp_on_pairs(instance):
    d = instance.leaves[0]
    numbers, known = _inputs(d), specials(d)
    g = torch.Generator().manual_seed(1)
    pairs = [(known.repeat_interleave(len(known)), known.repeat(len(known)))]
    for _ in range(4 if d is FP32 else 16):
        pairs.append(tuple(numbers[torch.randperm(len(numbers), generator=g)] for _ in "xy"))
    _as_measured(max(_apart(*Bench(instance).sides(*pair)) for pair in pairs), instance)


@pytest.mark.parametrize("instance", LOOSE_FOLD, ids=str)
def test_ulp_on_rows(instance):
    """A mean is the same sum, divided by N on a CPU and multiplied by 1/N in fp32 on a GPU."""
    bench, (d,) = Bench(instance), instance.leaves
    rows, n = bench.left.args[0].args[3]
    g = torch.Generator().manual_seed(2)
    size, numbers = torch.logspace(-2, 1, rows)[:, None], _inputs(d)
    worst = 0.0
    for x in (
        torch.rand(rows, n, generator=g) * size,
        torch.randn(rows, n, generator=g).square() * size,
        torch.randn(rows, n, generator=g) * size,  # with cancellation
        numbers[torch.randint(len(numbers), (rows, n), generator=g)],
    ):
        by_sum, by_mean = bench.sides(x)
        on_gpu = x.sum(1) * torch.tensor(1 / n, dtype=FP32)
        worst = max(worst, _apart(by_sum, by_mean), _apart(by_sum, on_gpu.to(d)))
    _as_measured(worst, instance)
