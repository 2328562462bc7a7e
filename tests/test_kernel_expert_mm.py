"""expert_mm: each row by its expert's weight, against fp64; rows of no expert may be anything."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from dsv4fuse.kernels import expert_mm as kernel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ._kernels import BF16, DEVICE, GPU, MARKS, drawn, rand, ulps

pytestmark = MARKS
OP = torch.ops.dsv4fuse.expert_mm
COUNTS = {
    "one row": [0, 0, 1], "one expert": [9], "none between": [2, 0, 3, 0, 0, 1],
    "the first": [7, 0], "tiles and a row": [17, 16, 1, 33, 0, 15], "all in one": [0, 130, 0, 0],
    "no rows": [0, 0, 0],
}  # fmt: skip


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).int()


def weights(experts: int, k: int, n: int) -> Tensor:
    """``[E,K,N]`` as models have it: a transposed ``[E,N,K]``."""
    return rand(experts, n, k, scale=k**-0.5).mT


def exact(x: Tensor, w: Tensor, counts: list[int]) -> Tensor:
    """In fp64, rounded once."""
    own = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)
    rows = torch.zeros(len(own), w.shape[2], dtype=torch.float64, device=DEVICE)
    for e in own.unique().tolist():
        rows[own == e] = x[: len(own)][own == e].double() @ w[e].double()
    return rows.to(BF16)


def agrees(x: Tensor, w: Tensor, counts: list[int]) -> None:
    """Another order of a sum in fp32 turns few of the last bits."""
    found, wanted = OP(x, w, ends_of(counts)), exact(x, w, counts)
    assert found.shape == (x.shape[0], w.shape[2]) and found.is_contiguous()
    found = found[: len(wanted)]
    off = ulps(found, wanted)
    near = (found.double() - wanted.double()).abs() <= 2**-22 * x.double().norm(dim=-1).amax()
    assert ((off <= 1) | near).all() and (off > 0).sum() <= 0.01 * off.numel()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("k, n", [(64, 64), (32, 48), (200, 130)])
def test_each_row_by_its_expert(counts, k, n):
    agrees(rand(max(1, sum(counts)), k), weights(len(counts), k, n), counts)


@pytest.mark.parametrize("tile", [t for _, t in kernel.TILES], ids=lambda t: f"{t.rows} rows")
def test_every_tile(monkeypatch, tile):
    monkeypatch.setattr(kernel, "TILES", ((None, tile),))
    counts = [3, 0, 65, 1, 32]
    agrees(rand(sum(counts), 128), weights(len(counts), 128, 192), counts)


@pytest.mark.parametrize("rows, experts", [(1, 32), (6, 256), (24, 32), (96, 48), (1500, 384)])
def test_at_sizes_of_models(rows, experts):
    k, n = (4096, 2048) if GPU else (64, 80)
    torch.manual_seed(rows)
    counts = torch.bincount(torch.randint(experts, (rows,)), minlength=experts).tolist()
    agrees(rand(rows, k), weights(experts, k, n), counts)


def test_strides():
    """Weights along their columns, rows of a wider tensor, every other expert of more."""
    counts = [4, 0, 20]
    x, w = rand(24, 96)[:, 32:], rand(3, 64, 80, scale=0.125)
    agrees(x, w, counts)
    agrees(x, rand(6, 80, 64, scale=0.125)[::2].mT, counts)
    agrees(rand(64, 24).mT, w, counts)


def test_rows_of_no_expert():
    """They may hold anything, the others do not notice; they are not read either."""
    counts, x = [3, 2], rand(9, 64)
    x[5:] = float("nan")
    agrees(x, weights(2, 64, 64), counts)


def test_nan_and_infinity_stay_in_their_rows():
    counts, x = [2, 2], rand(4, 64)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    found = OP(x, weights(2, 64, 64), ends_of(counts))
    assert found[1].isnan().all() and found[2].isinf().all() and found[[0, 3]].isfinite().all()


@pytest.mark.gpu
def test_a_weight_behind_two_to_the_31st():
    """The last of so many experts begins there."""
    w = torch.zeros(130, 4096, 4096, device="cuda", dtype=BF16)
    w[-1].normal_(0, 1 / 64)
    counts = [0] * 129 + [3]
    agrees(rand(3, 4096), w.mT, counts)


@drawn(25)
@hypothesis.given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(0, 3))
def test_any_counts(counts, more):
    """With ``more`` rows that no expert has."""
    torch.manual_seed(0)
    agrees(rand(max(1, sum(counts) + more), 64), weights(len(counts), 64, 32), counts)


@pytest.mark.parametrize("change, says", [
    (lambda x, w, e: (x.float(), w, e), "must be bf16"),
    (lambda x, w, e: (x, w[0], e), "w \\[E, K, N\\]"),
    (lambda x, w, e: (x[:, 1:], w, e), "not the weights'"),
    (lambda x, w, e: (x, w, e[1:]), "one number for each"),
    (lambda x, w, e: (x, w, e.long()), "dense int32"),
])  # fmt: skip
def test_misuse_is_explained(change, says):
    given = change(rand(3, 32), weights(2, 32, 32), ends_of([1, 2]))
    with pytest.raises((ValueError, RuntimeError), match=says):
        OP(*given)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=says):
        OP(*given)


def calls(small):
    ends = torch.tensor([1, 1, small.length], device=small.device).int()
    return {"expert_mm": ((small(small.length, 64), small(3, 96, 64).mT, ends), {})}
