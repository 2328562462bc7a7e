"""norm_rope's partial sums, slots that count through pages, rows as fp8 bytes, large offsets."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import norm_rope_cache as rows
from hypothesis import given
from hypothesis import strategies as st

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, FP16, FP32, MARKS, drawn, huge, poisoned, rand, same, tables
from .test_kernel_norm_rope import check_rows, exact_norm_rope

pytestmark = MARKS
BASE = dict(q_eps=1e-6, kv_eps=1e-5, q_norm="rstd", kv_norm="weight", rope_rounding="once")


@pytest.mark.parametrize(
    "parts, dtype, sum_dtype",
    [(1, BF16, None), (2, BF16, None), (3, FP32, BF16), (16, FP32, FP16), (4, BF16, FP32),
     (2, FP32, None)],
)  # fmt: skip
def test_partial_sums(parts, dtype, sum_dtype):
    """The sum is rounded to sum_dtype, then normed: equal to norm_rope of the sum."""
    q, kv = rand(parts, 1, 3, 2, 128, dtype=dtype), rand(parts, 1, 3, 128, dtype=dtype)
    w, (cos, sin) = rand(128), tables(1, 3, 64)
    got = rows.norm_rope(q, kv, cos, sin, None, w, sum_dtype=sum_dtype, **BASE)
    whole = [t.float().sum(0).to(sum_dtype or dtype) for t in (q, kv)]
    want = rows.norm_rope(*whole, cos, sin, None, w, **BASE)
    for g, r in zip(got, want, strict=True):
        assert g.dtype == r.dtype
        check_rows(g, r, "rstd", 64)
    if parts == 1 and sum_dtype is None:
        same(got[0], want[0])


def test_partial_sums_precise():
    """No rounding between the parts and the store."""
    parts, w = rand(3, 1, 5, 2, 128), rand(128)
    cos, sin = tables(1, 5, 64)
    kw = BASE | {"q_norm": "once"}
    got, _ = rows.norm_rope(parts, None, cos, sin, w, None, precise=True, **kw)
    total = parts.double().sum(0)
    exact = exact_norm_rope(total, w, cos.unsqueeze(2), sin.unsqueeze(2), 1e-6)
    half = 0.5 * torch.finfo(BF16).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
    assert ((got.double() - exact).abs() <= half + 2e-6 * exact.abs().amax()).all()


def test_too_many_parts_are_refused():
    with pytest.raises((ValueError, RuntimeError), match="at most 16 are summed"):
        rows.norm_rope(rand(17, 1, 2, 1, 64), None, *tables(1, 2, 32), None, None, **BASE)


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_slots_through_pages(wrap, strided):
    """Row ``slot`` of ``cache.view(-1, D)``, also where pages lie too far apart for that view."""
    kv, (cos, sin), w = rand(1, 5, 128), tables(1, 5, 64), rand(128)
    whole = poisoned(6, 4, 160)
    cache = whole[::2, :, 16:144] if strided else poisoned(3, 4, 128)
    slot = torch.tensor([[5, -1, 11, 0, 12]], device=DEVICE)
    kw = dict(flat_slot=True, wrap=wrap, **BASE)
    _, out = rows.norm_rope_cache(None, kv, cos, sin, None, w, cache, slot, None, **kw)
    want = poisoned(12, 128)
    want[slot[0, :1]] = out[0, :1]
    for at, row in ((11, 2), (0, 3)):
        want[at] = out[0, row]
    if wrap:  # two rows for the last place: either of them
        assert any(torch.equal(cache[2, 3], out[0, row]) for row in (1, 2))
        want[11] = cache[2, 3]
    same(cache.reshape(12, 128), want)
    if strided:
        assert (whole[1::2] == 777).all() and (whole[..., :16] == 777).all()


# ---- rows as bytes -----------------------------------------------------------------------------


def decoded(cache, page_size: int, layout: str, d: int, nope: int, group: int):
    """Each row of the cache as fp32 (codes times 2^(byte - 127), then bf16), and the pad bytes."""
    data, tail, scales = nope + 2 * (d - nope), 2 * (d - nope), d // group
    pages = cache[:, : page_size * (data + scales)].contiguous()
    if layout == "row":
        raw, s = pages.view(len(cache), page_size, -1).split([data, scales], -1)
    else:
        raw = pages[:, : page_size * data].reshape(len(cache), page_size, data)
        s = pages[:, page_size * data :].reshape(len(cache), page_size, scales)
    codes, rope = raw.contiguous().split([nope, tail], -1)
    scale = torch.exp2(s[..., : nope // group].float() - 127).repeat_interleave(group, -1)
    wide = codes.contiguous().view(torch.float8_e4m3fn).float() * scale
    return torch.cat((wide, rope.contiguous().view(BF16).float()), -1), s[..., nope // group :]


def packed_call(kv, slot, *, d, rope, group, page_size, layout, pages=3, spare=0, q=None, **kw):
    data = d + rope + d // group
    cache = torch.full((pages, page_size * data + spare), 171, dtype=torch.uint8, device=DEVICE)
    cos, sin = tables(kv.shape[-3], kv.shape[-2], rope)
    w = rand(d)
    kw = BASE | dict(page_size=page_size, layout=layout, group=group, keep_kv=True) | kw
    outs = rows.norm_rope_cache_fp8(q, kv, cos, sin, None, w, cache, slot, **kw)
    return cache, outs, (cos, sin, w)


@pytest.mark.parametrize("layout", ["page", "row"])
@pytest.mark.parametrize(
    "d, rope, group, page_size, spare", [(512, 64, 64, 4, 0), (128, 64, 32, 5, 12)]
)
def test_rows_as_bytes(d, rope, group, page_size, spare, layout):
    """Codes, bf16 tail, e8m0 bytes and the zero pad, byte for byte; other bytes are untouched."""
    kv = rand(2, 3, d, scale=3.0)
    kv[1, 1, : d - rope] = 0.0
    slot = torch.tensor([[1, -1, 7], [3 * page_size, 0, 9]], device=DEVICE)
    cache, (q_out, kv_out), table = packed_call(
        kv, slot, d=d, rope=rope, group=group, page_size=page_size, layout=layout, spare=spare,
        q=rand(2, 3, 2, d),
    )  # fmt: skip
    plain = rows.norm_rope(None, kv, *table[:2], None, table[2], **BASE)
    same(kv_out, plain[1])
    assert q_out.shape == (2, 3, 2, d)
    nope = d - rope
    found, pad = decoded(cache, page_size, layout, d, nope, group)
    fake = atoms.fake_quant(kv_out[..., :nope], group=group, floor=1e-4, scale="pow2")
    rows_of = torch.cat((fake, kv_out[..., nope:]), -1).float()
    flat, hit = found.flatten(0, 1), torch.zeros(3 * page_size, dtype=torch.bool, device=DEVICE)
    for b, s in ((0, 0), (0, 2), (1, 1), (1, 2)):
        same(flat[slot[b, s]], rows_of[b, s])
        assert (pad.flatten(0, 1)[slot[b, s]] == 0).all()
        hit[slot[b, s]] = True
    before = torch.full_like(cache, 171)
    untouched, _ = decoded(before, page_size, layout, d, nope, group)
    same(flat[~hit], untouched.flatten(0, 1)[~hit])
    assert (cache[:, page_size * (d + rope + d // group) :] == 171).all()


@drawn(8)
@given(
    tokens=st.integers(1, 6), page_size=st.integers(1, 6), pages=st.integers(1, 4),
    layout=st.sampled_from(["page", "row"]), data=st.data(),
)  # fmt: skip
def test_bytes_equal_the_reference(tokens, page_size, pages, layout, data):
    """Kernel and plain PyTorch leave the same bytes for any slots, distinct or none."""
    count = pages * page_size
    places = data.draw(st.permutations(range(-tokens, count + 2)))[:tokens]
    slot = torch.tensor([places], dtype=torch.int32, device=DEVICE)
    kv = rand(1, tokens, 128)
    cache, (_, kv_out), _ = packed_call(
        kv, slot, d=128, rope=64, group=64, page_size=page_size, layout=layout, pages=pages
    )
    other = torch.full_like(cache, 171)
    place = rows.layout_of(other, kv, tables(1, tokens, 64)[0], page_size, layout, 64)
    rows.write_packed(other, rows.packed_rows(kv_out, place, 64, 1e-4, "div"), slot, place)
    assert torch.equal(cache, other)


@pytest.mark.parametrize(
    "kw, sentence",
    [(dict(layout="column"), "no layout 'column' here"), (dict(group=48), "are not in 48s"),
     (dict(page_size=9), "bytes, 1764 at least"), (dict(kv_norm="weight", wide=True), "kv is")],
)  # fmt: skip
def test_misuse_is_explained(kw, sentence):
    cache = torch.zeros(2, 8 * 196, dtype=torch.uint8, device=DEVICE)
    w = rand(128, dtype=FP32 if kw.pop("wide", False) else BF16)
    slot = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    kw = BASE | dict(page_size=8, group=32) | kw
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        rows.norm_rope_cache_fp8(None, rand(1, 2, 128), *tables(1, 2, 64), None, w, cache, slot,
                                 **kw)  # fmt: skip


# ---- offsets -----------------------------------------------------------------------------------


def test_no_tokens():
    kv, cache = rand(1, 0, 64), poisoned(4, 64)
    slot = torch.zeros(1, 0, dtype=torch.int64, device=DEVICE)
    args = (None, kv, *tables(1, 0, 32), None, rand(64), cache, slot, None)
    assert rows.norm_rope_cache(*args, **BASE)[1].shape == (1, 0, 64)
    assert (cache == 777).all()


@huge
def test_more_than_2_to_the_31_elements():
    """70 000 rows of 64 heads, and a cache whose last page starts past 2^31 elements."""
    tokens = 70_000
    q = rand(1, 16, 64, 512).repeat(1, tokens // 16, 1, 1)
    kv = rand(1, tokens, 512)
    cos, sin = tables(1, tokens, 64)
    cache = torch.empty_strided((2, 4, 512), (2**31 + 512, 512, 1), dtype=BF16, device=DEVICE)
    cache.fill_(777.0)
    slot = torch.full((1, tokens), -1, device=DEVICE)
    slot[0, -1], slot[0, 0] = 7, 2
    kw = BASE | dict(flat_slot=True, wrap=False)
    got, kv_out = rows.norm_rope_cache(q, kv, cos, sin, None, rand(512), cache, slot, None, **kw)
    want = rows.reference(q[:, -3:], None, cos[:, -3:], sin[:, -3:], None, None, **BASE)[0]
    check_rows(got[0, -3:], want[0], "rstd", 64)
    same(cache[1, 3], kv_out[0, -1])
    same(cache[0, 2], kv_out[0, 0])
    assert (cache[1, :3] == 777).all()
