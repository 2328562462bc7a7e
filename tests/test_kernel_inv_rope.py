"""inv_rope and inv_rope_quant, and the block scales all quantisers share."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import inv_rope_quant as inv

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, GPU, MARKS, huge, rand, same, tables

pytestmark = MARKS


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
def test_scales_near_powers_of_two(scale):
    """amax whose 448th is within some ulps of 2^k: ceil(log2) as eager's, not by exponent."""
    k = 2.0 ** torch.arange(-20, 21, dtype=torch.float64)
    steps = torch.arange(-4, 5, dtype=torch.float64) * 2.0**-23
    amax = (448.0 * k[:, None] * (1 + steps)).flatten().float().to(DEVICE)
    o = torch.zeros(1, amax.numel(), 1, 128, device=DEVICE)
    o[0, :, 0, 5] = amax
    o[0, :, 0, 6] = -0.0
    o[0, :, 0, 7:100] = amax[:, None] * torch.randn(93, device=DEVICE).clamp(-1, 1)
    cos, sin = tables(1, amax.numel(), 2)
    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    kw = dict(groups=1, group=128, scale=scale, rope_rounding="once")
    got = inv.inv_rope_quant(o, cos, sin, **kw)
    want = inv.reference_quant(o, cos, sin, **kw)
    same(got[1], want[1])
    same(got[0], want[0])


@pytest.mark.parametrize("kind", ["fp32", "bf16", "complex", "expanded"])
@pytest.mark.parametrize("rope_rounding", ["once", "every"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_inv_rope(kind, rope_rounding, heads_first):
    o = rand(2, 3, 192, 3).transpose(2, 3).contiguous() if heads_first else rand(2, 3, 3, 192)
    cos, sin = tables(2, 3, 64, kind)
    for inverse in (True, False):
        kw = dict(rope_rounding=rope_rounding, inverse=inverse, heads_first=heads_first)
        same(inv.inv_rope(o, cos, sin, **kw), inv.reference(o, cos, sin, **kw))


def test_signed_zeros_at_position_zero():
    """sin = +0 there, so whether a zero keeps its sign hangs on the sign of −sin."""
    o = rand(1, 8, 2, 64)
    o[:, ::2] = -0.0
    o[..., 5] = 3.3
    cos, sin = torch.ones(1, 8, 8, device=DEVICE), torch.zeros(1, 8, 8, device=DEVICE)
    got, want = (f(o, cos, sin, rope_rounding="once") for f in (inv.inv_rope, inv.reference))
    same(got, want)
    kw = dict(groups=1, group=64, scale="fp32", rope_rounding="once")
    got, want = (f(o, cos, sin, **kw) for f in (inv.inv_rope_quant, inv.reference_quant))
    same(got[0], want[0])


QUANT = [
    # batch, length, heads, groups, dim, rope, group, tables, heads first
    (1, 1, 64, 8, 512, 64, 128, "fp32", True),
    (3, 1, 4, 2, 512, 64, 128, "complex", False),
    (2, 5, 3, 3, 192, 64, 64, "bf16", True),
    (1, 127, 2, 1, 128, 128, 128, "expanded", False),
    (1, 129, 3, 1, 64, 16, 32, "fp32", True),
] + ([(1, 1500, 64, 8, 512, 64, 128, "fp32", True)] if GPU else [])


@pytest.mark.parametrize("batch, length, heads, groups, dim, rope, group, kind, first", QUANT)
@pytest.mark.parametrize("scale, via", [("fp32", "div"), ("pow2", "mul")])
@pytest.mark.parametrize("col_major, token_major", [(False, True), (True, False)])
def test_inv_rope_quant(
    batch, length, heads, groups, dim, rope, group, kind, first, scale, via, col_major, token_major
):
    o = rand(batch, *((heads, length) if first else (length, heads)), dim)
    o = o.transpose(1, 2) if first else o
    cos, sin = tables(batch, length, rope, kind)
    kw = dict(groups=groups, group=group, scale=scale, via=via, rope_rounding="once",
              col_major=col_major, token_major=token_major)  # fmt: skip
    got, want = (f(o, cos, sin, **kw) for f in (inv.inv_rope_quant, inv.reference_quant))
    same(got[0], want[0])
    same(got[1], want[1])  # the padded physical tensor: pad rows are compared with zero
    if col_major:
        assert (got[1][..., batch * length :] == 0).all()


@pytest.mark.parametrize("rope_rounding, kind", [("every", "bf16"), ("every", "fp32")])
@pytest.mark.parametrize("columns", [0, 128])
def test_inv_rope_quant_launches(monkeypatch, rope_rounding, kind, columns):
    """Any launch shape gives the same bytes, NaN, inf and zeros included."""
    monkeypatch.setattr(inv, "CONFIGS", ((None, common.Config(8, 1, columns)),))
    o = rand(1, 13, 2, 512)
    o[0, 1, 0, 3], o[0, 2, 1, 400], o[0, 3, 0, 500] = float("nan"), float("inf"), float("nan")
    o[0, 4] = 0.0
    o[0, 5] = -0.0
    cos, sin = tables(1, 13, 64, kind)
    for scale in ("fp32", "pow2"):
        kw = dict(groups=1, scale=scale, rope_rounding=rope_rounding, col_major=True)
        got, want = (f(o, cos, sin, **kw) for f in (inv.inv_rope_quant, inv.reference_quant))
        same(got[0], want[0])
        same(got[1], want[1])


def test_inv_rope_quant_precise():
    """Scales and codes from the fp32 rotation, without the rounding to bf16 in between."""
    o, (cos, sin) = rand(1, 9, 2, 512), tables(1, 9, 64)
    kw = dict(groups=2, rope_rounding="every", precise=True)
    codes, scales = inv.inv_rope_quant(o, cos, sin, **kw)
    y = atoms.rope(o.double(), cos.double().unsqueeze(2), sin.double().unsqueeze(2), inverse=True,
                   rounding="every").unflatten(-1, (4, 128))  # fmt: skip
    exact = y.abs().amax(-1).flatten() / 448
    assert ((scales.flatten() - exact).abs() <= 3e-7 * exact).all()
    back = codes.float().view(9, 2, 4, 128).double() * scales.view(9, 2, 4, 1).double()
    step = torch.maximum(back.abs() / 16, scales.view(9, 2, 4, 1) * 2.0**-10) * (1 + 1e-5)
    assert ((back - y).abs() <= step).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_no_tokens(shape):
    o, (cos, sin) = rand(*shape, 64), tables(*shape[:2], 32)
    assert inv.inv_rope(o, cos, sin, rope_rounding="once").shape == o.shape
    for col_major in (False, True):
        kw = dict(groups=2, group=32, rope_rounding="once", col_major=col_major)
        got, want = (f(o, cos, sin, **kw) for f in (inv.inv_rope_quant, inv.reference_quant))
        same(got[0], want[0])
        same(got[1], want[1])


@huge
def test_offsets_past_2_31():
    """40000 rows of 64 × 512 pass 2^31 elements; the last rows must land where they belong."""
    tokens = 66000
    o = torch.zeros(1, tokens, 64, 512, dtype=BF16, device=DEVICE)
    o[:, -3:] = rand(1, 3, 64, 512)
    cos, sin = tables(1, tokens, 64)
    got = inv.inv_rope(o, cos, sin, rope_rounding="once")
    want = inv.reference(o[:, -3:], cos[:, -3:], sin[:, -3:], rope_rounding="once")
    same(got[:, -3:].clone(memory_format=torch.contiguous_format), want)
    codes, _ = inv.inv_rope_quant(o, cos, sin, groups=8, rope_rounding="once", col_major=True)
    want, _ = inv.reference_quant(o[:, -3:], cos[:, -3:], sin[:, -3:], groups=8,
                                  rope_rounding="once")  # fmt: skip
    same(codes[-3:], want)


def calls(small):
    args = small.q, small.cos, small.sin
    return {
        "inv_rope": (args, dict(rope_rounding="every", heads_first=True)),
        "inv_rope_quant": (args, dict(groups=2, rope_rounding="once", col_major=True)),
    }
