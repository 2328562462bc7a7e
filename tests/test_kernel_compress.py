"""compress_kv: entries against fp64, windows of every layout, where entries are written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from dsv4fuse.kernels import _windows as windows
from dsv4fuse.kernels import compress_kv as compress
from hypothesis import given as given_sizes
from hypothesis import strategies as st
from torch import Tensor

from dsv4fuse import atoms

from ._kernels import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    MARKS,
    drawn,
    huge,
    poisoned,
    rand,
    same,
    tables,
    ulps,
)

pytestmark = MARKS
ROPE = 16
BASE = dict(pool_rounding="once", pool_dtype=BF16, eps=1e-6, norm="once", rope_rounding="once")
HF = dict(BASE, pool_rounding="every", norm="weight", narrow_bias=True)
# (rows, rows before, channels): each plan at its largest and at odd sizes.
SIZES = [
    (4, 4, 512), (4, 4, 128), (4, 0, 144), (8, 0, 64), (128, 0, 96), (64, 64, 48),
]  # fmt: skip


@dataclass(frozen=True)
class Given:
    """The op's positional arguments."""

    kv: Tensor
    gate: Tensor
    kv_before: Tensor | None
    gate_before: Tensor | None
    bias: Tensor | None
    bias_before: Tensor | None
    weight: Tensor | None
    cos: Tensor
    sin: Tensor
    ends: Tensor | None = None
    page: Tensor | None = None

    def all(self, dtype=None) -> tuple:
        wide = lambda t: t.to(dtype) if dtype and t is not None and t.is_floating_point() else t  # noqa: E731
        return tuple(wide(getattr(self, f)) for f in self.__dataclass_fields__)


def strided(batch, count, sizes, kv=BF16, gate=FP32, bias=None) -> Given:
    """Windows as views of a projection ``[B, S, C]`` with some tokens left over, shifted halves."""
    width, before, dim = sizes
    channels = dim * 2 if before else dim
    whole = [rand(batch, count * width + 3, channels, dtype=d, scale=2.0) for d in (kv, gate)]
    x, g = (t[:, : count * width].unflatten(1, (count, width)) for t in whole)
    b = None if bias is None else rand(width, channels, dtype=bias)
    lead = (x[..., :dim], g[..., :dim]) if before else (None, None)
    lead_bias = b[:, :dim] if b is not None and before else None
    own_bias = None if b is None else b[:, -dim:]
    table = tables(batch, count, ROPE)
    return Given(x[..., -dim:], g[..., -dim:], *lead, own_bias, lead_bias, rand(dim), *table)


def gathered(batch, count, sizes, ends, ring, kv=BF16, gate=FP32) -> Given:
    """Rings of raw rows, as a decode step reads them."""
    width, before, dim = sizes
    channels = dim * 2 if before else dim
    x, g = (rand(batch, ring + 1, channels, dtype=d) for d in (kv, gate))
    lead = (x[..., :dim], g[..., :dim]) if before else (None, None)
    page = torch.arange(batch, device=DEVICE).flip(0)[:, None].expand(batch, count)
    table = tables(batch, count, ROPE)
    ends = torch.as_tensor(ends, device=DEVICE)
    return Given(x[..., -dim:], g[..., -dim:], *lead, None, None, rand(dim), *table, ends, page)


def exact(given: Given, **how) -> Tensor:
    """The entry before the last rounding, in fp64."""
    x, g, xb, gb, bias, bias_b, w, cos, sin, ends, page = given.all(torch.float64)
    ring, width = how.get("ring", 0), x.shape[2] if ends is None else how["width"]
    if ends is not None:
        def rows(t, first):
            at = ends.unsqueeze(-1) + torch.arange(first, first + width, device=t.device)
            return t[page.unsqueeze(-1), at % ring if ring else at.clamp_min(0)]

        past = (ends.unsqueeze(-1) + torch.arange(1 - 2 * width, 1 - width, device=x.device)) < 0
        x, g = rows(x, 1 - width), rows(g, 1 - width)
        if xb is not None:
            xb, gb = rows(xb, 1 - 2 * width), rows(gb, 1 - 2 * width)
            if how.get("masked"):
                gb = torch.where(past.unsqueeze(-1), float("-inf"), gb)
    if bias is not None:
        g = g + bias
    if xb is not None:
        gb = gb if bias_b is None else gb + bias_b
        if how.get("shifted"):
            xb, gb = (t.roll(1, dims=1) for t in (xb, gb))
            gb[:, 0] = float("-inf")
        x, g = torch.cat((xb, x), 2), torch.cat((gb, g), 2)
    y = (x * g.softmax(2)).sum(2)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + how["eps"]) * w
    half = cos.shape[-1]
    even, odd = y[..., -2 * half :: 2], y[..., 1 - 2 * half :: 2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((y[..., : -2 * half], turned), -1)


def worst(got: Tensor, wanted: Tensor) -> float:
    """The error in rounding steps of the row's largest value."""
    step = wanted.abs().amax(-1, keepdim=True) * torch.finfo(got.dtype).eps
    return ((got.double() - wanted).abs() / step).max().item()


@pytest.mark.parametrize("numerics", ["faithful", "precise", "hf"])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_plan(sizes, numerics):
    """Bytes of eager but where a sum in another order turns a rounding; fp64 within a step."""
    how = dict(HF if numerics == "hf" else BASE, precise=numerics == "precise")
    gate = BF16 if numerics == "hf" else FP32
    given = strided(2, 2, sizes, gate=gate, bias=gate)
    how["shifted"] = sizes[1] > 0
    got, want = compress.compress_kv(*given.all(), **how), compress.reference(*given.all(), **how)
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    wanted = exact(given, **how)
    assert worst(got, wanted) <= worst(want, wanted) + (0.0 if numerics == "precise" else 1.0)
    if numerics != "hf":  # whose rounded weights turn with the last bit of exp
        assert (ulps(got, want) != 0).double().mean() <= 1e-2
    if numerics == "precise":
        assert worst(got, wanted) <= 1


@pytest.mark.parametrize(
    "kv, gate, bias", [(FP32, FP32, FP32), (FP16, FP16, FP16), (BF16, FP32, BF16)]
)
def test_dtypes(kv, gate, bias):
    given = strided(1, 3, (4, 4, 64), kv=kv, gate=gate, bias=bias)
    how = dict(BASE, shifted=True, pool_dtype=kv, narrow_bias=gate == FP16)
    if kv == FP32:  # 64 fp32 steps: exp, two sums, the norm
        assert worst(compress.compress_kv(*given.all(), **how), exact(given, **how)) <= 64
    else:
        got = compress.compress_kv(*given.all(), **how)
        assert (ulps(got, compress.reference(*given.all(), **how)) != 0).double().mean() <= 2e-3


@pytest.mark.parametrize(
    "sizes, count",
    [((4, 4, 64), n) for n in (1, 2, 3, 4, 5, 8)] + [((16, 0, 32), n) for n in (1, 4, 7)],
)
def test_steps_of_several_tokens(sizes, count):
    """next_n tokens of requests of different lengths: who closes a window writes, nobody else."""
    width, before, dim = sizes
    ring = width + before + count - 1
    last = torch.tensor([width - 1, 2 * width, 5 * width + 1, count], device=DEVICE)
    positions = last[:, None] + torch.arange(count, device=DEVICE)
    ends = torch.where((positions + 1) % width == 0, positions, -1)
    given = gathered(4, count, sizes, ends, ring)
    cache = poisoned(4, 13, dim)
    slot = torch.where(ends >= 0, ends // width, 12)
    how = dict(BASE, width=width, ring=ring, masked=before > 0)
    out = compress.compress_kv_cache(
        *given.all(), cache, slot, given.page, **how, keep=False, spare=True
    )
    assert out.shape == (0,)
    wanted = exact(given, **how)
    hit = torch.zeros(4, 13, dtype=torch.bool, device=DEVICE)
    for b, n in (ends >= 0).nonzero().tolist():
        row = cache[given.page[b, n], slot[b, n]]
        assert worst(row, wanted[b, n]) <= 2
        hit[given.page[b, n], slot[b, n]] = True
    assert (cache[~hit] == 777.0).all() and hit.sum() == (ends >= 0).sum()


@pytest.mark.parametrize("ring", [0, 11])
@pytest.mark.parametrize("keep", [True, False])
def test_written_rows(ring, keep):
    """Slots that wrap, skip or lie past the end; an end of -1; a cache with room around it."""
    ends = torch.tensor([[7, -1, 3], [5, 10, -1]], device=DEVICE)
    given = gathered(2, 3, (4, 4, 64), ends, 11)
    how = dict(BASE, width=4, ring=ring, masked=True, seq_start=1, keep=keep)
    slot = torch.tensor([[0, -1, 9], [-2, 4, -9]], device=DEVICE)
    for wrap in (True, False):
        whole = poisoned(4, 7, 96)
        cache, other = whole[:, 1:6, 16:80], poisoned(4, 5, 64)
        got = compress.compress_kv_cache(*given.all(), cache, slot, None, **how, wrap=wrap)
        want = compress.reference(*given.all(), cache=other, slot=slot, **how, wrap=wrap)
        assert got.shape == want.shape and worst_or_zero(got, want) <= 1
        assert worst_or_zero(cache, other) <= 1
        hit = (other != 777.0).any(-1)
        assert hit.sum() == (4 if wrap else 2)
        inside = torch.zeros_like(whole, dtype=torch.bool)
        inside[:, 1:6, 16:80] = hit.unsqueeze(-1)
        assert (whole[~inside] == 777.0).all()


def worst_or_zero(got: Tensor, want: Tensor) -> float:
    return worst(got, want.double()) if got.numel() else 0.0


@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("sizes", [(4, 4, 80), (128, 0, 80)])
def test_fake_quant(sizes, scale):
    """Byte for byte ``atoms.fake_quant`` of what the plain op returns."""
    given = strided(1, 3, sizes)
    how = dict(BASE, shifted=sizes[1] > 0)
    plain = compress.compress_kv(*given.all(), **how)
    quant = dict(group=32, floor=1e-4, scale=scale, via="div")
    fake = atoms.fake_quant(plain[..., :64], **quant)
    cache = poisoned(3, 80)
    got = compress.compress_kv_cache(
        *given.all(), cache, None, None, **how, quant_group=32, quant_scale=scale
    )
    same(got, torch.cat((fake, plain[..., 64:]), -1))
    same(cache, got[0])


@pytest.mark.parametrize("form", ["kept", "turned 0", "plain 6"])
@pytest.mark.parametrize("sizes", [(4, 4, 96), (128, 0, 128)])
def test_fake_fp4(sizes, form):
    """Byte for byte ``atoms.fake_quant`` of what the plain op returns, the turned lanes too."""
    given = strided(1, 3, sizes)
    given.kv[0, 1] = 0.0  # with the rows before: nearly nothing, or zeros under the floor
    how = dict(BASE, shifted=sizes[1] > 0)
    plain = compress.compress_kv(*given.all(), **how)
    for floor in (6 * 2.0**-126, 0.5):
        quant = dict(quant_group=32, quant_floor=floor, quant_fp4=form)
        fake = atoms.fake_quant(plain, group=32, floor=floor, scale="pow2", fp4=form)
        assert not torch.equal(fake, plain) and (fake[..., -ROPE:] != plain[..., -ROPE:]).any()
        cache = poisoned(3, sizes[2])
        got = compress.compress_kv_cache(*given.all(), cache, None, None, **how, **quant)
        same(got, fake)
        same(cache, got[0])


@pytest.mark.parametrize(
    "quant, sentence",
    [
        (dict(quant_fp4="even", quant_group=32), "no form 'even' of e2m1"),
        (dict(quant_fp4="kept"), "fp4 has groups"),
        (dict(quant_fp4="kept", quant_group=32, quant_scale="fp32"), "powers of two"),
        (dict(quant_fp4="kept", quant_group=64), "96 lanes are no multiple of 64"),
    ],
)
def test_no_such_fp4(quant, sentence):
    with pytest.raises(ValueError, match=sentence):
        compress.compress_kv(*strided(1, 2, (4, 4, 96)).all(), **BASE, shifted=True, **quant)


def test_nothing_to_do():
    given = strided(0, 2, (4, 4, 64))
    assert compress.compress_kv(*given.all(), **BASE, shifted=True).shape == (0, 2, 64)


def test_gates_of_minus_infinity():
    """Rows without weight do not count; a window without any weight is NaN, as in eager."""
    given = strided(1, 2, (4, 0, 64))
    given.gate[0, 0, 1:] = float("-inf")
    given.gate[0, 1, :, 3] = float("-inf")
    got, want = compress.compress_kv(*given.all(), **BASE), compress.reference(*given.all(), **BASE)
    assert torch.equal(got.isnan(), want.isnan()) and got[0, 1].isnan().all()
    assert worst_or_zero(got[:, :1], want[:, :1]) <= 1


@drawn(8)
@given_sizes(st.integers(1, 3), st.integers(1, 6), st.sampled_from([(2, 2), (8, 0), (32, 32)]),
             st.integers(1, 5))  # fmt: skip
def test_any_windows(batch, count, rows, lanes):
    torch.manual_seed(batch * 7 + count)
    given = strided(batch, count, (*rows, 16 * (1 + lanes)))
    how = dict(BASE, shifted=rows[1] > 0)
    assert worst(compress.compress_kv(*given.all(), **how), exact(given, **how)) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1000, 1500, 8192])
def test_many_entries(count):
    given = strided(1, count, (4, 4, 512))
    how = dict(BASE, shifted=True)
    assert worst(compress.compress_kv(*given.all(), **how), exact(given, **how)) <= 2


@huge
@pytest.mark.parametrize("sizes", [(4, 4, 512), (128, 0, 96)])
def test_offsets_past_2_31(sizes, far=2**30 + 512):
    """Pages so far apart that the third one starts past 2^31 elements, read and written."""
    width, before, dim = sizes
    ends = torch.tensor([[2 * width - 1]] * 3, device=DEVICE)
    given = gathered(3, 1, sizes, ends, 2 * width)

    def apart(t: Tensor) -> Tensor:
        """t's page 2 where the third page lies; the middle one is not looked at."""
        whole = torch.empty_strided(t.shape, (far, *t.stride()[1:]), dtype=t.dtype, device=DEVICE)
        whole[0], whole[2] = t[0], t[2]
        return whole

    names = ("kv", "gate", "kv_before", "gate_before")
    given = replace(given, page=torch.tensor([[2], [0], [2]], device=DEVICE))
    held = {n: apart(t) for n in names if (t := getattr(given, n)) is not None}
    how = dict(BASE, width=width, ring=2 * width, masked=before > 0)
    cache = apart(poisoned(3, 4, dim))
    slot = torch.tensor([[3], [1], [-1]], device=DEVICE)
    there = replace(given, **held)
    compress.compress_kv_cache(*there.all(), cache, slot, given.page, **how, keep=False, wrap=False)
    want = compress.compress_kv(*given.all(), **how)
    same(cache[2, 3], want[0, 0])
    same(cache[0, 1], want[1, 0])
    assert (cache[2, :3] == 777.0).all() and (cache[0, [0, 2, 3]] == 777.0).all()


def test_the_plans_are_what_is_launched():
    """Every plan is the one chosen at its own size; what is larger is refused in a sentence."""
    for plan in windows.PLANS:
        assert windows.plan(plan.width, plan.dim, plan.every) is plan
        assert all(way[-1][0] is None for way in (plan.launches, plan.decoding) if way)
    with pytest.raises(ValueError, match="is larger than 128 of 1024"):
        windows.plan(256, 512, False)
    given = strided(1, 2, (4, 4, 64))
    with pytest.raises(ValueError, match="does not have 4 rows for each entry"):
        compress.compress_kv(*replace(given, kv=given.kv[:, :1]).all(), **BASE, shifted=True)


LAUNCHES = sorted(
    {launch for plan in windows.PLANS if not plan.every
     for _, launch in (*plan.launches, *plan.decoding)}
    | {windows.Launch(0, 4, 2, 2, 3), windows.Launch(32, 4, 4)},
    key=repr,
)  # fmt: skip


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("form", ["rows", "ring"])
def test_every_launch(monkeypatch, form, launch):
    """Cut or whole, all rows at once or by steps: windows with rows before them, some absent, a
    bias, rows of no weight at the start of one and in the whole of another."""
    monkeypatch.setattr(compress, "choose", lambda *_: launch)
    width, dim = 8, 48
    if form == "rows":
        given, how = strided(1, 3, (width, width, dim), bias=FP32), dict(BASE, shifted=True)
        given.gate[0, 0, :5] = float("-inf")
        given.gate[0, 2, :, 3] = given.gate_before[0, 1, :, 3] = float("-inf")
        got, want = compress.compress_kv(*given.all(), **how), exact(given, **how)
        assert got[0, 2].isnan().all() and want[0, 2].isnan().all()
        assert worst(got[:, :2], want[:, :2]) <= 2
        return
    ends = torch.tensor([[-1, width - 1, -1], [-1, -1, -1], [3 * width - 1, -1, -1]], device=DEVICE)
    given = gathered(3, 3, (width, width, dim), ends, 2 * width + 2)
    how = dict(BASE, width=width, ring=2 * width + 2, masked=True)
    cache, slot = poisoned(3, 5, dim), torch.where(ends >= 0, ends // width, 4)
    compress.compress_kv_cache(
        *given.all(), cache, slot, given.page, **how, keep=False, spare=True
    )
    want = exact(given, **how)
    hit = {(2, 0): want[0, 1], (0, 2): want[2, 0]}  # gathered() gives request b page 2 - b
    for page in range(3):
        for row in range(5):
            found = cache[page, row]
            if (page, row) in hit:
                assert worst(found, hit[page, row]) <= 2
            else:
                assert (found == 777.0).all()


@pytest.mark.parametrize("count", [2, 11])
def test_requests_in_a_row(monkeypatch, count):
    """A decode step's requests as one batch, as a single axis of tokens is bound: each is a
    program's, and a batch of its own. Entries that share a page are one request's, and stay."""
    width, dim, seen = 4, 48, []
    asked = lambda z, *rest: seen.append((z.batch, z.count)) or windows.choose(z, *rest)  # noqa: E731
    monkeypatch.setattr(compress, "choose", asked)
    closed = torch.arange(count, device=DEVICE)[:, None] % 3 != 1
    ends = torch.where(closed, 3 * width - 1, -1)
    given = gathered(count, 1, (width, width, dim), ends, 2 * width)
    how = dict(BASE, width=width, ring=2 * width, masked=True, keep=False, spare=True)
    row = replace(given, **{
        name: getattr(given, name).transpose(0, 1) for name in ("cos", "sin", "ends", "page")
    })  # fmt: skip
    slot, caches = torch.where(closed, 2, 4), [poisoned(count, 5, dim) for _ in "abc"]
    compress.compress_kv_cache(*given.all(), caches[0], slot, given.page, **how)
    compress.compress_kv_cache(*row.all(), caches[1], slot.t(), row.page, **how)
    assert torch.equal(caches[0], caches[1]) and (caches[0] != 777.0).any()
    shared = replace(row, page=row.page[:, :1].expand(1, count))
    compress.compress_kv_cache(*shared.all(), caches[2], slot.t(), shared.page, **how)
    assert seen == [(count, 1), (count, 1), (1, count)]


def calls(small):
    windows, ring = small(2, small.length, 4, 128), small(2, 9, 128)
    cache = small(2, 4 * small.length, 128)  # slots from -length to 3 * length, each row once
    how = dict(pool_rounding="once", pool_dtype=torch.bfloat16, eps=1e-6, norm="once",
               rope_rounding="once")  # fmt: skip
    cos, sin, slot = small.cos, small.sin, small.slot
    return {
        "compress_kv": (
            (windows, windows, windows, windows, None, None, small.w, cos, sin, None, None),
            dict(how, shifted=True),
        ),
        "compress_kv_cache": (
            (ring, ring.float(), *[None] * 5, cos, sin, slot, None, cache, slot + 2, None),
            dict(how, width=4, ring=8, keep=True, quant_group=32, spare=True),
        ),
    }
