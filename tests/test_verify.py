"""The check of a site against its own nodes: what it must see, each difference by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4fuse import verify
from dsv4fuse.specs import code_distance

X = torch.linspace(-3, 3, 24, dtype=torch.bfloat16).view(4, 6)


def changed(value: float) -> Tensor:
    y = X.clone()
    y[1, 2] = value
    return y


def turned(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def steps(n: float) -> Tensor:
    """One value off by n rounding steps at its row's largest value."""
    y = X.double().clone()
    y[0, 5] += n * torch.finfo(X.dtype).eps * X[0].double().abs().amax()
    return y.to(torch.float32).to(X.dtype)


SEEN = {
    "dtype": (X, X.half(), "fp16"),
    "shape": (X, X.view(6, 4), "instead of"),
    "strides": (X, turned(X), "strides"),
    "an integer": (torch.arange(4), torch.tensor([0, 1, 2, 4]), "integers"),
    "a NaN that is not there": (X, changed(float("nan")), "NaN"),
    "a NaN that is gone": (changed(float("nan")), X, "NaN"),
    "an infinity": (X, changed(float("inf")), "infinities"),
    "the other infinity": (changed(float("inf")), changed(float("-inf")), "infinities"),
    "a value": (X, steps(4), "rounding steps of bf16"),
    "all of a row of zeros": (torch.zeros(2, 3), torch.full((2, 3), 1e-30), "rounding steps"),
}


@pytest.mark.parametrize("name", SEEN)
def test_seen(name):
    wanted, found, words = SEEN[name]
    assert words in (verify._differ(wanted, found, wanted, "faithful", 0.0) or "")


ALIKE = {
    "itself": (X, X),
    "within the order of a sum": (X, steps(2)),
    "another stride of an axis of one": (X[:1], X[:1].as_strided((1, 6), (100, 1))),
    "NaN and infinities in their places": (changed(float("nan")), changed(float("nan"))),
    "no elements": (X[:0], X[:0]),
    "integers": (torch.arange(4), torch.arange(4)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_alike(name):
    wanted, found = ALIKE[name]
    assert verify._differ(wanted, found, wanted, "faithful", 0.0) is None


def test_as_near_to_exact_arithmetic_as_the_module():
    """Both may be off; ours by no more than the module and the steps allowed."""
    exact = X.double()
    assert verify._differ(steps(6), steps(8), exact, "faithful", 0.0) is None
    assert "the module's is off by 6" in str(
        verify._differ(steps(6), steps(9), exact, "faithful", 0.0)
    )
    assert verify._differ(steps(40), steps(49), exact, "faithful", 0.0) is None  # alike, not equal
    assert verify._differ(steps(40), steps(51), exact, "faithful", 0.0)


# A part of all values turned by one step: fp8's steps are an eighth of a value.
TURNED = {"none": (0, False), "few": (8, False), "a sixth": (6, True), "all": (1, True)}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TURNED)
def test_many_small_differences(name, dtype):
    """More of them than a sum in another order turns, each within the steps allowed."""
    every, seen = TURNED[name]
    wanted = torch.linspace(1, 1.9, 96).to(dtype)
    bits = wanted.view(torch.int8 if wanted.element_size() == 1 else torch.int16).clone()
    if every:
        bits[::every] += 1
    found = bits.view(dtype)
    assert verify._differ(wanted, found, wanted, "faithful", 0.0) is None
    assert ("each rounding is promised" in (verify._many(wanted, found) or "")) == seen


def test_codes_behind_a_sum_in_another_order():
    """A code may be the next one; what is no code of the row's may not be."""
    codes = torch.tensor([[6.0, 4.0, -0.5, 3.0]], dtype=torch.bfloat16)
    off, wrong = codes.clone(), codes.clone()
    off[0, 1], wrong[0, 3] = 6.0, 0.5
    assert verify._differ(codes, off, codes, "faithful", 2 / 6) is None
    assert verify._differ(codes, off, codes, "faithful", 0.0)
    assert verify._differ(codes, wrong, codes, "faithful", 2 / 6)
    assert code_distance({"fp4": "kept"}) == 2 / 6
    assert code_distance({"saturate": True}) == 32 / 448


def test_scales_behind_a_sum_in_another_order():
    """A value of 16 bits that turns is a step of 16 bits in an fp32 scale, and not more."""
    largest = torch.tensor([[1.5, 3.0]], dtype=torch.bfloat16)
    next_one, next_but_two = ((largest.view(torch.int16) + n).view(largest.dtype) for n in (1, 3))
    scales, turned, wrong = (t.float() / 448 for t in (largest, next_one, next_but_two))
    step = torch.finfo(torch.bfloat16).eps
    assert verify._differ(scales, turned, scales, "faithful", step) is None
    assert verify._differ(scales, turned, scales, "faithful", 0.0)
    assert verify._differ(scales, wrong, scales, "faithful", step)
    many = scales.expand(48, 2).contiguous()
    few = many.clone()
    few[:4] = turned
    assert verify._many(many, few, step) is None
    assert verify._many(many, turned.expand(48, 2).contiguous(), step)


def test_wide_results_are_not_counted():
    """In fp32 a sum in another order turns most of them."""
    x = torch.linspace(1, 2, 96)
    assert verify._many(x, x.nextafter(torch.tensor(9.0))) is None


def test_an_error_is_said_in_one_line():
    assert verify.said(RuntimeError("no.\nmore")) == "no" and verify.said(KeyError()) == "KeyError"
