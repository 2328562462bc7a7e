"""hyper_connection_post against its reference and fp64."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import hyper_connection_post as post
from hypothesis import given
from hypothesis import strategies as st

from ._kernels import BF16, FP16, FP32, GPU, MARKS, close, drawn, rand

pytestmark = MARKS
ROUNDINGS = ["once", "every"]
SHAPES = [(1, 64), (3, 1032), (5, 192)] + ([(1, 4096), (1500, 7168), (8192, 4096)] if GPU else [])


def inputs(tokens: int, width: int, dtype: torch.dtype = BF16, weights: torch.dtype = FP32):
    out, x = rand(tokens, width, dtype=dtype), rand(tokens, 4, width, dtype=dtype)
    return out, x, rand(tokens, 4, dtype=weights), rand(tokens, 4, 4, dtype=weights)


@pytest.mark.parametrize("tokens, width", SHAPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_post(tokens, width, rounding):
    args = inputs(tokens, width)
    got, want = (f(*args, rounding=rounding)
                 for f in (post.hyper_connection_post, post.reference))  # fmt: skip
    # The sum of four products has another order in a matrix product. Where values cancel, that is
    # many steps of a small result, so steps are counted at the largest value of the row.
    step = want.float().abs().amax(-1, keepdim=True) * 2.0**-8
    assert ((got.float() - want.float()).abs() <= 2 * step).all()
    assert (got != want).float().mean() <= 1e-3


@pytest.mark.parametrize("dtype, weights", [(FP16, FP32), (FP32, FP32), (BF16, BF16)])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_against_fp64(dtype, weights, rounding):
    """Precise: the exact result, rounded once."""
    args = inputs(4, 128, dtype, weights)
    got = post.hyper_connection_post(*args, rounding=rounding, precise=True)
    out, x, p, c = (t.double() for t in args)
    want = p.unsqueeze(-1) * out.unsqueeze(-2) + c.mT @ x
    error = (got.double() - want).abs()
    scale = want.abs() * torch.finfo(dtype).eps / 2 + want.abs().amax() * 2e-7
    assert got.dtype == dtype and (error <= scale * 1.001).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_strides(rounding):
    """Streams that are one, weights and outputs cut out of larger tensors, comb transposed."""
    out, x, p, c = inputs(3, 64)
    args = (torch.cat((out, out), -1)[:, :64], x[:, :1].expand(-1, 4, -1),
            torch.cat((p, p), -1)[:, ::2], c.mT)  # fmt: skip
    got = post.hyper_connection_post(*args, rounding=rounding)
    want = post.hyper_connection_post(*(t.contiguous() for t in args), rounding=rounding)
    assert torch.equal(got, want) and got.is_contiguous()


@pytest.mark.parametrize("columns", [64, 128, 1024])
def test_launches_agree(monkeypatch, columns):
    args = inputs(3, 200)
    want = post.hyper_connection_post(*args, rounding="every")
    monkeypatch.setattr(post, "CONFIGS", ((None, common.Config(1, 4, columns)),))
    assert torch.equal(post.hyper_connection_post(*args, rounding="every"), want)


def test_no_tokens_and_nan():
    assert post.hyper_connection_post(*inputs(0, 64), rounding="once").shape == (0, 4, 64)
    args = inputs(2, 64)
    args[0][1, 3] = float("nan")
    got = post.hyper_connection_post(*args, rounding="every")
    assert got[1, :, 3].isnan().all() and got.isnan().sum() == 4


@drawn(6)
@given(st.integers(1, 6), st.sampled_from([64, 130, 256]), st.sampled_from(ROUNDINGS),
       st.integers(0, 2**31))  # fmt: skip
def test_any_size(tokens, width, rounding, seed):
    torch.manual_seed(seed)
    args = inputs(tokens, width, FP32)
    got, want = (f(*args, rounding=rounding)
                 for f in (post.hyper_connection_post, post.reference))  # fmt: skip
    step = want.abs().amax(-1, keepdim=True) * 2.0**-23
    assert ((got - want).abs() <= 4 * step).all()


def test_misuse_is_explained():
    out, x, p, c = inputs(2, 64)
    for args, sentence in (
        ((out[:, :32], x, p, c), "another width"),
        ((out, x[:, :3], p, c), "4 streams"),
        ((out.float(), x, p, c), "differ in dtype"),
    ):
        with pytest.raises(ValueError, match=sentence):
            post.hyper_connection_post(*args, rounding="every")
    close(*(post.hyper_connection_post(out, x, p, c, rounding="once") for _ in "ab"),
          worst=0, fraction=0)  # fmt: skip


def calls(small):
    return {"hyper_connection_post": (small.expansion, dict(rounding="every"))}
