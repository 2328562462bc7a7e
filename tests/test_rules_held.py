"""Where a rule must not fire."""

from __future__ import annotations

import pytest
import torch

from dsv4fuse.lower import Lowering
from dsv4fuse.terms import Term

from ._bits import BF16, FLOATS, FP16, FP32, evaluate


def _leaf(low: Lowering, dtype: torch.dtype) -> Term:
    return low.interner.make("load", (0, None), dtype)


@pytest.mark.parametrize("narrow", [BF16, FP16])
def test_a_rounding_is_kept(narrow):
    low = Lowering()
    x = _leaf(low, FP32)
    back = low.make("cast", (low.make("cast", (x,), narrow),), FP32)
    assert back.op == "cast" and back.args[0].op == "cast" and back.args[0].args[0] is x


def test_a_bound_that_rounds_keeps_its_dtype():
    low = Lowering()
    bounded = low.make("minimum", (_leaf(low, BF16), low.interner.const(0.1)), BF16)
    assert low.make("cast", (bounded,), FP32).args == (bounded,)


@pytest.mark.parametrize("bound", [0.1, 1e30])
def test_a_bound_that_the_narrow_dtype_rounds_stays_wide(bound):
    low = Lowering()
    wide = low.make("cast", (_leaf(low, FP16),), FP32)
    clamped = low.make("minimum", (wide, low.interner.const(bound)), FP32)
    assert low.make("cast", (clamped,), FP16).op == "cast"
    scaled = low.make("minimum", (low.make("mul", (wide, wide), FP32), wide), FP32)
    assert low.make("cast", (scaled,), FP16).op == "cast"


def test_bf16_and_fp16_are_not_each_other():
    low = Lowering()
    there = low.make("cast", (_leaf(low, BF16),), FP16)
    assert low.make("cast", (there,), BF16).op == "cast"


def test_crossed_clamps_keep_their_order():
    low = Lowering()
    x, lo, hi = _leaf(low, FP32), low.interner.const(2.0), low.interner.const(-2.0)
    inner = low.make("minimum", (x, hi), FP32)
    assert low.make("maximum", (inner, lo), FP32).op == "maximum"


def test_nothing_is_reassociated_or_distributed():
    low = Lowering()
    raw = low.interner.make
    x, y, z = (raw("load", (k, None), FP32) for k in range(3))
    assert low.make("add", (low.make("add", (x, y), FP32), z), FP32) is not low.make(
        "add", (x, low.make("add", (y, z), FP32)), FP32
    )
    both = low.make("mul", (x, low.make("add", (y, z), FP32)), FP32)
    each = low.make("add", (low.make("mul", (x, y), FP32), low.make("mul", (x, z), FP32)), FP32)
    assert both is not each


@pytest.mark.parametrize("bound", [10.0, -1.5, 0.0])
@pytest.mark.parametrize("op", ["ge", "le"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_where_with_equality_is_no_clamp(op, bound, dtype):
    low = Lowering()
    c, x = low.interner.const(bound), _leaf(low, dtype)
    kept = low.make("where", (low.make(op, (x, c), torch.bool), c, x), dtype)
    assert kept.op == "where"


@pytest.mark.parametrize("op, clamp", [("ge", torch.clamp_max), ("le", torch.clamp_min)])
def test_where_with_equality_answers_the_other_zero(op, clamp):
    """Why it is none."""
    low = Lowering()
    c, x = low.interner.const(0.0), _leaf(low, FP32)
    kept = low.make("where", (low.make(op, (x, c), torch.bool), c, x), FP32)
    zero = torch.tensor([-0.0])
    found, wanted = evaluate(kept, {x: zero}), clamp(zero, 0.0)
    assert torch.equal(found, wanted) and not torch.equal(found.signbit(), wanted.signbit())


def test_where_of_another_bound_or_value_is_no_clamp():
    low = Lowering()
    x, c, other = _leaf(low, FP32), low.interner.const(10.0), low.interner.const(9.0)
    y = low.interner.make("load", (1, None), FP32)
    above = low.make("gt", (x, c), torch.bool)
    for args in ((above, other, x), (above, c, y), (above, x, c)):
        assert low.make("where", args, FP32).op == "where"


def test_where_of_another_integer_is_no_clamp():
    low = Lowering()
    i, n, other = _leaf(low, torch.int64), low.interner.const(0), low.interner.const(1)
    below = low.make("lt", (i, n), torch.bool)
    for args in ((below, other, i), (below, i, other), (below, i, i)):
        assert low.make("where", args, torch.int64).op == "where"
    assert low.make("where", (below, n, i), torch.int32).op == "where"  # a cast of i, unsaid


@pytest.mark.parametrize(
    "how, axes, n", [("sum", (1,), 47.0), ("sum", (1,), 96.0), ("sum", (0, 1), 48.0),
                     ("sum", (0,), 48.0), ("amax", (1,), 48.0), ("mean", (1,), 48.0)],
)  # fmt: skip
def test_a_sum_over_another_number_is_no_mean(how, axes, n):
    low = Lowering()
    fold = low.interner.make("fold", (how, _leaf(low, FP32), axes, (2, 48), (2, 1)), FP32)
    assert low.make("div", (fold, low.interner.const(n)), FP32).op == "div"


def test_a_rounded_sum_is_no_mean():
    low = Lowering()
    fold = low.interner.make("fold", ("sum", _leaf(low, FP32), (1,), (2, 48), (2, 1)), FP32)
    narrow = low.make("cast", (fold,), BF16)
    assert low.make("div", (narrow, low.interner.const(48.0)), BF16).op == "div"


def test_a_silu_in_fp16_is_not_rewritten():
    """exp(-x) overflows there where x·sigmoid(x) is a number."""
    for d in (BF16, FP16):
        low = Lowering()
        x = _leaf(low, d)
        assert low.make("mul", (x, low.make("sigmoid", (x,), d)), d).op == "mul"
    y = torch.tensor([-12.0]).to(FP16)
    assert y * y.sigmoid() != 0 and y / (1 + (-y).exp()) == 0


@pytest.mark.parametrize("op", ["gt", "lt"])
@pytest.mark.parametrize("bound, value", [(0.0, -0.0), (-0.0, 0.0)])
def test_where_with_the_other_zero_is_no_clamp(op, bound, value):
    low = Lowering()
    x = _leaf(low, FP32)
    above = low.make(op, (x, low.interner.const(bound)), torch.bool)
    assert low.make("where", (above, low.interner.const(value), x), FP32).op == "where"
