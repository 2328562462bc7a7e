"""hyper_connection_post_pre_norm against the two ops that it joins, and fp64."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import hyper_connection_post as post
from dsv4fuse.kernels import hyper_connection_post_pre_norm as between
from dsv4fuse.kernels import hyper_connection_pre as pre
from hypothesis import given
from hypothesis import strategies as st

from ._hyper import EPS, NORM_EPS, exact, mixing, near
from ._kernels import BF16, FP16, FP32, GPU, MARKS, drawn, rand

pytestmark = MARKS
MIXES = dict(norm_eps=NORM_EPS, eps=EPS, iters=3)
NORM = dict(y_eps=1e-3, norm="weight")
SHAPES = [(1, 64), (3, 192), (2, 512)] + (
    [(1, 4096), (129, 7168), (1500, 4096), (8192, 4096)] if GPU else []
)


def inputs(tokens, width, dtype=BF16):
    out, weights = rand(tokens, width, dtype=dtype), rand(tokens, 20, dtype=FP32)
    x, fn, scale, base = mixing(tokens, width, dtype=dtype)
    comb = weights[:, 4:].unflatten(1, (4, 4))
    return out, x, weights[:, :4], comb, fn, scale, base, rand(width, dtype=BF16)


def apart(args, rounding, **more):
    """The two ops one after the other."""
    out, x, p, comb, fn, scale, base, weight = args
    new = post.hyper_connection_post(out, x, p, comb, rounding=rounding, **more)
    made = pre.hyper_connection_pre_norm(
        new, fn, scale, base, weight, **MIXES, y_eps=NORM["y_eps"], rounding=NORM["norm"], **more
    )
    return new, *made


def joined(args, rounding, **more):
    return between.hyper_connection_post_pre_norm(
        *args, rounding=rounding, **MIXES, **NORM, **more
    )


@pytest.mark.parametrize("tokens, width", SHAPES)
@pytest.mark.parametrize("rounding", ["once", "every"])
def test_the_bits_of_the_two_ops(tokens, width, rounding):
    args = inputs(tokens, width)
    for a, b in zip(joined(args, rounding), apart(args, rounding), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("precise", [False, True])
def test_other_dtypes(dtype, precise):
    args = inputs(3, 128, dtype)
    for a, b in zip(joined(args, "once", precise=precise), apart(args, "once", precise=precise),
                    strict=True):  # fmt: skip
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_against_fp64():
    args = inputs(4, 128, FP32)
    out, x, p, comb = (t.double() for t in args[:4])
    new = p.unsqueeze(-1) * out.unsqueeze(-2) + comb.mT @ x
    y, *weights = exact(new, *args[4:7], 3)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * args[7].double()
    for found, true in zip(joined(args, "once"), (new, y, *weights), strict=True):
        near(found, true, 4e-6)


def test_a_row_has_the_same_bits_in_any_batch():
    args = inputs(3, 256)
    together = joined(args, "every")
    rows = [t[1:2] for t in args[:4]]
    for a, b in zip(joined((*rows, *args[4:]), "every"), together, strict=True):
        assert torch.equal(a, b[1:2])


def test_strides_no_tokens_and_nan():
    """Streams that are one, weights and outputs cut out of larger tensors, comb transposed."""
    out, x, p, comb, *rest = inputs(3, 64)
    cut = (torch.cat((out, out), -1)[:, :64], x[:, :1].expand(-1, 4, -1),
           torch.cat((p, p), -1)[:, ::2], comb.mT, *rest)  # fmt: skip
    dense = (*(t.contiguous() for t in cut[:4]), *rest)
    assert all(map(torch.equal, joined(cut, "every"), joined(dense, "every")))
    assert [t.shape[0] for t in joined(inputs(0, 64), "once")] == [0] * 4
    out[1, 3] = float("nan")
    new, y, *weights = joined((out, x, p, comb, *rest), "every")
    assert new[1, :, 3].isnan().all() and new.isnan().sum() == 4
    assert all(t[1].isnan().all() and not t[[0, 2]].isnan().any() for t in (y, *weights))


@drawn(6)
@given(st.integers(1, 5), st.sampled_from([64, 128, 320]), st.sampled_from(["once", "every"]),
       st.integers(0, 2**31))  # fmt: skip
def test_any_size(tokens, width, rounding, number):
    torch.manual_seed(number)
    args = inputs(tokens, width)
    assert all(map(torch.equal, joined(args, rounding), apart(args, rounding)))


def test_misuse_is_explained():
    out, x, *rest = inputs(2, 64)
    with pytest.raises(ValueError, match="differ in dtype"):
        joined((out.float(), x, *rest), "once")
    with pytest.raises(ValueError, match="4 streams"):
        joined((out, x[:, :3], *rest), "once")


def calls(small):
    how = dict(norm_eps=1e-6, eps=1e-6, iters=2, rounding="every", y_eps=1e-6, norm="once")
    args = (*small.expansion, *small.mixing[1:], None)
    return {"hyper_connection_post_pre_norm": (args, how)}
