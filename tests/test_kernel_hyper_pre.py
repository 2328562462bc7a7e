"""hyper_connection_pre (and its norm) and hyper_head against fp64."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _hyper as hyper
from dsv4fuse.kernels import hyper_connection_pre as pre
from dsv4fuse.kernels import hyper_head as head
from hypothesis import given
from hypothesis import strategies as st

from dsv4fuse import atoms

from ._hyper import EPS, NORM_EPS, exact, mixing, near
from ._kernels import BF16, FP16, FP32, GPU, MARKS, close, drawn

pytestmark = MARKS
FP32_ERROR = 2e-6  # of long fp32 sums, through exponentials
ONE = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: FP32_ERROR}  # one rounding, to the larger side
KW = dict(norm_eps=NORM_EPS, eps=EPS)
SHAPES = [(1, 64), (3, 192)]
SHAPES += [(127, 4096), (129, 7168), (1000, 4096), (8192, 4096)] if GPU else []
LAUNCHES = {
    "pieces": hyper.Launch(whole=False, rows=1, columns=64, warps=1),
    "groups": hyper.Launch(whole=True, rows=4, columns=4096, warps=4),
    "ready": hyper.Launch(whole=True, rows=32, columns=4096, warps=4, ready=True),
}


@pytest.mark.parametrize("tokens, width", SHAPES)
def test_pre(tokens, width):
    args = mixing(tokens, width)
    y, post, comb = pre.hyper_connection_pre(*args, **KW, iters=20)
    wanted = exact(*args, 20)
    near(y, wanted[0], ONE[BF16])
    near(post, wanted[1], FP32_ERROR)
    near(comb, wanted[2], FP32_ERROR)
    near(comb.sum(-2), torch.ones_like(wanted[1]), FP32_ERROR)  # columns are normalised last
    eager = pre.reference(*args, **KW, iters=20, before=True)[2]
    off, theirs = ((c.double().sum(-1) - 1).abs().max() for c in (comb, eager))
    assert off <= theirs + FP32_ERROR  # what twenty iterations leave of the rows


@pytest.mark.parametrize("iters", [1, 2])
def test_iterations(iters):
    args = mixing(2, 64)
    near(pre.hyper_connection_pre(*args, **KW, iters=iters)[2], exact(*args, iters)[2], FP32_ERROR)


@pytest.mark.parametrize("dtype, small", [(FP16, FP32), (FP32, FP32), (BF16, BF16)])
def test_dtypes(dtype, small):
    args = mixing(2, 64, dtype=dtype, small=small)
    y, post, comb = pre.hyper_connection_pre(*args, **KW, iters=2)
    wanted = exact(*args, 2)
    near(y, wanted[0], ONE[dtype])
    near(post, wanted[1], FP32_ERROR)
    near(comb, wanted[2], FP32_ERROR)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_row_has_the_same_bits_in_any_batch(monkeypatch, launch):
    """However many tokens there are, and so whichever launch is chosen."""
    args = mixing(3, 256)
    alone = pre.hyper_connection_pre(args[0][1:2], *args[1:], **KW, iters=2)
    monkeypatch.setattr(hyper, "LAUNCHES", ((None, LAUNCHES[launch]),))
    together = pre.hyper_connection_pre(*args, **KW, iters=2)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[1:2])


@pytest.mark.parametrize("launch", LAUNCHES)
def test_streams_that_are_one(monkeypatch, launch):
    """The first layer's streams: stride 0. And streams cut out of something larger."""
    monkeypatch.setattr(hyper, "LAUNCHES", ((None, LAUNCHES[launch]),))
    args = mixing(2, 64)
    one = args[0][:, :1].expand(-1, 4, -1)
    wide = torch.cat((args[0], args[0]), dim=-1)[..., :64]
    for x in (one, wide):
        assert not x.is_contiguous()
        got = pre.hyper_connection_pre(x, *args[1:], **KW, iters=1)
        want = pre.hyper_connection_pre(x.contiguous(), *args[1:], **KW, iters=1)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("rounding, kind", [("once", FP32), ("weight", BF16), ("rstd", None)])
def test_norm(rounding, kind):
    args, width = mixing(2, 192), 192
    weight = None if kind is None else torch.randn(width).to(kind).to(args[0].device)
    kw = dict(KW, iters=2)
    y = pre.hyper_connection_pre(*args, **kw)[0]
    got, post, comb = pre.hyper_connection_pre_norm(
        *args, weight, **kw, y_eps=0.01, rounding=rounding
    )
    close(got, atoms.rms_norm(y, weight, eps=0.01, rounding=rounding), worst=1, fraction=0.01)
    near(post, exact(*args, 2)[1], FP32_ERROR)
    near(comb, exact(*args, 2)[2], FP32_ERROR)


def test_norm_precise():
    """From the fp32 y, without its rounding."""
    args = mixing(2, 64)
    kw = dict(KW, iters=1, y_eps=0.01, rounding="once", precise=True)
    got = pre.hyper_connection_pre_norm(*args, None, **kw)[0]
    y = exact(*args, 1)[0]
    wanted = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 0.01)
    close(got, wanted.to(BF16), worst=1, fraction=0.01)


def test_nan_stays_in_its_token():
    args = mixing(3, 64)
    args[0][1, 2, 5] = float("nan")
    for t in pre.hyper_connection_pre(*args, **KW, iters=2):
        assert t[1].isnan().all() and not t[::2].isnan().any()


def test_no_tokens():
    y, post, comb = pre.hyper_connection_pre(*mixing(0, 64), **KW, iters=2)
    assert (y.shape, post.shape, comb.shape) == ((0, 64), (0, 4), (0, 4, 4))


@drawn(4)
@given(st.integers(1, 3), st.integers(1, 3), st.floats(0.0, 8.0), st.integers(0, 2**31))
def test_any_logits(tokens, iters, size, seed):
    """Gates that saturate, rows that are nearly one-hot."""
    torch.manual_seed(seed)
    x, fn, scale, base = mixing(tokens, 64)
    args = (x, fn, scale, base * size)
    _, post, comb = pre.hyper_connection_pre(*args, **KW, iters=iters)
    near(post, exact(*args, iters)[1], FP32_ERROR)
    near(comb, exact(*args, iters)[2], 8 * FP32_ERROR)


@pytest.mark.parametrize("tokens, width", SHAPES)
def test_head(tokens, width):
    args = mixing(tokens, width, outputs=4)
    y = head.hyper_head(*args, **KW)
    x, fn, scale, base = (t.double() for t in args)
    flat = x.flatten(-2)
    mixes = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + NORM_EPS) @ fn.T
    gates = torch.sigmoid(mixes * scale + base) + EPS
    near(y, (gates.unsqueeze(-1) * x).sum(-2), ONE[BF16])


def calls(small):
    streams, fn, scale, base = small.mixing
    eps = dict(norm_eps=1e-6, eps=1e-6)
    return {
        "hyper_connection_pre": (small.mixing, dict(eps, iters=2)),
        "hyper_connection_pre_norm": (
            (*small.mixing, small.fp32(64)), dict(eps, iters=2, y_eps=1e-6, rounding="once"),
        ),
        "hyper_head": ((streams, fn[:4], scale[:1], base[:4]), eps),
    }  # fmt: skip
