"""norm_rope_cache: where rows go, what stays untouched, the fake-quant."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import norm_rope_cache as rows

from dsv4fuse import atoms

from ._kernels import DEVICE, FP32, MARKS, poisoned, rand, same, tables, ulps
from .test_kernel_norm_rope import NORMS

pytestmark = MARKS


def cache_call(kv, cos, sin, cache, slot=None, seq=None, q=None, **kw):
    """The op and its reference on two copies of the poisoned cache; outputs and caches agree."""
    base = dict(q_eps=1e-6, kv_eps=1e-6, q_norm="none", kv_norm="none", rope_rounding="once")
    base.update(kw)
    other = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=DEVICE)
    other.copy_(cache)
    before = cache.clone()
    got = rows.norm_rope_cache(q, kv, cos, sin, None, None, cache, slot, seq, **base)
    want = rows.reference(q, kv, cos, sin, None, None, cache=other, slot=slot, seq=seq, **base)
    for g, r in zip(got, want, strict=True):
        same(g, r)
    same(cache, other)
    return got, (ulps(cache, before) != 0).any(-1)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrap", [True, False])
def test_cache_slots(wrap, index):
    """Negative slots wrap or skip, slots past the end are skipped, the rest is untouched."""
    kv, (cos, sin) = rand(2, 4, 128), tables(2, 4, 32, "complex")
    slot = torch.tensor([[5, -1, 9, 2], [0, 20, -11, -40]], dtype=index, device=DEVICE)
    (_, kv_out), written = cache_call(kv, cos, sin, poisoned(12, 128), slot, wrap=wrap)
    rows_hit = {5, 9, 2, 0, 11, 1} if wrap else {5, 9, 2, 0}
    assert set(written.nonzero().flatten().tolist()) == rows_hit
    assert (kv_out != 0).any(-1).all()  # skipped rows are still normed, roped and returned


@pytest.mark.parametrize("kind", ["start", "tensor", "expanded", "seq_start"])
def test_cache_paged(kind):
    """[P, N, D]: dim 0 from seq or the batch index, dim 1 from slot or the position."""
    kv, (cos, sin) = rand(2, 3, 64), tables(2, 3, 64, "expanded")
    slot = torch.tensor([[4, 5, 1]], device=DEVICE)
    seq = torch.tensor([[3], [-1]], device=DEVICE)
    kw = {
        "start": dict(slot_start=2),
        "tensor": dict(slot=slot.repeat(2, 1), seq=seq.repeat(1, 3)),
        "expanded": dict(slot=slot.expand(2, 3), seq=seq.expand(2, 3)),
        "seq_start": dict(slot=slot.expand(2, 3), seq_start=-2),
    }[kind]
    _, written = cache_call(kv, cos, sin, poisoned(5, 7, 64), **kw)
    assert written.sum() == 6


def test_cache_with_an_axis_for_its_head():
    """[P, 1, N, D] is [P, N, D], rows apart in memory or not; two heads are none of both."""
    kv, (cos, sin) = rand(2, 3, 64), tables(2, 3, 64, "expanded")
    seq = torch.tensor([[3], [1]], device=DEVICE).expand(2, 3)
    wide = poisoned(5, 3, 7, 64)
    for cache in (poisoned(5, 1, 7, 64), wide[:, 1:2]):
        _, written = cache_call(kv, cos, sin, cache, seq=seq, slot_start=2)
        assert written.nonzero().tolist() == [[p, 0, n] for p in (1, 3) for n in (2, 3, 4)]
    with pytest.raises(ValueError, match=r"\[P, 1, N, D\]"):
        cache_call(kv, cos, sin, wide[:, :2], seq=seq, slot_start=2)


@pytest.mark.parametrize("wrap", [True, False])
def test_pages_that_are_not_there(wrap):
    """A view of two pages of four: rows for another page go nowhere, not to its neighbours."""
    kv, (cos, sin) = rand(2, 3, 64), tables(2, 3, 64)
    whole = poisoned(4, 7, 64)
    slot = torch.tensor([[4, 5, 1], [0, 2, 3]], device=DEVICE)
    seq = torch.tensor([[2, 0, -3], [1, -1, 3]], device=DEVICE)
    _, written = cache_call(kv, cos, sin, whole[1:3], slot, seq, wrap=wrap)
    there = {(0, 5), (1, 0)} | ({(1, 2)} if wrap else set())
    assert set(map(tuple, written.nonzero().tolist())) == there
    assert (whole[0] == 777.0).all() and (whole[3] == 777.0).all()


@pytest.mark.parametrize("keep_kv", [True, False])
def test_cache_strided_view(keep_kv):
    """A non-contiguous cache: the rows and columns around the view keep their poison."""
    kv, (cos, sin) = rand(1, 3, 128), tables(1, 3, 64, "bf16")
    whole = poisoned(4, 9, 2, 160)
    view = whole[1:3, 1:8, 1, 16:144]
    slot = torch.tensor([[6, -1, 0]], device=DEVICE)
    (_, kv_out), written = cache_call(
        kv, cos, sin, view, slot, q=rand(1, 3, 3, 128), wrap=False, keep_kv=keep_kv, seq_start=1
    )
    assert kv_out.shape == (kv.shape if keep_kv else (0,)) and kv_out.dtype == kv.dtype
    assert written.sum() == 2
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[2, [7, 1], 1, 16:144] = True
    assert (whole[~inside] == 777.0).all() and (whole[inside] != 777.0).all()


@pytest.mark.parametrize("scale, via", [("pow2", "div"), ("fp32", "div"), ("fp32", "mul")])
@pytest.mark.parametrize("weight", [None, FP32])
def test_cache_fake_quant(scale, via, weight):
    """Exactly ``atoms.fake_quant`` of the nope dims of what the plain op returns."""
    kv, (cos, sin) = rand(1, 5, 512, scale=3.0), tables(1, 5, 64)
    kv[0, 1, :64] = 0.0
    kv[0, 2, 70] = float("nan")
    kv[0, 3, 130] = float("inf")
    w = None if weight is None else rand(512, dtype=weight)
    norm = "none" if weight is None else "weight"
    kw = dict(q_eps=1e-6, kv_eps=1e-6, q_norm="none", kv_norm=norm, rope_rounding="once")
    _, plain = rows.norm_rope(None, kv, cos, sin, None, w, **kw)
    quant = dict(quant_group=64, quant_floor=1e-4, quant_scale=scale, via=via)
    cache = poisoned(8, 512, dtype=plain.dtype)
    _, got = rows.norm_rope_cache(
        None, kv, cos, sin, None, w, cache, None, None, slot_start=3, **kw, **quant
    )
    fake = atoms.fake_quant(plain[..., :448], group=64, floor=1e-4, scale=scale, via=via)
    same(got, torch.cat((fake, plain[..., 448:]), -1))
    same(cache[3:], got[0])
    assert (cache[:3] == 777).all()


def calls(small):
    q, *rest = small.q, small.kv, small.cos, small.sin, None, small.w
    packed = torch.zeros(30, 4 * 196, device=small.device, dtype=torch.uint8)
    return {
        "norm_rope_cache": (
            (q, *rest, small(3000, 128), small.slot, None),
            dict(NORMS, wrap=False, keep_kv=False, quant_group=32),
        ),
        "norm_rope_cache_fp8": (
            (q.expand(3, -1, -1, -1, -1), *rest, packed, small.slot),
            dict(NORMS, page_size=4, group=32, keep_kv=True),
        ),
    }
