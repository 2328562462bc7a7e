"""inv_rope_grouped_bmm in its strategies, with wide and with e4m3 weights, and with fp8 codes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dsv4fuse.kernels import _grouped_fp8 as fp8
from dsv4fuse.kernels import _projection as projection
from dsv4fuse.kernels import _strategies as strategies
from dsv4fuse.kernels import inv_rope_grouped_bmm as grouped
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, FP16, FP32, GPU, MARKS, drawn, huge, rand, same, tables

pytestmark = MARKS
TOKENS = [1, 3, 4, 5, 127, 128, 129] + ([1000, 1500] if GPU else [])


def inputs(batch, length, heads, dim, rope, groups, columns, *, kind="fp32", first=False,
           dtype=BF16, block=0):  # fmt: skip
    """o, cos, sin, w (and its scales): as attention leaves them and a checkpoint holds them."""
    o = rand(batch, *((heads, length) if first else (length, heads)), dim, dtype=dtype)
    o = o.transpose(1, 2) if first else o
    k = heads // groups * dim
    w = rand(groups * columns, k, scale=0.05, dtype=FP32)
    if not block:
        return o, *tables(batch, length, rope, kind), w.to(dtype).view(groups, columns, k)
    scale = torch.rand(groups, columns // block, k // block, device=DEVICE) * 0.02 + 1e-3
    wide = scale.repeat_interleave(block, 1).repeat_interleave(block, 2)
    codes = (w.view(groups, columns, k) / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return o, *tables(batch, length, rope, kind), codes, scale


def exact(o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, w_scale: Tensor | None = None, *,
          rope_rounding: str = "once", rounded: bool = True) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum in fp64 of the rounded operands, and the sum of their products' magnitudes."""
    y = atoms.rope(o, cos.unsqueeze(2), sin.unsqueeze(2), inverse=True, rounding=rope_rounding)
    if w_scale is not None:
        w = grouped.weights(w, w_scale, o.dtype if rounded else FP32)
    return _sums(y, w)


def _sums(y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = y.reshape(-1, w.shape[0], w.shape[2]).double()
    out = torch.einsum("tgk,gnk->tgn", y, w.double())
    return out, torch.einsum("tgk,gnk->tgn", y.abs(), w.double().abs())


def near(got: Tensor, want: tuple[Tensor, Tensor], bits: float = 22.0) -> None:
    """Within half a step of the output's dtype and what fp32 sums of that size may lose."""
    wanted, size = want
    assert got.shape == wanted.shape
    step = torch.finfo(got.dtype)
    room = wanted.abs() * step.eps * 0.501 + size * 2.0**-bits + step.smallest_normal
    wrong = (got.double() - wanted).abs() > room
    assert not wrong.any(), f"{wrong.sum().item()} of {got.numel()} are off"


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("strategy", grouped.STRATEGIES if GPU else ["prologue", "tail"])
def test_token_counts(tokens, strategy):
    o, cos, sin, w = inputs(1, tokens, 4, 64, 32, 2, 16)
    out = grouped.inv_rope_grouped_bmm(o, cos, sin, w, rope_rounding="once", strategy=strategy)
    assert out.is_contiguous() and out.dtype == BF16
    near(out, exact(o, cos, sin, w))


SHAPES = [
    # batch, length, heads, dim, rope, groups, columns, tables, heads first, dtype
    (2, 5, 4, 64, 16, 2, 32, "bf16", True, BF16),
    (3, 1, 6, 96, 32, 3, 20, "complex", False, BF16),
    (1, 17, 2, 128, 128, 1, 64, "expanded", True, BF16),
    (2, 3, 3, 192, 64, 3, 40, "fp32", False, FP16),
    (1, 2, 8, 512, 64, 1, 16, "fp32", True, BF16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strategy", grouped.STRATEGIES)
@pytest.mark.parametrize("rope_rounding", ["once", "every"])
def test_layouts(shape, strategy, rope_rounding):
    *sizes, kind, first, dtype = shape
    o, cos, sin, w = inputs(*sizes, kind=kind, first=first, dtype=dtype)
    out = grouped.inv_rope_grouped_bmm(
        o, cos, sin, w, rope_rounding=rope_rounding, strategy=strategy, token_major=False
    )
    assert out.transpose(0, 1).is_contiguous()
    near(out, exact(o, cos, sin, w, rope_rounding=rope_rounding))


def test_weights_of_any_strides():
    o, cos, sin, w = inputs(1, 5, 4, 64, 32, 2, 48)
    turned = w.transpose(1, 2).contiguous().transpose(1, 2)
    one = torch.cat((w, w), dim=2)[:, ::2, : w.shape[2]]
    for other, like in ((turned, w), (one, w[:, ::2])):
        out = grouped.inv_rope_grouped_bmm(o, cos, sin, other, rope_rounding="once")
        near(out, exact(o, cos, sin, like))


@drawn(12)
@given(
    st.integers(1, 3), st.integers(0, 9), st.sampled_from([1, 2, 4]), st.integers(1, 3),
    st.sampled_from([(32, 16), (48, 16), (64, 64), (80, 32)]), st.integers(1, 20),
    st.sampled_from(grouped.STRATEGIES), st.booleans(),
)  # fmt: skip
def test_any_shape(batch, length, groups, per, dims, columns, strategy, token_major):
    """Empty batches, groups of one head, columns that fill no tile."""
    o, cos, sin, w = inputs(batch, length, groups * per, *dims, groups, columns)
    out = grouped.inv_rope_grouped_bmm(
        o, cos, sin, w, rope_rounding="once", strategy=strategy, token_major=token_major
    )
    near(out, exact(o, cos, sin, w))


@pytest.mark.parametrize("kind", ["fp32", "complex"])
def test_in_place(kind):
    """o's rope lanes are turned where they lie; its other lanes keep their bits."""
    o, cos, sin, w = inputs(2, 5, 4, 64, 16, 2, 32, kind=kind)
    held = o.clone()
    out = grouped.inv_rope_grouped_bmm_(o, cos, sin, w, rope_rounding="once")
    near(out, exact(held, cos, sin, w))
    same(o, atoms.rope(held, cos.unsqueeze(2), sin.unsqueeze(2), inverse=True, rounding="once"))


def test_nothing_but_one_lane():
    """A one among zeros goes to its own place with the weight's own bits, for every lane."""
    o, cos, sin, w = inputs(1, 128, 2, 64, 32, 1, 32)
    o = torch.eye(128, dtype=BF16, device=DEVICE).view(1, 128, 2, 64)
    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    for strategy in grouped.STRATEGIES:
        out = grouped.inv_rope_grouped_bmm(o, cos, sin, w, rope_rounding="once", strategy=strategy)
        assert torch.equal(out[:, 0], w[0].t())


def test_nan_and_infinity_stay_in_their_token():
    o, cos, sin, w = inputs(1, 7, 2, 64, 32, 1, 32)
    o[0, 2, 0, 3], o[0, 4, 1, 60] = float("nan"), float("inf")
    for strategy in grouped.STRATEGIES:
        out = grouped.inv_rope_grouped_bmm(o, cos, sin, w, rope_rounding="once", strategy=strategy)
        assert out[2].isnan().all() and not out[4].isfinite().any()
        assert out[[0, 1, 3, 5, 6]].isfinite().all()


@pytest.mark.parametrize("strategy", ["prologue", "tail"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tokens, columns", [(1, 64), (5, 32), (70, 32)])
def test_e4m3_weights(strategy, scaled, tokens, columns):
    """Rounded as a module that dequantises, or the scales on exact products."""
    o, cos, sin, w, ws = inputs(1, tokens, 4, 64, 32, 2, columns, block=32)
    out = grouped.inv_rope_grouped_bmm(
        o, cos, sin, w, ws, rope_rounding="once", scaled=scaled, strategy=strategy,
        out_dtype=FP32 if scaled else None,
    )  # fmt: skip
    near(out, exact(o, cos, sin, w, ws, rounded=not scaled))


@pytest.mark.parametrize(
    "tokens, scale", [(1, "pow2"), (5, "fp32"), (129, "fp32")] + [(1500, "pow2")] * GPU
)
def test_codes_by_codes(tokens, scale):
    """Equal to the fp64 sum of what codes and scales stand for; 13 bits are Hopper's fp8 sums."""
    o, cos, sin, w, ws = inputs(1, tokens, 4, 64, 32, 2, 32, block=32)
    kw = dict(floor=1e-10, scale=scale, via="div")
    out = fp8.inv_rope_grouped_fp8(o, cos, sin, w, ws, rope_rounding="once", out_dtype=FP32, **kw)
    y = atoms.rope(o, cos.unsqueeze(2), sin.unsqueeze(2), inverse=True, rounding="once")
    y = atoms.fake_quant(y.float(), group=32, **kw)
    near(out, _sums(y, grouped.weights(w, ws, FP32)), bits=13.0 if GPU else 22.0)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(w=lambda w: w[:, :, :-16]), "w takes 112 elements, not 128"),
        (dict(w=lambda w: w.float()), "must have o's dtype"),
        (dict(o=lambda o: o.float()), "o must be bf16 or fp16"),
        (dict(o=lambda o: o[:, :, :3]), "3 heads do not make 2 groups"),
        (dict(strategy=lambda s: "magic"), "no strategy 'magic'"),
    ],
)
def test_misuse_is_explained(change, sentence):
    o, cos, sin, w = inputs(1, 3, 4, 64, 32, 2, 48)
    given_ = dict(o=o, cos=cos, sin=sin, w=w, strategy="prologue", rope_rounding="once")
    given_ |= {name: f(given_[name]) for name, f in change.items()}
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        grouped.inv_rope_grouped_bmm(**given_)


def test_the_fastest_measured_strategy(monkeypatch):
    rows = [{"kind": "wide", "groups": 8, "tokens": t, "us": us} for t, us in (
        (1, {"prologue": 1.0, "copy": 2.0}), (1024, {"prologue": 9.0, "copy": 7.0, "place": 5.0})
    )]  # fmt: skip
    monkeypatch.setattr(strategies, "measured", lambda _: {"rows": rows})
    pick = partial(strategies.choose, "inv_rope_grouped_bmm")
    both = ("prologue", "copy")
    assert pick("wide", 8, 3, both) == ("prologue", {"prologue": 1.0, "copy": 2.0})
    assert pick("wide", 2, 9000, both)[0] == "copy"
    assert pick("wide", 8, 9000, (*both, "place"))[0] == "place"
    assert pick("e4m3", 8, 1, both) == ("prologue", {})


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("block", [0, 32])
def test_launches(monkeypatch, single, block):
    """All tiles in one loop, or those with rope lanes in their own."""
    tile = projection.Tile(16, 32, 32, 4, 3, single)
    monkeypatch.setattr(grouped, "TILES", dict.fromkeys(grouped.TILES, ((None, tile),)))
    o, cos, sin, *w = inputs(2, 9, 4, 64, 16, 2, 64, block=block)
    out = grouped.inv_rope_grouped_bmm(o, cos, sin, *w, rope_rounding="once")
    near(out, exact(o, cos, sin, *w))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("tokens", [4, 1500])
def test_single_groups_as_the_batch(tokens):
    o, cos, sin, w, ws = inputs(1, tokens, 16, 512, 64, 2, 1024, block=128)
    by = partial(fp8.inv_rope_grouped_fp8, o, cos, sin, w, ws, rope_rounding="once")
    a, b = by(strategy="groups").double(), by(strategy="batched").double()
    assert ((a - b).abs() <= 2 * torch.finfo(BF16).eps * b.abs().amax(-1, keepdim=True)).all()


@huge
@pytest.mark.parametrize("strategy", grouped.STRATEGIES)
def test_offsets_past_2_31(strategy, tokens=66000):
    """66000 rows of 64 × 512; the last rows must be their own."""
    last, cos, sin, w = inputs(1, 3, 64, 512, 64, 8, 16)
    o = torch.zeros(1, tokens, 64, 512, dtype=BF16, device=DEVICE)
    o[:, -3:] = last
    far_cos, far_sin = tables(1, tokens, 64)
    far_cos[:, -3:], far_sin[:, -3:] = cos, sin
    out = grouped.inv_rope_grouped_bmm(
        o, far_cos, far_sin, w, rope_rounding="once", strategy=strategy
    )
    near(out[-3:], exact(last, cos, sin, w))
    assert not out[:-3].any()


def calls(small):
    w, codes = small(2, 64, 128), small(2, 64, 128).to(torch.float8_e4m3fn)
    blocks = torch.rand(2, 1, 4, device=small.device)
    o, once = (small.q, small.cos, small.sin), dict(rope_rounding="once")
    return {
        "inv_rope_grouped_bmm": ((*o, w), dict(once, out_dtype=FP32, token_major=False)),
        "inv_rope_grouped_bmm_": ((*o, w), once),
        "inv_rope_grouped_fp8": ((*o, codes, blocks), once),
        "grouped_bmm": ((small(small.length, 2, 128), w), {}),
    }
