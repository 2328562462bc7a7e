"""compress_kv with a matrix behind the rope: bytes against the reference, sums against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dsv4fuse.kernels import compress_kv as compress
from torch import Tensor

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, FP16, FP32, MARKS, poisoned, same, ulps
from .spellings._rotations import matrix
from .test_kernel_compress import BASE, HF, Given, exact, gathered, strided, worst

pytestmark = MARKS
FLOOR = 6 * 2.0**-126
FP4 = dict(quant_group=32, quant_floor=FLOOR, quant_fp4="kept")


def rotation(dim: int, dtype: torch.dtype = BF16) -> Tensor:
    return matrix(dim).to(dtype).to(DEVICE)


def whole(given: Given) -> Given:
    """Entries of small integers that no rounding touches: of each window one row has weight, no
    angle turns it. So every sum of a rotation is exact, in whatever order."""
    kv, before = (
        None if t is None else torch.randint(-3, 4, t.shape, device=DEVICE).to(t.dtype)
        for t in (given.kv, given.kv_before)
    )
    gate = torch.full_like(given.gate, float("-inf"))
    gate[..., 1, :] = 0.0
    old = None if before is None else torch.full_like(given.gate_before, float("-inf"))
    sin = torch.zeros_like(given.sin)
    return replace(given, kv=kv, kv_before=before, gate=gate, gate_before=old, weight=None,
                   cos=torch.ones_like(sin), sin=sin)  # fmt: skip


@pytest.mark.parametrize("numerics", ["faithful", "precise"])
@pytest.mark.parametrize("quant", [{}, FP4], ids=["", "fp4"])
@pytest.mark.parametrize("sizes, count", [((4, 4, 128), 5), ((4, 0, 64), 1), ((128, 0, 64), 3)])
def test_bytes_of_exact_sums(sizes, count, quant, numerics):
    """Byte for byte the plain op's entries times the matrix, at odd counts, kept and written."""
    given = whole(strided(2, count, sizes))
    how = dict(BASE, norm="none", shifted=sizes[1] > 0, precise=numerics == "precise")
    m = rotation(sizes[2])
    turned = (compress.compress_kv(*given.all(), **how).double() @ m.double()).float()
    turned = turned if how["precise"] else turned.to(BF16).float()
    turned = (turned * 0.29).to(BF16)
    if quant:
        turned = atoms.fake_quant(turned, group=32, floor=FLOOR, scale="pow2", fp4="kept")
    cache = poisoned(3, count + 1, sizes[2])
    how |= quant | dict(factor=0.29)
    got = compress.compress_kv_cache(*given.all(), cache, None, None, m, **how)
    same(got, turned)
    same(cache[:2, :count].contiguous(), turned)
    assert (cache[2] == 777.0).all() and (cache[:, count:] == 777.0).all()
    same(got, compress.reference(*given.all(), matrix=m, **how))


@pytest.mark.parametrize(
    "dtype, wide", [(BF16, False), (BF16, True), (FP16, False), (FP16, True), (FP32, True)]
)
def test_where_it_rounds(dtype, wide):
    """A matrix of one ±1 in each column, so that there is no sum: of the rows' dtype the product
    is rounded before the factor, of fp32 it is not; ``precise`` turns what nothing has rounded."""
    given = strided(1, 3, (4, 4, 64), kv=dtype, gate=FP32)
    how = dict(BASE, shifted=True, pool_dtype=dtype)
    given = replace(given, weight=given.weight.to(dtype))
    m = torch.eye(64)[torch.randperm(64)] * (torch.randint(0, 2, (64,)) * 2 - 1)
    m = m.to(FP32 if wide else dtype).to(DEVICE) * 3.0
    plain = compress.compress_kv(*given.all(), **how)
    want = plain.double() @ m.double()
    want = want.to(FP32) if wide else want.to(dtype)
    want = (want.float() * 0.29).to(dtype)
    same(compress.compress_kv(*given.all(), m, **how, factor=0.29), want)
    found = compress.compress_kv(*given.all(), m, **dict(how, precise=True), factor=0.29)
    true = exact(given, **how) @ m.double() * 0.29
    assert worst(found, true) <= (64 if dtype == FP32 else 1)


@pytest.mark.parametrize("numerics", ["faithful", "hf", "precise"])
@pytest.mark.parametrize("sizes", [(4, 4, 128), (128, 0, 64)])
def test_sums(sizes, numerics):
    """No farther from fp64 than the reference, up to a rounding that another order turns."""
    how = dict(HF if numerics == "hf" else BASE, precise=numerics == "precise")
    gate = BF16 if numerics == "hf" else FP32
    given, m = strided(2, 3, sizes, gate=gate), rotation(sizes[2])
    how |= dict(shifted=sizes[1] > 0, factor=sizes[2] ** -0.5)
    got = compress.compress_kv(*given.all(), m.t().contiguous().t(), **how)
    want = compress.reference(*given.all(), matrix=m, **how)
    true = exact(given, **how) @ m.double() * how["factor"]
    if numerics == "precise":
        assert worst(got, true) <= 1
    else:
        assert worst(got, true) <= worst(want, true) + 1
    assert numerics == "hf" or (ulps(got, want) != 0).double().mean() <= 0.05


@pytest.mark.parametrize("count", [1, 3])
def test_decode(count):
    """Who closes a window writes a rotated row of fp4, nobody else writes anything."""
    sizes, ring = (4, 4, 128), 8 + count - 1
    last = torch.tensor([3, 8, 21, count], device=DEVICE)
    positions = last[:, None] + torch.arange(count, device=DEVICE)
    ends = torch.where((positions + 1) % 4 == 0, positions, -1)
    given, m = gathered(4, count, sizes, ends, ring), rotation(128)
    how = dict(BASE, width=4, ring=ring, masked=True, factor=128**-0.5)
    slot = torch.where(ends >= 0, ends // 4, 8)
    cache, plain = poisoned(4, 9, 128), poisoned(4, 9, 128)
    for target, quant in ((cache, FP4), (plain, {})):
        compress.compress_kv_cache(
            *given.all(), target, slot, given.page, m, **how, **quant, keep=False, spare=True
        )
    hit = torch.zeros(4, 9, dtype=torch.bool, device=DEVICE)
    true = exact(given, **how) @ m.double() * how["factor"]
    for b, n in (ends >= 0).nonzero().tolist():
        at = given.page[b, n], slot[b, n]
        assert worst(plain[at], true[b, n]) <= 2
        hit[at] = True
    assert hit.any() and not hit[:, -1].any() and (cache[~hit] == 777.0).all()
    fake = atoms.fake_quant(plain[hit], group=32, floor=FLOOR, scale="pow2", fp4="kept")
    same(cache[hit], fake)


@pytest.mark.parametrize(
    "dim, m, quant, sentence",
    [
        (96, lambda: torch.eye(96), {}, "a power of two, not 96"),
        (64, lambda: torch.eye(64)[:32], {}, "the matrix must be 64 by 64"),
        (64, lambda: torch.eye(64).half(), {}, "neither of the rows' dtype nor fp32"),
        (64, lambda: torch.eye(64), dict(quant_group=16), "quantised to fp4 only"),
    ],
)
def test_no_such_matrix(dim, m, quant, sentence):
    given = strided(1, 2, (4, 4, dim))
    with pytest.raises(ValueError, match=sentence):
        compress.compress_kv(*given.all(), m().to(DEVICE), **BASE, shifted=True, **quant)

