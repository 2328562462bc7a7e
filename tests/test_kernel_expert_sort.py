"""expert_sort: any ids, sorted as torch sorts them when it keeps equal ones in order."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import expert_sort as sort
from torch import Tensor

from ._kernels import DEVICE, GPU, MARKS, TOKENS, drawn

pytestmark = MARKS
INT32, INT64 = torch.int32, torch.int64
FAR = {INT32: [-(1 << 31), (1 << 31) - 1], INT64: [-(1 << 63), (1 << 63) - 1, (1 << 32) + 1]}


def ids_of(size: int, experts: int, dtype: torch.dtype = INT64, beyond: int = 1) -> Tensor:
    """Experts, and, up to one less than ``beyond`` behind them, those that are elsewhere."""
    return torch.randint(experts + beyond, (size,), device=DEVICE).to(dtype)


def wanted(ids: Tensor, experts: int, **how: bool) -> list[Tensor]:
    """By comparisons with each expert, unlike the op's own reference."""
    values, order = torch.sort(ids, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(ids.shape[0], device=ids.device)
    counted = (ids.to(INT32) if how.get("narrow") else ids)[:, None]
    every = torch.arange(experts, device=ids.device)
    above = counted <= every
    if not how.get("negative"):
        above &= counted >= 0
    return [values, order, inverse, above.sum(0), (counted == every).sum(0)]


def agrees(ids: Tensor, bins: int, experts: int | None = None, **how: bool) -> None:
    experts = bins if experts is None else experts
    found = sort.expert_sort(ids, bins=bins, experts=experts, ends=INT32, counts=INT64, **how)
    assert [t.dtype for t in found] == [ids.dtype, INT64, INT64, INT32, INT64]
    for got, want in zip(found, wanted(ids, experts, **how), strict=True):
        assert got.is_contiguous() and torch.equal(got.long(), want.long())


@pytest.mark.parametrize("size", [0, *TOKENS[:4], 1500, *([24, 512, 12288, 50001] * GPU)])
@pytest.mark.parametrize("experts", [2, 8, 32, *([256, 384, 1024] * GPU)])
def test_experts_and_those_elsewhere(size, experts):
    agrees(ids_of(size, experts), experts)


@pytest.mark.parametrize("dtype", [INT32, INT64])
@pytest.mark.parametrize("experts", [256, 384])
def test_as_many_as_models_have(experts, dtype):
    agrees(ids_of(24, experts, dtype), experts)


@pytest.mark.parametrize("dtype", [INT32, INT64])
@pytest.mark.parametrize("size", TOKENS[:4])
@pytest.mark.parametrize("experts", [1, 8])
def test_any_numbers(size, experts, dtype):
    ids = torch.randint(-5, experts + 6, (size,), device=DEVICE).to(dtype)
    far = torch.tensor(FAR[dtype], device=DEVICE, dtype=dtype)
    where = torch.randint(size, (2 * len(far),), device=DEVICE)
    ids[where] = far.repeat(2)
    for negative, narrow in itertools.product((False, True), repeat=2):
        agrees(ids, experts, negative=negative, narrow=narrow)


@pytest.mark.parametrize("kind", ["negative", "beyond", "elsewhere", "one expert", "falling"])
def test_all_alike(kind):
    ids = torch.arange(150, 0, -1, device=DEVICE)
    low = {"negative": -160, "beyond": 9, "falling": 0}
    agrees(ids + low[kind] if kind in low else torch.full_like(ids, 8 * (kind == "elsewhere")), 8)


@pytest.mark.parametrize("experts", [0, 1, 5])
def test_ends_of_fewer_experts_than_there_are(experts):
    agrees(ids_of(40, 8), 8, experts)
    agrees(ids_of(40, 8), 8, experts, negative=True)


@pytest.mark.parametrize("asked", [*itertools.product((False, True), repeat=4)])
def test_what_is_asked_for(asked):
    """The rest is empty; and what is asked for has its dtype."""
    values, inverse, ends, counts = asked
    ids, experts = ids_of(50, 6), 6
    found = sort.expert_sort(
        ids, bins=experts, experts=experts, values=values, inverse=inverse,
        ends=INT64 if ends else None, counts=INT32 if counts else None,
    )  # fmt: skip
    kept = (values, True, inverse, ends, counts)
    for got, want, there in zip(found, wanted(ids, experts), kept, strict=True):
        assert torch.equal(got.long(), want.long()) if there else got.numel() == 0
    assert found[3].dtype == (INT64 if ends else INT32) and found[4].dtype == INT32


@pytest.mark.parametrize("dtype", [INT32, INT64])
def test_strides(dtype):
    table = ids_of(300, 8, dtype).view(60, 5)
    for ids in (table[:, 2], table.flatten()[::7], table[3, 1:2].expand(40), table.t()[1]):
        assert not ids.is_contiguous() or ids.shape[0] == 1
        agrees(ids, 8)


@pytest.mark.parametrize("rows, warps", [(16, 1), (32, 1), (64, 2)])
@pytest.mark.parametrize("size", [15, 16, 17, 31, 33, 64, 65, 100])
def test_blocks(monkeypatch, size, rows, warps):
    """At the ends of a block, and over several."""
    shape = common.Config(rows=rows, warps=warps)
    monkeypatch.setattr(sort, "CONFIGS", ((None, shape),))
    agrees(torch.randint(-1, 7, (size,), device=DEVICE), 4)


@drawn(15)
@hypothesis.given(
    size=st.integers(0, 90), experts=st.integers(1, 12), low=st.integers(-3, 2),
    more=st.integers(0, 4), seed=st.integers(0, 2**31), how=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def test_any_range(size, experts, low, more, seed, how):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, experts + more + 1, (size,), generator=generator).to(DEVICE)
    agrees(ids, experts, negative=how[0], narrow=how[1])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [24, 129, 4097, 12288])
def test_the_same_bits_again(size):
    ids, how = ids_of(size, 256, beyond=3), dict(bins=256, experts=256, ends=INT32)
    first = sort.expert_sort(ids, **how)
    for _ in range(20):
        assert all(map(torch.equal, first, sort.expert_sort(ids, **how)))


@pytest.mark.parametrize("ids, more, says", [
    (torch.zeros(2, 3, dtype=INT64), {}, "ids must be \\[S\\]"),
    (torch.zeros(3), {}, "ids must be int32 or int64"),
    (torch.zeros(3, dtype=INT64), dict(bins=1025), "1025 experts are not 1 to 1024"),
    (torch.zeros(3, dtype=INT64), dict(experts=5), "ends of 5 experts, of 4"),
    (torch.zeros(3, dtype=INT64), dict(ends=torch.float32), "ends and counts must be"),
])  # fmt: skip
def test_misuse_is_explained(ids, more, says):
    with pytest.raises((ValueError, RuntimeError), match=says):
        sort.expert_sort(ids.to(DEVICE), **dict(bins=4) | more)


def calls(small):
    ids = torch.arange(6 * small.length, device=small.device) * 5 % 17
    how = dict(bins=16, experts=16, ends=INT32, counts=INT64)
    return {"expert_sort": ((ids,), how)}
