"""norm_quant: codes and scales byte for byte, the kept norm and the kv latent's, layouts."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _norms
from dsv4fuse.kernels import norm_quant as nq
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, FP16, FP32, GPU, MARKS, close, drawn, huge, rand, same, summed
from .test_kernel_norm_rope import eager_every
from .test_kernel_swiglu import check_padding

pytestmark = MARKS


def call(x, w=None, kv=None, kv_w=None, **kw):
    base = dict(eps=1e-6, norm="once", kv_eps=1e-5, kv_norm="once", keep=True)
    return nq.norm_quant(x, w, kv, kv_w, **base | kw), base | kw


def quantised_exactly(got, kw) -> None:
    """Codes and scales are those of the very values that the op returns as normed."""
    codes, scales, normed, _ = got
    kind = "fp32" if kw["scale"] == "fp32" else "pow2"
    quant = dict(group=kw["group"], floor=kw.get("floor", 1e-10), via=kw.get("via", "div"))
    quant["by"] = kw.get("by", "div")
    want, s = atoms.group_quant(normed, scale=kind, **quant)
    same(codes, want)
    if kw["scale"] == "e8m0":
        assert torch.equal(scales.view(torch.uint8), s.to(scales.dtype).view(torch.uint8))
    else:
        assert torch.equal(scales.nan_to_num(-1.0), s.nan_to_num(-1.0))
    tokens, groups = s.shape
    aligned = (tokens + 3) // 4 * 4
    assert scales.shape == s.shape
    assert scales.stride() == ((1, aligned) if kw.get("col_major") else (groups, 1))
    if kw.get("col_major"):
        check_padding(scales, aligned, groups)


def normed_closely(got: Tensor, want: Tensor) -> None:
    """A sum in another order: one step of the output, for few values."""
    if got.dtype == FP32:
        return summed(got, want)
    close(got, want, worst=1, fraction=0.01)


@pytest.mark.parametrize("scale", ["fp32", "pow2", "e8m0"])
@pytest.mark.parametrize("col_major", [False, True])
@pytest.mark.parametrize("width, group", [(1024, 128), (1536, 128), (192, 64), (96, 32)])
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_codes_and_scales(tokens, width, group, col_major, scale):
    x, w = rand(tokens, width, scale=3.0), rand(width, dtype=FP32)
    x[-1, :group] = 0.0
    kw = dict(group=group, scale=scale, col_major=col_major, via="mul" if group == 64 else "div")
    got, kw = call(x, w, **kw)
    quantised_exactly(got, kw)
    normed_closely(got[2], nq.reference(x, w, None, None, **kw)[2])
    assert got[3].shape == (0,)


def test_codes_by_the_reciprocal():
    """Enough values that some of them round the other way than a quotient's: about 1 in 10^5.

    Of bf16 only the smallest codes may where the scale is a product with 1 / 448, as on a GPU.
    """
    x = rand(1024 if GPU else 128, 1024, dtype=FP16, scale=3.0)
    got, kw = call(x, None, by="mul", group=128, scale="fp32")
    quantised_exactly(got, kw)
    other, _ = atoms.group_quant(got[2], group=128, floor=1e-10, scale="fp32")
    assert not torch.equal(got[0].float(), other.float())


@pytest.mark.parametrize("tokens", [4, 127, 128, 129] + ([1000, 1500, 8192] if GPU else []))
def test_token_counts(tokens):
    x, kv = rand(tokens, 128), rand(tokens, 64)
    got, kw = call(x, None, kv, None, group=32, scale="fp32", col_major=True)
    quantised_exactly(got, kw)
    want = nq.reference(x, None, kv, None, **kw)
    normed_closely(got[2], want[2])
    normed_closely(got[3], want[3])


ROUNDINGS = [
    ("once", None), ("once", FP32), ("rstd", None), ("rstd", BF16), ("weight", BF16),
    ("weight", FP32), ("every", None), ("every", BF16),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("norm, weight", ROUNDINGS)
def test_roundings(norm, weight, dtype):
    """Each rounding of the module, for the quantised rows and for kv's; a kv of another width."""
    weight = dtype if weight is BF16 else weight
    x, kv = rand(3, 160, dtype=dtype, scale=2.0), rand(3, 100, dtype=dtype)
    w, kv_w = (None, None) if weight is None else (rand(160, dtype=weight), rand(100, dtype=weight))
    got, kw = call(x, w, kv, kv_w, norm=norm, kv_norm=norm, group=32, scale="pow2")
    want = nq.reference(x, w, kv, kv_w, **kw)[2:]
    if norm == "every" and not GPU:
        want = (eager_every(x, w, kw["eps"]), eager_every(kv, kv_w, kw["kv_eps"]))
    quantised_exactly(got, kw)
    for g, r in zip(got[2:], want, strict=True):
        normed_closely(g, r)


@pytest.mark.parametrize("keep", [True, False])
def test_slices_of_one_projection(keep):
    """q's and kv's latents are column slices of one tensor; rows may be every second one."""
    both = rand(10, 1536 + 512 + 64)[::2]
    x, kv = both[:, :1536], both[:, 1536:2048]
    w, kv_w = rand(1536), rand(512)
    (codes, scales, normed, kv_out), kw = call(
        x, w, kv, kv_w, norm="weight", kv_norm="weight", group=128, scale="fp32", keep=keep
    )
    dense = nq.norm_quant(x.contiguous(), w, kv.contiguous(), kv_w, **kw)
    for g, r in zip((codes, scales, normed, kv_out), dense, strict=True):
        same(g, r)
    assert normed.shape == ((5, 1536) if keep else (0,)) and kv_out.shape == (5, 512)


@pytest.mark.parametrize("width", [32, 96, 3072])
def test_widths(width):
    x = rand(2, width)
    got, kw = call(x, rand(width), norm="weight", group=32, scale="pow2")
    quantised_exactly(got, kw)
    a, b, c = _norms.pieces(width, 32)
    assert a + b + c == width, "no lane is idle"


@pytest.mark.parametrize("tokens", [1, 10_000])
@given(width=st.integers(32, 8192))
def test_a_launch_for_every_width(tokens, width):
    """Powers of two; at most 64 values a lane, and no more lanes than a first piece has values."""
    config = nq.row_config(tokens, width)
    assert all(n & (n - 1) == 0 for n in (config.rows, config.warps))
    assert config.rows * width <= 64 * 32 * config.warps
    assert 32 * config.warps <= max(32, config.rows * _norms.pieces(width)[0])


@given(width=st.integers(1, 8192), least=st.sampled_from([32, 64, 128]))
def test_pieces_cover_a_row(width, least):
    found = _norms.pieces(width, least)
    assert all(p & (p - 1) == 0 for p in found) and width <= sum(found)
    assert sum(found) < 2 * max(width, least)
    if width % least == 0:
        assert all(p % least == 0 for p in found)


@drawn(15)
@given(
    tokens=st.integers(1, 9), groups=st.integers(1, 7), group=st.sampled_from([32, 64, 128]),
    scale=st.sampled_from(["fp32", "pow2", "e8m0"]), col_major=st.booleans(),
    magnitude=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]), step=st.integers(1, 3),
)  # fmt: skip
def test_any_shape(tokens, groups, group, scale, col_major, magnitude, step):
    x = rand(tokens * step, groups * group + 8, scale=magnitude)[::step, : groups * group]
    got, kw = call(x, group=group, scale=scale, col_major=col_major)
    quantised_exactly(got, kw)
    normed_closely(got[2], nq.reference(x, None, None, None, **kw)[2])


def test_no_tokens():
    got, _ = call(rand(0, 128), None, rand(0, 64), None, group=64, scale="e8m0", col_major=True)
    assert [tuple(t.shape) for t in got] == [(0, 128), (0, 2), (0, 128), (0, 64)]


@huge
def test_offsets_past_2_31(far=2**30 + 64, tokens=2**21 + 5):
    """Rows far apart; and so many rows that codes and the kept norm pass 2^31 elements."""
    apart = torch.empty_strided((3, 128), (far, 1), dtype=BF16, device=DEVICE).copy_(rand(3, 128))
    kw = dict(group=32, scale="fp32")
    for g, r in zip(call(apart, **kw)[0], call(apart.contiguous(), **kw)[0], strict=True):
        same(g, r)
    x = torch.zeros(tokens, 1024, dtype=BF16, device=DEVICE)
    x[-3:] = rand(3, 1024)
    codes, scales, kept, _ = call(x, group=128, scale="fp32", col_major=True)[0]
    last = call(x[-3:], group=128, scale="fp32")[0]
    same(codes[-3:], last[0])
    same(kept[-3:], last[2])
    assert torch.equal(scales[-3:], last[1])
    assert not codes[:-3].view(torch.uint8).any()


def test_special_values_stay_in_their_row():
    x = rand(4, 128)
    x[0, 5], x[1, 6], x[2] = float("nan"), float("inf"), -0.0
    got, kw = call(x, group=32, scale="fp32")
    want = nq.reference(x, None, None, None, **kw)
    quantised_exactly(got, kw)
    assert torch.equal(got[2].isnan(), want[2].isnan())
    assert not got[2][2:].isnan().any() and got[2][0].isnan().all()
    same(got[2][2], x[2])


def test_precise():
    """fp32 to the codes; what is kept is half a step of the exact value."""
    x, w = rand(6, 1536, scale=2.0), rand(1536)
    kw = dict(norm="weight", group=128, scale="fp32")
    got, kw = call(x, w, x[:, :512], w[:512], kv_norm="weight", precise=True, **kw)
    eager = nq.reference(x, w, x[:, :512], w[:512], **kw | {"precise": False})
    for part, width, eps in ((2, 1536, 1e-6), (3, 512, 1e-5)):
        wide = x[:, :width].double()
        exact = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * w[:width].double()
        error, eager_error = ((t[part].double() - exact).abs() for t in (got, eager))
        half = 0.5 * torch.finfo(BF16).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
        assert (error <= half + 2e-6 * exact.abs().amax()).all()
        assert error.mean() <= eager_error.mean()
    values = got[0].float().unflatten(-1, (-1, 128)) * got[1].unsqueeze(-1)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()
    off = (values.flatten(-2).double() - exact).abs().unflatten(-1, (-1, 128))
    assert (off <= 16.001 * got[1].double().unsqueeze(-1)).all()  # half of e4m3's last step


MISUSE = [
    (dict(group=48), "the group must be 32, 64 or 128"),
    (dict(group=128), "96 is no multiple of 128"),
    (dict(scale="e4m3"), "no scale format 'e4m3' here"),
]


@pytest.mark.parametrize("kw, sentence", MISUSE)
def test_misuse_is_explained(kw, sentence):
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        call(torch.zeros(2, 96, device=DEVICE, dtype=BF16), **dict(group=32, scale="fp32") | kw)


def calls(small):
    how = dict(eps=1e-6, norm="weight", group=32, scale="pow2", col_major=True, keep=True)
    args = small(small.length, 128), small.w, small(small.length, 64), None
    return {"norm_quant": (args, how)}
