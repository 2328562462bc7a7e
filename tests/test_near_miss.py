"""What cannot be matched is explained: the right line of the user's file, and what differs there.

Each case is almost a fusion. ``differs`` marks, in the source, the line of the first operation
that is another one, or that of the fusion's own node where an input of the graph is found in
another's place: an input has no line. It is found by inspecting the function, never written as
a number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsv4fuse
from dsv4fuse.report import Site

from .spellings._case import EPS, Draw

D, R = 48, 16


def _rows() -> tuple[Tensor, ...]:
    draw = Draw()
    return draw(2, 5, 3, D), draw(D), *draw.angles(2, 5, 1, R // 2)


def _packed() -> tuple[Tensor, ...]:
    return (Draw()(7, 192),)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r = x[..., -R:].float()
    even, odd = r[..., 0::2], r[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((x[..., :-R], turned.to(x.dtype)), dim=-1)


def norm_by_maximum(x, w, cos, sin):
    h = x.float()
    largest = h.square().amax(-1, keepdim=True)  # differs
    return _turn(w * (h * torch.rsqrt(largest + EPS)).to(x.dtype), cos, sin)


def norm_of_a_sum(x, w, cos, sin):
    h = x.float()
    total = h.square().sum(-1, keepdim=True)  # differs
    return _turn(w * (h * torch.rsqrt(total + EPS)).to(x.dtype), cos, sin)


def norm_of_magnitudes(x, w, cos, sin):
    h = x.float()
    size = h.abs()  # differs
    variance = size.mean(-1, keepdim=True)
    return _turn(w * (h * torch.rsqrt(variance + EPS)).to(x.dtype), cos, sin)


def rope_with_a_rounded_product(x, w, cos, sin):
    r = x[..., -R:].float()
    even, odd = r[..., 0::2], r[..., 1::2]
    first = even * cos
    first = first.bfloat16().float()  # differs
    a = first - odd * sin
    return torch.stack((a, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def rope_of_a_shifted_lane(x, w, cos, sin):
    r = x[..., -R:].float()
    even, odd = r[..., 0::2], r[..., 1::2]
    a = even * cos - odd * sin
    cross = (even + 1) * sin
    b = odd * cos + cross
    return torch.stack((a, b), dim=-1).flatten(-2).to(x.dtype)  # differs


def swiglu_over_two(x):
    gate, up = x.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
    below = 2 + torch.exp(-gate)  # differs
    return (gate / below * up).to(x.dtype)


def swiglu_by_quick_gelu(x):
    gate, up = x.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
    inner = gate * 1.702  # differs
    return (gate / (1 + torch.exp(-inner)) * up).to(x.dtype)


def quant_for_another_format(x):
    gate, up = x.float().chunk(2, dim=-1)
    blocks = (F.silu(gate) * up).to(x.dtype).unflatten(-1, (-1, 32)).float()
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    scale = scale / 240.0  # differs
    return (blocks / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


# The function, its inputs, the fusion, and words that must be in the sentence.
CASES: list[tuple[Callable, Callable, str, tuple[str, ...]]] = [
    (norm_by_maximum, _rows, "norm_rope_cache", ("rms_norm", "fold")),
    (norm_of_a_sum, _rows, "norm_rope_cache", ("rms_norm", "fold")),
    (norm_of_magnitudes, _rows, "norm_rope_cache", ("rms_norm", "mul", "abs")),
    (rope_with_a_rounded_product, _rows, "norm_rope_cache", ("rope", "bf16")),
    (rope_of_a_shifted_lane, _rows, "norm_rope_cache", ("rope", "add")),
    (swiglu_over_two, _packed, "clamp_swiglu_quant", ("clamp_swiglu", "1", "2")),
    (swiglu_by_quick_gelu, _packed, "clamp_swiglu_quant", ("clamp_swiglu", "mul")),
    (quant_for_another_format, _packed, "clamp_swiglu_quant", ("group_quant", "448", "240")),
]


def _line(fn: Callable) -> int:
    lines, start = inspect.getsourcelines(fn)
    return start + next(i for i, text in enumerate(lines) if text.rstrip().endswith("# differs"))


def _near(fn: Callable, inputs: Callable) -> list[Site]:
    report = dsv4fuse.explain(fn, *inputs(), options={"select": "always"})
    return report.with_status("near-miss")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0].__name__)
def test_says_which_line_and_what_differs(case):
    fn, inputs, fusion, words = case
    found = _near(fn, inputs)
    assert found, "no near miss at all"
    here = [s for s in found if (s.file, s.line) == (__file__, _line(fn))]
    assert here, f"line {_line(fn)} wanted: {[(s.where, s.reason) for s in found]}"
    sentence = here[0].reason
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".") and "wants" in sentence and "finds" in sentence


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0].__name__)
def test_names_a_fusion_of_the_registry_and_strict_makes_it_an_error(case):
    fn, inputs, fusion, _ = case
    assert fusion in {s.fusion for s in _near(fn, inputs)} | {"inv_rope_quant"}
    with pytest.raises(dsv4fuse.FusionError, match="nearly matches"):
        dsv4fuse.explain(fn, *inputs(), options={"select": "always", "strict": True})


def test_every_near_miss_has_a_place():
    """Even where the difference is an input of the graph, which has no line of its own."""
    places = [s.where for fn, inputs, *_ in CASES for s in _near(fn, inputs)]
    assert all(__file__ in place for place in places), places


def test_what_is_something_else_is_no_near_miss():
    def softmax(x):
        return torch.softmax(x.float() * 0.125, dim=-1).to(x.dtype) @ x.transpose(-1, -2)

    def layer_norm(x):
        return F.layer_norm(x, (x.shape[-1],))

    for fn in (softmax, layer_norm, lambda x: F.relu(x) + 1):
        assert not _near(fn, _packed)


def test_what_is_fused_is_no_near_miss():
    def norm(x, w, cos, sin):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return _turn(w * h.to(x.dtype), cos, sin)

    report = dsv4fuse.explain(norm, *_rows(), options={"select": "always"})
    assert [s.status for s in report.sites] == ["taken"]
