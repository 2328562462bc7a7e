"""mtp_norms against its reference, eager and fp64."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import mtp_norms as mtp
from hypothesis import given
from hypothesis import strategies as st

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, FP16, FP32, GPU, MARKS, close, drawn, rand

pytestmark = MARKS
NORMS = ["once", "rstd", "weight", "every"]
CELLS = [(1, 4, 64), (3, 4, 200), (5, 1, 128)] + (
    [(128, 4, 4096), (1500, 4, 7168), (8192, 1, 4096), (1, 4, 8192)] if GPU else []
)


def inputs(tokens, streams, width, dtype=BF16, weight=FP32):
    e, h = rand(tokens, width, dtype=dtype), rand(tokens, streams, width, dtype=dtype)
    at = torch.arange(tokens, device=DEVICE) % 3 - 1  # -1, 0, 1, …
    return e, rand(width, dtype=weight), at, h, rand(width, dtype=weight)


def arguments(norm="once", hidden="eq", **more):
    return dict(e_eps=1e-3, e_norm=norm, h_eps=0.02, h_norm=norm, hidden=hidden, **more)


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_as_its_reference(cell, norm):
    """The order of a row's sum may turn a rounding, nothing else."""
    args = inputs(*cell, weight=FP32 if norm == "once" else BF16)
    for hidden in ("eq", "le"):
        got, want = (f(*args, **arguments(norm, hidden)) for f in (mtp.mtp_norms, mtp.reference))
        for a, b in zip(got, want, strict=True):
            # A mean that turns its rounding moves a whole row of "rstd" and "every" by a step; the
            # two products behind it may turn one more each, as may that of "weight".
            whole = norm in ("rstd", "every")
            worst = 3 if whole else {"once": 1, "weight": 2}[norm]
            close(a, b, worst=worst, fraction=1.0 if whole else 0.02)
        gone = args[2] == 0 if hidden == "eq" else args[2] <= 0
        assert (got[0][gone] == 0).all() and (got[0][~gone] != 0).any(-1).all()


@pytest.mark.parametrize("dtype, weight", [(FP32, FP32), (FP16, FP32), (BF16, BF16)])
def test_precise_against_fp64(dtype, weight):
    e, w, at, h, v = inputs(4, 3, 96, dtype, weight)
    got = mtp.mtp_norms(e, w, at, h, v, **arguments("rstd", precise=True))
    rows = e.double().masked_fill((at == 0)[:, None], 0)
    for found, x, weights, eps in ((got[0], rows, w, 1e-3), (got[1], h.double(), v, 0.02)):
        true = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weights.double()
        allowed = true.abs() * torch.finfo(found.dtype).eps / 2 + true.abs().amax() * 4e-7
        assert ((found.double() - true).abs() <= allowed * 1.001).all()


def test_no_positions_no_weights_other_norms():
    e, w, _, h, v = inputs(3, 4, 64)
    given_ = dict(e_eps=1e-3, e_norm="weight", h_eps=1e-2, h_norm="once")
    a, b = mtp.mtp_norms(e, None, None, h, v.to(BF16), **given_)
    close(a, atoms.rms_norm(e, None, eps=1e-3, rounding="weight"), worst=1, fraction=0.01)
    close(b, atoms.rms_norm(h, v.to(BF16), eps=1e-2, rounding="once"), worst=1, fraction=0.01)
    assert mtp.mtp_norms(e, w, None, h, None, **given_)[0].dtype == FP32  # as eager promotes


def test_strides_and_indices():
    """Rows cut out of wider ones, streams that are one, positions with a stride, int32."""
    e, w, at, h, v = inputs(5, 4, 64)
    wide = torch.cat((e, e), -1)[:, :64], w, torch.stack((at, at), 1)[:, 0].int()
    streams = h[:, :1].expand(-1, 4, -1)
    got = mtp.mtp_norms(wide[0], wide[1], wide[2], streams, v, **arguments())
    want = mtp.mtp_norms(e, w, at, streams.contiguous(), v, **arguments())
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, want, strict=True))


def test_a_row_has_the_same_bits_in_any_batch():
    args = inputs(6, 4, 192)
    whole = mtp.mtp_norms(*args, **arguments("weight"))
    for t in (0, 3, 5):
        e, w, at, h, v = args
        one = mtp.mtp_norms(e[t : t + 1], w, at[t : t + 1], h[t : t + 1], v, **arguments("weight"))
        assert all(torch.equal(a[t : t + 1], b) for a, b in zip(whole, one, strict=True))


def test_no_tokens_and_nan():
    a, b = mtp.mtp_norms(*inputs(0, 4, 64), **arguments())
    assert a.shape == (0, 64) and b.shape == (0, 4, 64)
    e, w, at, h, v = inputs(3, 4, 64)
    e[1, 5] = e[2, 5] = h[0, 2, 7] = float("nan")  # row 1 is hidden
    a, b = mtp.mtp_norms(e, w, at, h, v, **arguments())
    assert a[2].isnan().all() and not a[:2].isnan().any()
    assert b[0, 2].isnan().all() and b.isnan().sum() == 64


@drawn(8)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 200), st.sampled_from(["eq", "le"]),
       st.integers(0, 2**31))  # fmt: skip
def test_any_size(tokens, streams, width, hidden, number):
    torch.manual_seed(number)
    args = inputs(tokens, streams, width, FP32)
    got, want = (f(*args, **arguments(hidden=hidden)) for f in (mtp.mtp_norms, mtp.reference))
    for a, b in zip(got, want, strict=True):
        step = b.abs().amax(-1, keepdim=True) * 2.0**-23
        assert ((a - b).abs() <= 4 * step).all()


def test_misuse_is_explained():
    e, w, at, h, v = inputs(2, 4, 64)
    for args, more, sentence in (
        ((e[:, :32], w[:32], at, h, v), {}, "differ in width"),
        ((e, w[:3], at, h, v), {}, "weights must be"),
        ((e, w, None, h, v), {}, "goes with positions"),
        ((e, w, at.float(), h, v), {}, "int32 or int64"),
        ((e, w, at, h, v), {"hidden": "ge"}, "hidden is one of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            mtp.mtp_norms(*args, **arguments() | more)


def calls(small):
    e, streams = small(small.length, 64), small.mixing[0]
    how = dict(e_eps=1e-6, e_norm="weight", h_eps=1e-6, h_norm="once", hidden="eq")
    return {"mtp_norms": ((e, small(64), small.ids, streams, small(64).float()), how)}
