"""Every rule proved on bit patterns: both sides computed by PyTorch, operation by operation."""

from __future__ import annotations

import itertools
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


def _unary(rule: str, op: str, dtypes: Any, build: Any, label: str = "") -> Iterator[Instance]:
    for d in dtypes:
        yield Instance(rule, f"{label} {d}", op, lambda m, c, x, d=d: build(m, c, x, d), (d,))


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
            for op, bound in itertools.product(("minimum", "maximum"), (0.0, -1.5, 10.0)):
                if narrow is not E4M3:
                    yield Instance(
                        "cast", f"{op} with {bound} of {narrow} to {wide}", "cast",
                        lambda m, c, x, n=narrow, w=wide, o=op, b=bound: (
                            (m(o, (x, c(b)), n),), w),
                        (narrow,),
                    )  # fmt: skip
    yield from _unary("cast", "cast", (E4M3, *FLOATS), lambda m, c, x, d: ((x,), d), "itself")


def _wheres() -> Iterator[Instance]:
    for op, bound in itertools.product(("gt", "lt"), (10.0, -1.5, 1.3, 0.0)):
        yield from _unary(
            "clamp by where", "where", FLOATS,
            lambda m, c, x, d, o=op, b=bound: ((m(o, (x, c(b)), torch.bool), c(b), x), d),
            f"{op} {bound}",
        )  # fmt: skip


def _clamps() -> Iterator[Instance]:
    for lo, hi in ((-10.0, 10.0), (0.0, 1.3), (-1.3, 0.0), (2.0, 2.0), (-448.0, 448.0)):
        yield from _unary(
            "clamp order", "maximum", FLOATS,
            lambda m, c, x, d, a=lo, b=hi: ((m("minimum", (x, c(b)), d), c(a)), d),
            f"{lo} to {hi}",
        )  # fmt: skip


UNARY = [
    *_casts(),
    *_wheres(),
    *_clamps(),
    *_unary("unit factor", "mul", FLOATS, lambda m, c, x, d: ((x, c(1.0)), d), "one"),
    *_unary("unit factor", "mul", FLOATS, lambda m, c, x, d: ((x, c(-1.0)), d), "minus one"),
    *_unary("sign of sign", "neg", FLOATS, lambda m, c, x, d: ((m("neg", (x,), d),), d)),
    *_unary("abs of sign", "abs", FLOATS, lambda m, c, x, d: ((m("neg", (x,), d),), d)),
    *_unary("reciprocal", "reciprocal", FLOATS, lambda m, c, x, d: ((x,), d)),
    *_unary("difference", "sub", FLOATS, lambda m, c, x, d: ((c(0.3), x), d), "from a number"),
    *_unary(
        "sign of product", "mul", FLOATS,
        lambda m, c, x, d: ((m("neg", (x,), d), c(0.3)), d), "by a number",
    ),
]  # fmt: skip


def _binary(rule: str, op: str, build: Any, label: str = "") -> Iterator[Instance]:
    for d in FLOATS:
        yield Instance(
            rule, f"{label} {d}", op, lambda m, c, x, y, d=d: (build(m, x, y, d), d), (d, d)
        )


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
]  # fmt: skip

# name of an ulp rule → instances; the bound in rounding steps is asserted below
LOOSE = [
    *_unary(
        "divide by root", "div", FLOATS, lambda m, c, x, d: ((c(1.0), m("sqrt", (x,), d)), d), "one"
    ),
    *_unary("silu by sigmoid", "mul", FLOATS, lambda m, c, x, d: ((x, m("sigmoid", (x,), d)), d)),
]
LOOSE_BINARY = [
    *_binary("divide by root", "div", lambda m, x, y, d: (x, m("sqrt", (y,), d)), "any")
]
ROWS = 1000
LOOSE_FOLD = [
    Instance(
        "mean by sum", f"over {n} {d}", "div",
        lambda m, c, x, n=n, d=d: (
            (m("fold", ("sum", x, (1,), (ROWS, n), (ROWS, 1)), d), c(float(n))), d),
        (d,),
    )
    for n in (1, 3, 48, 96, 512, 1000) for d in (FP32,)
]  # fmt: skip
# Rounding steps of the result between the two sides, and the value below which nothing is
# promised: exp(-x) overflows where x·sigmoid(x) is still a small number.
ULPS = {"divide by root": 2.0, "silu by sigmoid": 3.0, "mean by sum": 2.0}
FLOOR = {BF16: 1e-36, FP16: 2e-4, FP32: 1e-36}


def test_every_rule_is_proved():
    proved = {i.rule for i in (*UNARY, *BINARY, *LOOSE, *LOOSE_BINARY, *LOOSE_FOLD)}
    assert {r.name for r in rules.RULES} == proved
    assert {r.name for r in rules.RULES if r.kind == "ulp"} == set(ULPS)
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


def _within(a: Tensor, b: Tensor, rule: str) -> None:
    x, y = a.double(), b.double()
    assert torch.equal(x.isnan(), y.isnan())
    assert torch.equal(x.isinf(), y.isinf())
    x, y = x.nan_to_num(posinf=0.0, neginf=0.0), y.nan_to_num(posinf=0.0, neginf=0.0)
    larger = torch.maximum(x.abs(), y.abs())
    step = torch.finfo(a.dtype).eps * torch.exp2(torch.floor(torch.log2(larger + 1e-300)))
    steps = torch.where(larger < FLOOR[a.dtype], 0.0, (x - y).abs() / step)
    assert steps.max() <= ULPS[rule], steps.max()


@pytest.mark.parametrize("instance", LOOSE, ids=str)
def test_ulp_on_every_pattern(instance):
    _within(*Bench(instance).sides(_inputs(instance.leaves[0])), instance.rule)


@pytest.mark.parametrize("instance", LOOSE_BINARY, ids=str)
def test_ulp_on_pairs(instance):
    d = instance.leaves[0]
    numbers = _inputs(d)
    g = torch.Generator().manual_seed(1)
    for _ in range(4):
        # Normal numbers of middling size: where a factor or the result is subnormal, or the
        # product leaves the range, a step of the result says nothing about the rule.
        x, y = (numbers[torch.randperm(len(numbers), generator=g)] for _ in range(2))
        keep = (x.abs() > 1e-2) & (x.abs() < 100) & (y > 1e-2) & (y < 100)
        _within(*Bench(instance).sides(x[keep], y[keep]), instance.rule)


@pytest.mark.parametrize("instance", LOOSE_FOLD, ids=str)
def test_ulp_on_rows(instance):
    """A mean is the same sum, divided by N on a CPU and multiplied by 1/N in fp32 on a GPU."""
    bench, (d,) = Bench(instance), instance.leaves
    rows, n = bench.left.args[0].args[3]
    g = torch.Generator().manual_seed(2)
    size = torch.logspace(-2, 1, rows)[:, None]
    inputs = [x.to(d) for x in (torch.rand(rows, n, generator=g) * size,
                                torch.randn(rows, n, generator=g).square() * size)]  # fmt: skip
    if d is FP32:
        numbers = _inputs(d)
        inputs.append(numbers[torch.randint(len(numbers), (rows, n), generator=g)])
        inputs.append(torch.randn(rows, n, generator=g) * size)  # with cancellation
    for x in inputs:
        by_sum, by_mean = bench.sides(x)
        _within(by_sum, by_mean, instance.rule)
        on_gpu = x.float().sum(1) * torch.tensor(1 / n, dtype=FP32)
        _within(by_sum, on_gpu.to(d), instance.rule)
