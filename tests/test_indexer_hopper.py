"""The Hopper indexer kernel: on a GPU as it is, elsewhere run as Python (``_gluon``)."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _indexer_hopper_op as op
from dsv4fuse.kernels import indexer_logits as m
from torch._inductor.virtualized import V

from ._hopper import built, check_compiled_and_replayed, gpu_too, launched
from ._kernels import BF16, DEVICE, FP8, FP16, FP32, GPU
from .test_kernel_indexer_logits import INF, RANGES, check_ranges, exact, integers, ranges
from .test_kernel_indexer_logits import made as made_of

HEADS, D = 64, 128
# batch, tokens, keys: programs of four tokens, tiles of 128 keys, more than there are processors.
SIZES = [(1, 1, 1), (1, 3, 129), (2, 5, 300), (1, 6, 128)] + (
    [(1, 127, 1001), (2, 129, 127), (1, 1500, 1500), (3, 16, 4096)] if GPU else []
)


@pytest.fixture
def hopper(monkeypatch):
    """Launches go to the kernel whatever their size, and at least one does."""
    monkeypatch.setattr(op, "PAIRS", 0)
    monkeypatch.setattr(op, "FEW", 1)
    with launched(monkeypatch, op, processors=3):
        yield


def made(batch, tokens, keys, dtype=BF16, weight=FP32):
    return made_of(batch, tokens, keys, HEADS, D, dtype, weight)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP8])
@pytest.mark.parametrize("size", SIZES, ids=str)
@gpu_too
def test_exact_on_integers(size, dtype):
    q, k, w = made(*size, dtype)
    got = m.indexer_logits(q, k, w, scale=0.5)
    assert got.dtype == FP32 and got.is_contiguous()
    assert torch.equal(got.double(), exact(q, k, w, 0.5))


@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize("which", RANGES)
@gpu_too
def test_ranges(which, dtype):
    """Outside: −inf, or what was there before. A NaN key outside is no matter."""
    t, s = (130, 1900) if GPU else (11, 300)
    check_ranges(*made(2, t, s, dtype), *ranges(2, t, s)[which])


@pytest.mark.parametrize("dtype", [BF16, FP16])
@gpu_too
def test_roundings(dtype):
    """Integers whose dots need more bits than dtype has, rounded where each module rounds."""
    q, k = (integers(2, *shape, D, dtype=dtype, top=30) for shape in ((5, HEADS), (140,)))
    w = integers(2, 5, HEADS, dtype=dtype, top=3)
    dots = torch.einsum("bthd,bsd->bths", q.double(), k.double())
    rounded = dots.to(dtype)
    assert (rounded.double() != dots).any()
    want = (rounded.double().relu() * 0.25 * w.double().unsqueeze(-1)).sum(2).float()
    assert torch.equal(m.indexer_logits(q, k, w.float(), scale=0.25, rounding="dot"), want)
    terms = (rounded.relu() * 0.29) * w.unsqueeze(-1)
    got = m.indexer_logits(q, k, w, scale=0.29, rounding="every")
    assert torch.equal(got, terms.double().sum(2).float().to(dtype))
    for rounding in ("dot", "every"):
        got = m.indexer_logits(q, k, w, scale=0.25, rounding=rounding, precise=True)
        assert torch.equal(got, exact(q, k, w, 0.25).float().to(got.dtype))


@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize("scale_dots", [False, True])
@gpu_too
def test_scales_of_keys(scale_dots, dtype):
    """Powers of two of either sign, in front of relu or behind the sum."""
    q, k, w = made(2, 5, 140, dtype)
    signs = torch.randint(0, 2, (2, 140), device=DEVICE) * 2 - 1
    k_scale = signs * 2.0 ** torch.randint(-6, 6, (2, 140), device=DEVICE).float()
    got = m.indexer_logits(q, k, w, k_scale, scale=0.5, scale_dots=scale_dots)
    if scale_dots:
        want = exact(q, k.double() * k_scale.unsqueeze(-1), w, 0.5)
    else:
        want = exact(q, k, w, 0.5) * k_scale.double().unsqueeze(1)
    assert torch.equal(got.double(), want)


@gpu_too
def test_dots_of_fp8_round_to_bf16():
    q, k = (integers(2, *shape, D, dtype=FP8, top=15) for shape in ((5, HEADS), (140,)))
    w = integers(2, 5, HEADS, dtype=BF16, top=3)
    dots = torch.einsum("bthd,bsd->bths", q.double(), k.double())
    assert (dots.to(BF16).double() != dots).any()
    want = (dots.to(BF16).double().relu() * w.double().unsqueeze(-1)).sum(2)
    assert torch.equal(m.indexer_logits(q, k, w, rounding="dot").double(), want)


@gpu_too
def test_strides_and_rows_at_odd_places():
    """Heads first, keys in wider rows, shared by the batch or at no multiple of 16 bytes."""
    q = integers(2, HEADS, 5, D).transpose(1, 2)
    w = integers(2, HEADS, 5, dtype=FP32).mT
    for k in (integers(1, 200, 160)[..., :D].expand(2, -1, -1),
              integers(2 * 200 * D + 1)[1:].view(2, 200, D)):  # fmt: skip
        assert torch.equal(m.indexer_logits(q, k, w).double(), exact(q, k, w))


def test_rows_that_are_far_apart():
    """The kernel reckons within a tile in 32 bits: farther rows are copied, as odd places are."""
    far, close = (torch.empty_strided((1, 200, D), (0, step, 1), dtype=BF16, device="meta")
                  for step in (1 << 24, (1 << 24) - 16))  # fmt: skip
    assert op.near(far).stride(1) == D and op.near(close) is close


@gpu_too
def test_nan_and_infinity_as_in_eager():
    q, k, w = made(1, 6, 140)
    q[0, 3, 4, 7], k[0, 9, 3], k[0, 10, 3] = float("nan"), float("inf"), INF
    want = (torch.einsum("bthd,bsd->bths", q.float(), k.float()).relu() * w[..., None]).sum(2)
    got = m.indexer_logits(q, k, w)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@gpu_too
def test_opcheck():
    q, k, w = made(1, 5, 200)
    arguments = (q, k, w, None, None, None, torch.empty(1, 5, 200, device=DEVICE))
    how = dict(scale=1.0, scale_dots=False, rounding=0, precise=False, clean=True)
    op.launch(*arguments, **how)
    torch.library.opcheck(torch.ops.dsv4fuse.indexer_hopper.default, arguments, how)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_compiled_and_replayed():
    """Through Inductor, for any token count, and from a CUDA graph: the bits of eager."""
    def fn(q, k, w, end):
        return torch.ops.dsv4fuse.indexer_logits(q, k, w, None, None, end) * 2

    def given(t):
        return *made(1, t, 500), torch.arange(t, device="cuda")[None] + 1

    check_compiled_and_replayed(fn, given, by_tokens=(0, 2, 3))


def test_what_it_takes(monkeypatch):
    q, k = torch.zeros(1, 512, 64, 128, dtype=BF16), torch.zeros(1, 512, 128, dtype=BF16)
    assert "capability 9" in op.refusal(q, k, False)
    monkeypatch.setattr(op.hopper, "is_hopper", lambda device: True)
    assert op.refusal(q, k, False) is None
    assert op.refusal(q.to(FP8), k.to(FP8), False) is None
    assert "16 bits" in op.refusal(q.to(FP8), k.to(FP8), True)
    assert "16 bits" in op.refusal(q.float(), k.float(), False)
    assert "64 heads" in op.refusal(q[:, :, :32], k, False)
    assert "64 heads" in op.refusal(q[..., :64], k[..., :64], False)
    assert "few" in op.refusal(q[:, :511], k, False)
    assert "four tokens" in op.refusal(q.view(256, 2, 64, 128), k, False)
    odd = torch.zeros(1, 512, 136, dtype=BF16)[..., :128]
    assert "16 elements" in op.refusal(q, odd, False)
    with V.set_aot_compilation(True):
        assert "package" in op.refusal(q, k, False)
    monkeypatch.setattr(op, "kernel", lambda: None)
    assert "Gluon" in op.refusal(q, k, False)


def test_compiles_for_an_h200():
    """Two warpgroups' products, and nothing that does not fit registers."""
    found = built("indexer")
    assert len(found) == 4
    for made in found:
        assert made["STACK"] == 0 and made["shared"] <= 227 << 10
        assert made["products"] == 32 and made["copies"] in (8, 16)
