"""indexer_logits: exact on integers, near fp64 elsewhere; ranges, strides, odd sizes, memory."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import indexer_logits as m
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ._kernels import BF16, DEVICE, FP8, FP16, FP32, GPU, MARKS, TOKENS, drawn, huge, poisoned

pytestmark = MARKS
INF = float("-inf")


def integers(*shape: int, dtype: torch.dtype = BF16, top: int = 7) -> Tensor:
    """Small integers: every dot and every sum of them is exact, in whatever order."""
    return torch.randint(-top, top + 1, shape, device=DEVICE).float().to(dtype)


def made(
    batch: int, tokens: int, keys: int, heads: int = 4, d: int = 32, dtype: torch.dtype = BF16,
    weight: torch.dtype = FP32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    w = integers(batch, tokens, heads, dtype=weight)
    return integers(batch, tokens, heads, d, dtype=dtype), integers(batch, keys, d, dtype=dtype), w


def exact(q: Tensor, k: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """In fp64, from the definition."""
    dots = torch.einsum("bthd,bsd->bhts", q.double(), k.double())
    return torch.einsum("bhts,bth->bts", dots.clamp_min(0) * scale, w.double())


def inside(keys: int, start: Tensor | None, end: Tensor | None) -> Tensor:
    place = torch.arange(keys, device=DEVICE)
    shown = torch.ones_like(place, dtype=torch.bool)
    if start is not None:
        shown = shown & (place >= start.unsqueeze(-1))
    return shown if end is None else shown & (place < end.unsqueeze(-1))


LAUNCHES = [m.Launch(32, 4, 2, 4, 2), m.Launch(64, 8, 1, 4, 2)]


@pytest.fixture(params=LAUNCHES, ids=str)
def launch(request, monkeypatch):
    monkeypatch.setattr(m, "CONFIGS", {n: ((None, request.param),) for n in (1, 2, 4)})


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP8])
@pytest.mark.parametrize("heads, d", [(4, 32), (17, 64)])
def test_exact_on_integers(launch, dtype, heads, d):
    q, k, w = made(2, 5, 37, heads, d, dtype)
    got = m.indexer_logits(q, k, w, scale=0.5)
    assert got.dtype == FP32 and got.is_contiguous()
    assert torch.equal(got.double(), exact(q, k, w, 0.5))


@pytest.mark.parametrize(
    "size, tokens", [(2, t) for t in (*TOKENS, 4, 5, 128)] + [(1, 5), (1, 129), (4, 5), (4, 129)]
)
def test_every_launch_of_the_table(tokens, size):
    dtype = {1: FP8, 2: BF16, 4: FP32}[size]
    q, k, w = made(1, tokens, 33, 2, dtype=dtype)
    end = torch.arange(tokens, device=DEVICE).unsqueeze(0) % 34
    got = m.indexer_logits(q, k, w, None, None, end)
    want = exact(q, k, w).masked_fill(~inside(33, None, end), INF)
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_roundings(dtype):
    """Integers whose dots need more bits than dtype has, rounded where each module rounds."""
    q, k = integers(2, 5, 4, 32, dtype=dtype, top=99), integers(2, 33, 32, dtype=dtype, top=99)
    w = integers(2, 5, 4, dtype=dtype)
    dots = torch.einsum("bthd,bsd->bths", q.double(), k.double())
    rounded = dots.to(dtype)
    assert (rounded.double() != dots).any()
    want = (rounded.double().relu() * 0.25 * w.double().unsqueeze(-1)).sum(2).float()
    got = m.indexer_logits(q, k, w.float(), scale=0.25, rounding="dot")
    assert torch.equal(got, want)
    terms = (rounded.relu() * 0.29) * w.unsqueeze(-1)
    assert terms.dtype == dtype
    got = m.indexer_logits(q, k, w, scale=0.29, rounding="every")
    assert torch.equal(got, terms.double().sum(2).float().to(dtype))
    for rounding in ("dot", "every"):
        got = m.indexer_logits(q, k, w, scale=0.25, rounding=rounding, precise=True)
        assert torch.equal(got, exact(q, k, w, 0.25).float().to(got.dtype))


@pytest.mark.parametrize("dtype", [BF16, FP8, FP32])
@pytest.mark.parametrize("precise", [False, True])
def test_as_near_to_fp64_as_eager(dtype, precise):
    """In rounding steps of fp32 at a row's largest value: eager's error and one step, each the
    root of the mean square (a single worst value is luck)."""
    q, k = (torch.randn(2, *s, 128, device=DEVICE).to(dtype) for s in ((9, 64), (150,)))
    w = torch.randn(2, 9, 64, device=DEVICE)
    want = exact(q, k, w, 0.088)
    step = want.abs().amax(-1, keepdim=True) * torch.finfo(FP32).eps
    dots = torch.matmul(q.float(), k.float().mT.unsqueeze(1))
    eager = ((dots.relu() * 0.088) * w.unsqueeze(-1)).sum(2)
    got = m.indexer_logits(q, k, w, scale=0.088, precise=precise)
    ours, theirs = (((x - want) / step).square().mean().sqrt() for x in (got, eager))
    assert ours <= theirs + 1


RANGES = ("causal", "window", "from the end", "anything", "none", "shared")


def ranges(batch: int, tokens: int, keys: int) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    t = torch.arange(tokens, device=DEVICE).expand(batch, tokens)
    some = torch.randint(-3, keys + 9, (2, batch, tokens), device=DEVICE)
    return {
        "causal": (None, t + 1),
        "window": ((t - 9).clamp(min=0).int(), t + 1),
        "from the end": (keys - t, None),
        "anything": (some[0], some[1].int()),  # empty, below 0, past the keys
        "none": (torch.full_like(t, 5), torch.full_like(t, 5)),
        "shared": (None, t[:1].expand(batch, tokens)),
    }


@pytest.mark.parametrize("which", RANGES)
def test_ranges(launch, which):
    """Outside: −inf, or what was there before. A NaN key outside is no matter."""
    check_ranges(*made(2, 11, 70), *ranges(2, 11, 70)[which])


def check_ranges(q: Tensor, k: Tensor, w: Tensor, start: Tensor | None, end: Tensor | None) -> None:
    shape = (*q.shape[:2], k.shape[1])
    shown = inside(k.shape[1], start, end).expand(shape)
    k = k.float().masked_fill(~shown.any(1).unsqueeze(-1), float("nan")).to(k.dtype)
    out = poisoned(*shape, dtype=FP32)
    m._launch(q, k, w, None, start, end, out, scale=1.0, scale_dots=False, rounding="once",
              precise=False, clean=False, narrow_sum=False)  # fmt: skip
    want = exact(q, k, w)
    assert torch.equal(out.double(), want.masked_fill(~shown, 777.0))
    got = m.indexer_logits(q, k, w, None, start, end)
    assert torch.equal(got.double(), want.masked_fill(~shown, INF))


@pytest.mark.parametrize("narrow_sum", [False, True])
def test_scales_of_fp8_keys(narrow_sum):
    q, k, w = made(2, 5, 37, dtype=FP8)
    k_scale = 2.0 ** torch.randint(-6, 6, (2, 37), device=DEVICE).float()
    got = m.indexer_logits(q, k, w, k_scale, narrow_sum=narrow_sum)
    assert torch.equal(got.double(), exact(q, k.double() * k_scale.unsqueeze(-1), w))


@pytest.mark.parametrize("dtype", [FP8, BF16])
def test_scales_of_dots(launch, dtype):
    """Powers of two of either sign: in front of relu, a negative one turns what it lets through."""
    q, k, w = made(2, 5, 37, 17, dtype=dtype)
    signs = torch.randint(0, 2, (2, 37), device=DEVICE) * 2 - 1
    k_scale = signs * 2.0 ** torch.randint(-6, 6, (2, 37), device=DEVICE).float()
    want = exact(q, k.double() * k_scale.unsqueeze(-1), w, 0.5)
    got = m.indexer_logits(q, k, w, k_scale, scale=0.5, scale_dots=True)
    assert torch.equal(got.double(), want)
    behind = m.indexer_logits(q, k, w, k_scale, scale=0.5)
    assert not torch.equal(got, behind)


@pytest.mark.parametrize("precise", [False, True])
def test_dots_of_fp8_round_to_bf16(precise):
    q, k, w = made(2, 5, 37, dtype=FP8)
    k_scale = torch.randn(2, 37, device=DEVICE)
    dots = torch.einsum("bthd,bsd->bths", q.double(), k.double())
    kept = dots if precise else dots.to(BF16).double()
    assert precise or (kept != dots).any()
    rated = kept.float() * k_scale[:, None, None]  # what is rounded is what the kernel multiplies
    want = (rated.double().relu() * w.double().unsqueeze(-1)).sum(2)
    got = m.indexer_logits(q, k, w, k_scale, rounding="dot", scale_dots=True, precise=precise)
    step = want.abs().amax(-1, keepdim=True) * torch.finfo(FP32).eps
    assert ((got - want).abs() <= 2 * step).all()


def test_strides():
    """Heads first, keys in wider rows and shared by the batch, transposed weights."""
    q = integers(2, 4, 5, 32).transpose(1, 2)
    k = integers(1, 37, 48)[..., :32].expand(2, -1, -1)
    w = integers(2, 4, 5, dtype=FP32).mT
    assert torch.equal(m.indexer_logits(q, k, w).double(), exact(q, k, w))


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 0, 5), (2, 3, 0)])
def test_nothing_to_do(shape):
    batch, tokens, keys = shape
    got = m.indexer_logits(*made(batch, tokens, keys))
    assert got.shape == (batch, tokens, keys) and got.dtype == FP32


def test_nan_and_infinity_as_in_eager():
    """Five heads: the columns that pad them must not make 0 · inf."""
    q, k, w = made(1, 6, 40, 5)
    q[0, 3, 4, 7], k[0, 9, 3], k[0, 10, 3] = float("nan"), float("inf"), INF
    want = (torch.einsum("bthd,bsd->bths", q.float(), k.float()).relu() * w[..., None]).sum(2)
    got = m.indexer_logits(q, k, w)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@drawn(20)
@given(st.data())
def test_any_shape(data):
    draw = lambda a, b: data.draw(st.integers(a, b))  # noqa: E731
    batch, tokens, keys, heads = draw(1, 3), draw(1, 5), draw(1, 70), draw(1, 20)
    q, k, w = made(batch, tokens, keys, heads, 16)
    some = torch.randint(0, keys + 1, (2, batch, tokens), device=DEVICE)
    start, end = (s if data.draw(st.booleans()) else None for s in some)
    got = m.indexer_logits(q, k, w, None, start, end)
    assert torch.equal(got.double(), exact(q, k, w).masked_fill(~inside(keys, start, end), INF))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(d=48), "index_head_dim 48 is no power of two"),
        (dict(heads=300), "300 heads are more"),
        (dict(dtype=torch.float64), "q must be bf16, fp16, fp32 or e4m3"),
        (dict(dtype=FP8, rounding="every"), 'float8_e4m3fn there is no rounding "every"'),
        (dict(dtype=FP32, rounding="dot"), 'float32 there is no rounding "dot"'),
        (dict(k_scale=torch.ones(1, 4)), "k_scale \\[B, S\\]"),
        (dict(scale_dots=True), "scale_dots needs k_scale"),
        (dict(k_scale=torch.ones(1, 3), scale_dots=True, rounding="every"), 'no rounding "every"'),
    ],
)
def test_what_it_does_not_take(change, sentence):
    own = {n: change[n] for n in ("rounding", "k_scale", "scale_dots") if n in change}
    with pytest.raises(ValueError, match=sentence):
        m.indexer_logits(*made(1, 2, 3, **{n: v for n, v in change.items() if n not in own}), **own)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_peak_memory():
    """8192 queries and keys: nothing beyond the output, where dots alone would take 17 GB."""
    q, k, w = made(1, 8192, 8192, 64, 128, FP8)
    end = torch.arange(1, 8193, device=DEVICE).unsqueeze(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = m.indexer_logits(q, k, w, None, None, end)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes < 64 << 20


@huge
def test_offsets_past_2_31():
    tokens, keys = 70000, 32768
    q, k, w = made(1, tokens, keys, 2, 16)
    got = m.indexer_logits(q, k, w)[:, -3:]
    assert torch.equal(got.double(), exact(q[:, -3:], k, w[:, -3:]))


def calls(small):
    ends = torch.arange(2 * small.length, device=small.device).view(2, small.length) % 6
    args = small.q, small(2, 5, 128), small.fp32(2, small.length, 2), None, None, ends
    return {"indexer_logits": (args, dict(scale=0.3))}
