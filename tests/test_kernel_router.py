"""moe_router and moe_router_hash: scores, choices and weights, ties, strides, foreign ids."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import moe_router as router
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4fuse import atoms

from ._kernels import BF16, DEVICE, FP16, FP32, GPU, MARKS, TOKENS, close, drawn, rand, same

pytestmark = MARKS
FP32_FUNCS = [f for f in router.FUNCS if f not in ("sigmoid", "softmax", "sqrt_softplus")]
EVERY = [("sigmoid", BF16), ("softmax", BF16), ("sqrt_softplus", BF16), ("sqrt_softplus", FP16),
         *((f, FP32) for f in router.FUNCS)]  # fmt: skip


@pytest.fixture(autouse=True)
def _many_rows(monkeypatch):
    """The interpreter takes as long for a program of one row as for one of many."""
    if not GPU:
        for name, rows in (("CONFIGS", 32), ("HASH_CONFIGS", 64)):
            monkeypatch.setattr(router, name, ((None, common.Config(rows=rows, warps=1)),))


def arguments(func: str = "sqrt_softplus", dtype: torch.dtype = FP32, **more: object) -> dict:
    weights = dict(sums=dtype, out=dtype, normalise=True, eps=1e-20, bounded=False, scale=1.5)
    return dict(func=func, scores=dtype, precise=False) | weights | more


def settled(s: Tensor, k: int, steps: float) -> Tensor:
    """The rows whose k + 1 largest scores are that many rounding steps apart, or more."""
    top = s.double().topk(min(k + 1, s.shape[-1]), dim=-1).values
    gap = steps * torch.finfo(torch.float32).eps * top.abs()[:, :-1]
    return (top[:, :-1] - top[:, 1:] > gap).all(-1)


def agrees(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], rows: Tensor | None = None):
    """The same experts, where that is determined; weights up to the sum's order and a last bit."""
    rows = torch.ones(len(got[1]), dtype=torch.bool, device=DEVICE) if rows is None else rows
    assert got[1].dtype == torch.int64 and torch.equal(got[1][rows], want[1][rows])
    alike = (got[1] == want[1]).all(-1)
    close(got[0][alike], want[0][alike], worst=1 if got[0].dtype != FP32 else 8, fraction=1.0)


@pytest.mark.parametrize("tokens", TOKENS + ([4, 5, 128, 1000, 8192] if GPU else []))
@pytest.mark.parametrize("experts, k", [(256, 6), (384, 8), (100, 3)])
def test_by_score(tokens, experts, k):
    x, bias = rand(tokens, experts, scale=3), rand(experts, dtype=FP32)
    kw = arguments(top_k=k)
    s = atoms.router_scores(x, bias, func="sqrt_softplus", wide=True)
    rows = settled(s, k, 0 if GPU else 8)
    agrees(router.moe_router(x, bias, **kw), router.reference(x, bias, **kw), rows)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_of_a_program(monkeypatch, rows):
    """The last program's rows beyond the end neither disturb nor are written."""
    monkeypatch.setattr(router, "CONFIGS", ((None, common.Config(rows=rows, warps=1)),))
    x, bias = rand(5, 160, scale=3), rand(160, dtype=FP32)
    kw = arguments(top_k=6)
    agrees(router.moe_router(x, bias, **kw), router.reference(x, bias, **kw))


@pytest.mark.parametrize("bias", [None, FP32, BF16])
@pytest.mark.parametrize("func, dtype", EVERY)
def test_every_score_function(func, dtype, bias):
    x = rand(9, 160, dtype=dtype, scale=3)
    b = None if bias is None else rand(160, dtype=bias)
    kw = arguments(func, dtype, top_k=4)
    s = atoms.router_scores(x, b, func=func, wide=False)
    rows = settled(s, 4, 0 if GPU and func != "softmax" else 8)
    agrees(router.moe_router(x, b, **kw), router.reference(x, b, **kw), rows)


@pytest.mark.parametrize("func", ["sqrt_softplus", "sqrt_stable", "sigmoid"])
def test_scores_from_minus_to_plus_a_hundred(func):
    """All experts chosen and nothing done to their scores: the scores themselves."""
    x = torch.cat((torch.linspace(-104, 100, 2048 - 8), torch.tensor(
        [-17.0, -90.0, 20.0, -20.0, 0.0, -0.0, float("inf"), float("-inf")]))).to(DEVICE)
    x = x.view(-1, 16)
    kw = arguments(func, top_k=16, normalise=False, scale=1.0)
    got, experts = router.moe_router(x, None, **kw)
    want = atoms.router_scores(x, None, func=func, wide=False).gather(1, experts)
    if GPU:
        same(got, want)
    at = x.double().gather(1, experts)
    exact = at.sigmoid() if func == "sigmoid" else torch.nn.functional.softplus(
        at, threshold=40.0).sqrt()  # fmt: skip
    error = (got.double() - exact).abs() / exact
    assert error[(at > -87) & exact.isfinite()].max() < 4e-7
    if func != "sigmoid":  # there eager's exp(-x) overflows
        assert error[(at > -100) & (at < -87)].max() < 0.03  # exp is subnormal: few digits
    assert torch.equal(got.isinf(), exact.isinf()) and (got[exact == 0] == 0).all()


def left_by_topk(s: Tensor, k: int) -> Tensor:
    """The order in which CUDA's torch.topk(sorted=False) leaves the experts."""
    rows = []
    for row in s.tolist():
        least = sorted(row, reverse=True)[k - 1]
        above = [i for i, v in enumerate(row) if v > least]
        rows.append((above + [i for i, v in enumerate(row) if v == least])[:k])
    return torch.tensor(rows, device=s.device)


@pytest.mark.parametrize("experts", [100, 256])
@pytest.mark.parametrize("ordered", [True, False])
def test_equal_scores(experts, ordered):
    """Few different logits: the lowest of equal experts, each at most once."""
    x = torch.randint(-3, 3, (33, experts), device=DEVICE).to(BF16)
    x[0], x[1, 5:] = 1.0, float("-inf")
    kw = arguments(dtype=BF16, top_k=8, ordered=ordered)
    _, experts_found = router.moe_router(x, None, **kw)
    s = atoms.router_scores(x, None, func="sqrt_softplus", wide=False).float()
    if ordered:
        want = s.sort(dim=-1, descending=True, stable=True).indices[:, :8]
    else:
        want = left_by_topk(s, 8)
    assert torch.equal(experts_found, want)
    if GPU and not ordered:
        assert torch.equal(want, s.to(BF16).topk(8, sorted=False).indices)


def test_nan_is_the_largest():
    x = rand(5, 256, dtype=FP32)
    x[1, 77], x[2, 200:203] = float("nan"), float("nan")
    weights, experts = router.moe_router(x, None, **arguments(top_k=6))
    assert experts[1, 0] == 77 and experts[2, :3].tolist() == [200, 201, 202]
    assert weights[1:3].isnan().all() and not weights[[0, 3, 4]].isnan().any()


@pytest.mark.parametrize("more", [
    dict(normalise=False), dict(scale=1.0), dict(eps=0.0), dict(eps=7.5), dict(out=BF16),
    dict(eps=2.5, bounded=True), dict(eps=1e-6, bounded=True), dict(sums=FP32, out=FP32),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_weights(dtype, more):
    x, bias = rand(17, 64), rand(64, dtype=FP32)
    kw = arguments(dtype=dtype, top_k=5) | more
    rows = settled(atoms.router_scores(x, bias, func="sqrt_softplus", wide=dtype == FP32), 5, 8)
    agrees(router.moe_router(x, bias, **kw), router.reference(x, bias, **kw), rows)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("func, dtype", [("sqrt_softplus", FP32), ("sigmoid", BF16),
                                         ("softmax", FP32)])  # fmt: skip
def test_by_token_id(tokens, func, dtype):
    table = torch.randint(96, (50, 6), device=DEVICE, dtype=torch.int32)
    ids = torch.randint(-50, 50, (tokens,), device=DEVICE)
    args = rand(tokens + 1, 96, scale=3), table, ids
    kw = arguments(func, dtype)
    agrees(router.moe_router_hash(*args, **kw), router.reference_hash(*args, **kw))


def test_ids_from_elsewhere():
    """Where eager raises, NaN; and no memory outside is read."""
    table = torch.tensor([[0, 1], [2, 300], [-1, 3]], device=DEVICE)
    ids = torch.tensor([0, 1, 2, 3, -4], device=DEVICE)
    weights, _ = router.moe_router_hash(rand(5, 8), table, ids, **arguments())
    assert not weights[0].isnan().any() and weights[1:].isnan().all()


def test_strides_and_empty_batches():
    x, bias = rand(64, 20, dtype=FP32), rand(40, dtype=FP32)[8:28]
    kw = arguments(top_k=4)
    agrees(router.moe_router(x[:40:2], bias, **kw), router.reference(x[:40:2], bias, **kw))
    turned = rand(20, 7, dtype=FP32).t()
    agrees(router.moe_router(turned, bias, **kw), router.reference(turned, bias, **kw))
    weights, experts = router.moe_router(x[:0], bias, **kw)
    assert weights.shape == experts.shape == (0, 4)
    table = torch.randint(20, (9, 8), device=DEVICE)[:, ::2]
    ids = torch.arange(8, device=DEVICE)[::2]
    args = x[:4], table, ids
    agrees(router.moe_router_hash(*args, **arguments()),
           router.reference_hash(*args, **arguments()))


def test_precise():
    """The same choice; the weights nearer the exact ones than eager's bf16 steps leave them."""
    x, bias = rand(65, 256, scale=3), rand(256, dtype=FP32)
    kw = arguments(dtype=BF16, top_k=6)
    eager, experts = router.reference(x, bias, **kw)
    got, chosen = router.moe_router(x, bias, **kw | dict(precise=True))
    rows = settled(atoms.router_scores(x, bias, func="sqrt_softplus", wide=False), 6, 8)
    assert torch.equal(chosen[rows], experts[rows])
    s = torch.nn.functional.softplus(x.double()).sqrt().gather(1, chosen)
    exact = s / s.sum(-1, keepdim=True) * 1.5
    error = (got.double() - exact).abs()
    assert (error <= 0.51 * torch.finfo(BF16).eps * 2 ** exact.log2().floor()).all()
    assert error[rows].mean() < (eager.double() - exact).abs()[rows].mean()


@drawn(10)
@hypothesis.given(
    experts=st.integers(2, 400), k=st.integers(1, 16), tokens=st.integers(1, 5),
    ordered=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_number_of_experts(experts, k, tokens, ordered, seed):
    """Scores that are plainly different, in any order."""
    k = min(k, experts)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)])
    x = (order.float() / experts * 8 - 4).to(DEVICE)
    _, found = router.moe_router(x, None, **arguments("sigmoid", top_k=k, ordered=ordered))
    want = x.topk(k, dim=-1).indices if ordered else left_by_topk(x, k)
    assert torch.equal(found, want)


@pytest.mark.parametrize("experts, blocks", [(256, (256, 0)), (384, (256, 128)), (100, (64, 64)),
                                             (160, (128, 32)), (1, (1, 0)), (257, (256, 1))])
def test_blocks_hold_a_row(experts, blocks):
    assert router.blocks(experts) == blocks


@pytest.mark.parametrize("more, says", [
    (dict(top_k=17), "17 of 32 experts"), (dict(top_k=4, func="relu"), "no score function"),
    (dict(top_k=4, func="sqrt_stable", dtype=BF16), "in fp32 only"),
])  # fmt: skip
def test_misuse_is_explained(more, says):
    with pytest.raises((ValueError, RuntimeError), match=says):
        router.moe_router(rand(2, 32), None, **arguments(**more))


def test_what_the_op_refuses_its_fake_refuses():
    """Else a site would be planned that cannot run: a bias that is read through a cast from fp8."""
    bias = rand(32, dtype=FP32).to(torch.float8_e4m3fn)
    ops, how = torch.ops.dsv4fuse, arguments()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(ValueError, match="bias must be bf16"):
            ops.moe_router(rand(2, 32), bias, top_k=4, **how)
        with pytest.raises(ValueError, match="ids must be integers"):
            ops.moe_router_hash(rand(2, 32), rand(9, 4), torch.arange(2), **how)


def calls(small):
    wide = dict.fromkeys(("scores", "sums", "out"), torch.float32)
    how = dict(wide, func="sqrt_softplus", eps=1e-20, scale=1.5)
    logits, table = small(small.length, 96), torch.arange(300, device=small.device).view(50, 6) % 96
    return {
        "moe_router": ((logits, small.fp32(96)), dict(how, top_k=6)),
        "moe_router_hash": ((logits, table, small.ids % 50), how),
    }
