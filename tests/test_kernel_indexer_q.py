"""indexer_q and indexer_q_quant: equal to their definition byte by byte where sums are exact."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import indexer_q as m
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, FP16, FP32, MARKS, TOKENS, drawn, huge, rand, same, tables

pytestmark = MARKS


def rotation(d: int, dtype: torch.dtype = BF16) -> Tensor:
    """A Hadamard matrix with its rows in another order: not its own transpose."""
    h = torch.ones(1, 1)
    while h.shape[0] < d:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return h.roll(1, 0).to(dtype).to(DEVICE)


def turned(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, factor: float = 1.0
) -> Tensor:
    """rope and rotation from their definition; the sum in fp64, rounded as the module rounds."""
    y = atoms.rope(x, cos.unsqueeze(2), sin.unsqueeze(2), rounding="once")
    if matrix is None:
        return y
    y = (y.double() @ matrix.double()).to(matrix.dtype)
    return (y * factor).to(x.dtype)


@pytest.mark.parametrize("tokens", [*TOKENS, 4, 5, 128])
def test_quant_at_every_token_count(tokens):
    x, (cos, sin) = rand(1, tokens, 3, 64), tables(1, tokens, 32)
    got = m.indexer_q_quant(x, cos, sin, group=64, rope_rounding="once")
    want = atoms.group_quant(turned(x, cos, sin, None), group=64, floor=1e-4, scale="pow2")
    same(got[0], want[0])
    same(got[1], want[1])


@pytest.mark.parametrize("scale, via", [("fp32", "div"), ("pow2", "mul"), ("pow2", "div")])
@pytest.mark.parametrize("group", [32, 128])
def test_fake_quant(scale, via, group):
    """With NaN, infinity, zeros; small blocks under the floor."""
    x, (cos, sin) = rand(2, 3, 5, 128), tables(2, 3, 64)
    x[0, 0, 0, 3], x[0, 1, 2, 99], x[1, 0] = float("nan"), float("inf"), 0.0
    x[1, 1] *= 1e-6
    kw = dict(group=group, floor=1e-4, scale=scale, via=via)
    got = m.indexer_q(x, cos, sin, rope_rounding="once", **kw)
    same(got, atoms.fake_quant(turned(x, cos, sin, None), **kw))


def codes_and_ties(dtype: torch.dtype) -> Tensor:
    """``[1, S, 2, 64]``: in blocks of 32 every value between 2^-4 and 6 steps (fp16: 1240 of them)
    and zeros, both signs, behind one of 6 steps; a step is a power of two of each block."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[((x.abs() <= 6) & (x.abs() >= 2**-4)) | (x == 0)]
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    x = x[: len(x) // 124 * 124] if dtype == BF16 else x[:1240]
    blocks = torch.cat((torch.full((len(x) // 31, 1), 6.0, dtype=dtype), x.view(-1, 31)), 1)
    steps = 2.0 ** (torch.arange(len(blocks)) % 7 - 3)
    return (blocks * steps[:, None]).to(dtype).view(1, -1, 2, 64).to(DEVICE)


@pytest.mark.parametrize(
    "dtype, via, form",
    [*((BF16, "div", f) for f in atoms.E2M1), (BF16, "mul", "kept"), (FP16, "div", "turned 0")],
)
def test_fake_fp4(dtype, via, form):
    """Every code, tie and zero; NaN, infinity, blocks of zeros, under the floor and without one."""
    x = codes_and_ties(dtype)
    cos, sin = torch.ones(1, x.shape[1], 16, device=DEVICE), torch.zeros(1, x.shape[1], 16)
    sin = sin.to(DEVICE)
    x[0, 0, 0, 3], x[0, 1, 1, 40], x[0, 2] = float("nan"), float("inf"), 0.0
    x[0, 3] *= 1e-4
    for floor in (0.5, 6 * 2.0**-126, 0.0):
        kw = dict(group=32, floor=floor, scale="pow2", via=via, fp4=form)
        got = m.indexer_q(x, cos, sin, rope_rounding="once", **kw)
        same(got, atoms.fake_quant(turned(x, cos, sin, None), **kw))


def test_rotation_and_fp4():
    x = torch.randint(-99, 100, (2, 5, 3, 64), device=DEVICE).to(BF16)
    cos, sin = torch.ones(2, 5, 16, device=DEVICE), torch.zeros(2, 5, 16, device=DEVICE)
    kw = dict(group=32, floor=0.5, scale="pow2", fp4="kept")
    matrix = rotation(64)
    got = m.indexer_q(x, cos, sin, matrix, factor=0.29, rope_rounding="once", **kw)
    same(got, atoms.fake_quant(turned(x, cos, sin, matrix, 0.29), **kw))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("wide", [False, True])
def test_rotation_is_exact_on_integers(dtype, wide):
    """No angle and integers: the product has no order; its rounding and the factor's show."""
    x = torch.randint(-99, 100, (2, 5, 3, 64), device=DEVICE).to(dtype)
    cos, sin = torch.ones(2, 5, 16, device=DEVICE), torch.zeros(2, 5, 16, device=DEVICE)
    matrix = rotation(64, FP32 if wide else dtype)
    got = m.indexer_q(x, cos, sin, matrix, factor=0.29, rope_rounding="once")
    y = turned(x, cos, sin, matrix, 0.29)
    same(got, y)
    kw = dict(group=32, floor=1e-4, scale="pow2")
    got = m.indexer_q_quant(x, cos, sin, matrix.mT.contiguous().mT, factor=0.29,
                            rope_rounding="once", **kw)  # fmt: skip
    want = atoms.group_quant(y, **kw)
    same(got[0], want[0])
    same(got[1], want[1])


def test_precise_rotation_is_near_fp64():
    x, (cos, sin) = rand(1, 9, 4, 128), tables(1, 9, 64)
    matrix = rotation(128)
    got = m.indexer_q(x, cos, sin, matrix, factor=0.088, rope_rounding="once", precise=True)
    y = atoms.rope(x.double(), cos.double().unsqueeze(2), sin.double().unsqueeze(2),
                   rounding="every")  # fmt: skip
    want = (y @ matrix.double()) * 0.088
    error = (got.double() - want).abs()
    assert (error <= want.abs() * 2.0**-8 + 1e-5).all()  # half a step of bf16


@pytest.mark.parametrize("kind", ["fp32", "bf16", "complex", "expanded"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_strides(kind, heads_first):
    x = rand(2, 3, 4, 64).transpose(1, 2) if heads_first else rand(2, 4, 3, 64)
    cos, sin = tables(2, 4, 32, kind)
    got = m.indexer_q(x, cos, sin, rope_rounding="once")
    want = atoms.rope(x, cos.unsqueeze(2), sin.unsqueeze(2), rounding="once").contiguous()
    same(got, want)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_nothing_to_do(shape):
    x, (cos, sin) = rand(*shape, 64), tables(*shape[:2], 32)
    codes, scales = m.indexer_q_quant(x, cos, sin, group=32, rope_rounding="once")
    assert codes.shape == x.shape and scales.shape == (*shape, 2)


@drawn(15)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.sampled_from([16, 64]))
def test_any_shape(batch, length, heads, d):
    x, (cos, sin) = rand(batch, length, heads, d), tables(batch, length, 16)
    got = m.indexer_q_quant(x, cos, sin, group=16, scale="fp32", rope_rounding="once")
    want = atoms.group_quant(turned(x, cos, sin, None), group=16, floor=1e-4, scale="fp32")
    same(got[0], want[0])
    same(got[1], want[1])


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(d=48), "head_dim 48 is no power of two"),
        (dict(group=48), "groups of 48 do not divide 64"),
        (dict(matrix=torch.ones(64, 32)), "the matrix must be 64 by 64"),
        (dict(group=32, fp4="even"), "no form 'even' of e2m1"),
        (dict(group=32, fp4="kept", scale="fp32"), "fp4 has groups, with powers of two"),
        (dict(fp4="kept"), "fp4 has groups, with powers of two"),
    ],
)
def test_what_it_does_not_take(change, sentence):
    x, (cos, sin) = rand(1, 2, 3, change.pop("d", 64)), tables(1, 2, 16)
    with pytest.raises(ValueError, match=sentence):
        m.indexer_q(x, cos, sin, rope_rounding="once", **change)


@huge
def test_offsets_past_2_31(tokens=2**18 + 3):
    x = torch.zeros(1, tokens, 64, 128, dtype=BF16, device=DEVICE)
    cos, sin = tables(1, tokens, 64)
    x[:, -3:] = rand(1, 3, 64, 128)
    want = turned(x[:, -3:], cos[:, -3:], sin[:, -3:], None)
    found = m.indexer_q(x, cos, sin, rope_rounding="once")
    same(found[0, -3:], want[0])
    codes, scales = m.indexer_q_quant(x, cos, sin, group=128, rope_rounding="once")
    want, steps = atoms.group_quant(want, group=128, floor=1e-4, scale="pow2")
    same(codes[0, -3:], want[0])
    same(scales[0, -3:], steps[0])


def calls(small):
    args = small.q, small.cos, small.sin
    return {
        "indexer_q": ((*args, small(128, 128)), dict(rope_rounding="once", group=32)),
        "indexer_q_quant": (args, dict(rope_rounding="once", group=64)),
    }
