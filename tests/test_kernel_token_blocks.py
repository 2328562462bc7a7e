"""1500 tokens in programs of 16: the last one has 12. Scale rows are padded to 4 all the same, and
what lies behind the last token is nobody's (TensorRT-LLM padded to the program's rows and lost 13
points of an evaluation)."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _norm_rope as norm_rope
from dsv4fuse.kernels import compress_kv as compress
from dsv4fuse.kernels import indexer_logits, indexer_q
from dsv4fuse.kernels import inv_rope_grouped_bmm as grouped
from dsv4fuse.kernels import inv_rope_quant as inv
from dsv4fuse.kernels import norm_quant as nq
from dsv4fuse.kernels import norm_rope_cache as rows
from dsv4fuse.kernels._common import Config

from dsv4fuse import atoms

from . import test_kernel_compress as pooled
from . import test_kernel_grouped_bmm as projected
from . import test_kernel_indexer_logits as scored
from . import test_kernel_norm_quant as normed
from ._kernels import DEVICE, MARKS, poisoned, rand, same, summed, tables

pytestmark = MARKS
TOKENS, BLOCK = 1500, ((None, Config(rows=16, warps=4)),)
NORMS = dict(q_eps=1e-6, kv_eps=1e-6, q_norm="rstd", kv_norm="once", rope_rounding="once")


@pytest.mark.parametrize("col_major", [pytest.param(False, marks=pytest.mark.long), True])
def test_norm_quant(monkeypatch, col_major):
    monkeypatch.setattr(nq, "CONFIGS", BLOCK)
    x, kv = rand(TOKENS, 64), rand(TOKENS, 32)
    got, kw = normed.call(x, None, kv, None, group=32, scale="fp32", col_major=col_major)
    normed.quantised_exactly(got, kw)
    for g, w in zip(got[2:], nq.reference(x, None, kv, None, **kw)[2:], strict=True):
        normed.normed_closely(g, w)


@pytest.mark.parametrize("col_major", [pytest.param(False, marks=pytest.mark.long), True])
def test_inv_rope_quant(monkeypatch, col_major):
    monkeypatch.setattr(inv, "CONFIGS", BLOCK)
    o, (cos, sin) = rand(1, TOKENS, 1, 64), tables(1, TOKENS, 16)
    kw = dict(groups=1, group=32, rope_rounding="once", col_major=col_major)
    got, want = (f(o, cos, sin, **kw) for f in (inv.inv_rope_quant, inv.reference_quant))
    same(got[0], want[0])
    same(got[1], want[1])


@pytest.mark.long
def test_norm_rope_cache(monkeypatch):
    """Every third token is padding: normed and turned, and written nowhere."""
    monkeypatch.setattr(norm_rope, "CONFIGS", BLOCK)
    q, kv, (cos, sin) = rand(1, TOKENS, 1, 64), rand(1, TOKENS, 64), tables(1, TOKENS, 16)
    slot = torch.randperm(TOKENS, device=DEVICE).unsqueeze(0) + 7
    slot[:, ::3] = -1
    cache, other = poisoned(TOKENS + 16, 64), poisoned(TOKENS + 16, 64)
    args = q, kv, cos, sin, None, None
    got = rows.norm_rope_cache(*args, cache, slot, None, wrap=False, **NORMS)
    want = rows.reference(*args, **NORMS)
    for g, w in zip(got, want, strict=True):
        summed(g, w, group=2)
    real = slot[0] >= 0
    other[slot[0, real]] = got[1][0, real]
    same(cache, other)


@pytest.mark.long
def test_indexer_q(monkeypatch):
    monkeypatch.setattr(indexer_q, "CONFIGS", BLOCK)
    x, (cos, sin) = rand(1, TOKENS, 1, 32), tables(1, TOKENS, 16)
    y = atoms.rope(x, cos.unsqueeze(2), sin.unsqueeze(2), rounding="once")
    same(indexer_q.indexer_q(x, cos, sin, rope_rounding="once"), y)
    codes, scales = indexer_q.indexer_q_quant(x, cos, sin, group=32, rope_rounding="once")
    want = atoms.group_quant(y, group=32, floor=1e-4, scale="pow2")
    same(codes, want[0])
    same(scales, want[1])


@pytest.mark.long
def test_indexer_logits():
    q, k, w = scored.made(1, TOKENS, 33, 2, 16)
    end = torch.arange(TOKENS, device=DEVICE).unsqueeze(0) % 34
    got = indexer_logits.indexer_logits(q, k, w, None, None, end)
    want = scored.exact(q, k, w).masked_fill(~scored.inside(33, None, end), float("-inf"))
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize(
    "strategy",
    [s if s == "prologue" else pytest.param(s, marks=pytest.mark.long) for s in grouped.STRATEGIES],
)
def test_inv_rope_grouped_bmm(strategy):
    o, cos, sin, w = projected.inputs(1, TOKENS, 2, 32, 16, 2, 16)
    out = grouped.inv_rope_grouped_bmm(o, cos, sin, w, rope_rounding="once", strategy=strategy)
    projected.near(out, projected.exact(o, cos, sin, w))


@pytest.mark.long
def test_compress_kv():
    """A step of 1500 requests, one in fifty of which closes a window."""
    sizes = (4, 0, 32)
    last = torch.arange(TOKENS, device=DEVICE) % 50 * 4
    ends = torch.where(last == 44, last + 3, -1).unsqueeze(1)
    given = pooled.gathered(TOKENS, 1, sizes, ends, 4)
    cache = poisoned(TOKENS, 13, 32)
    slot = torch.where(ends >= 0, ends // 4, 12)
    how = dict(pooled.BASE, width=4, ring=4)
    compress.compress_kv_cache(
        *given.all(), cache, slot, given.page, **how, keep=False, spare=True
    )
    wanted, (closing, _) = pooled.exact(given, **how), (ends >= 0).nonzero(as_tuple=True)
    assert pooled.worst(cache[given.page[closing, 0], 11], wanted[closing, 0]) <= 2
    cache[given.page[closing, 0], 11] = 777.0
    assert len(closing) == 30 and (cache == 777.0).all()
