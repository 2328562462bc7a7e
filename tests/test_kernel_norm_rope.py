"""norm_rope against its reference and against fp64."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import norm_rope_cache as rows
from torch import Tensor

from dsv4fuse import atoms

from ._kernels import BF16, FP16, FP32, GPU, MARKS, TOKENS, close, rand, same, summed, tables

pytestmark = MARKS


NORM_CASES = [
    # norm, weight dtype, rope rounding, tables
    ("none", None, "once", "fp32"),
    ("none", None, "every", "bf16"),
    ("none", None, "every", "fp32"),
    ("once", None, "once", "complex"),
    ("once", FP32, "once", "expanded"),
    ("rstd", None, "once", "bf16"),
    ("rstd", BF16, "every", "bf16"),
    ("weight", BF16, "once", "bf16"),
    ("weight", FP32, "once", "fp32"),
    ("every", None, "once", "complex"),
    ("every", BF16, "every", "bf16"),
]


def eager_every(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``atoms.rms_norm(..., "every")`` with one rounding per operation, as CUDA rounds.

    The CPU rounds twice in a 16-bit rsqrt; there the operations go through fp32.
    """
    dtype = x.dtype
    mean = x.square().float().mean(-1, keepdim=True).to(dtype)
    y = x * torch.rsqrt((mean + eps).float()).to(dtype)
    return y if weight is None else weight * y


def norm_reference(q, kv, cos, sin, wq, wk, *, q_norm, kv_norm, precise=False, **kw):
    """The module's reference, but for "every" on a CPU."""
    if not GPU and not precise and "every" in (q_norm, kv_norm):
        q = q if q is None else eager_every(q, wq, kw["q_eps"])
        kv = kv if kv is None else eager_every(kv, wk, kw["kv_eps"])
        wq, wk, q_norm, kv_norm = None, None, "none", "none"
    return rows.reference(q, kv, cos, sin, wq, wk, q_norm=q_norm, kv_norm=kv_norm,
                          precise=precise, **kw)  # fmt: skip


def check_rows(got: Tensor, want: Tensor, norm: str, rope: int) -> None:
    """Without a norm bit-exact; else close, rope lanes measured against their pair's length."""
    if norm == "none":
        return same(got, want)
    assert got.stride() == want.stride()
    split = got.shape[-1] - rope
    if got.dtype != FP32:
        close(got[..., :split], want[..., :split], worst=1, fraction=0.01)
    summed(got[..., :split], want[..., :split])
    summed(got[..., split:], want[..., split:], group=2)


@pytest.mark.parametrize("norm, weight, rope_rounding, kind", NORM_CASES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_norm_rope_faithful(norm, weight, rope_rounding, kind, dtype):
    weight = dtype if weight is BF16 else weight
    q, kv = rand(2, 3, 3, 192, dtype=dtype), rand(2, 3, 192, dtype=dtype)
    w = None if weight is None else rand(192, dtype=weight)
    cos, sin = tables(2, 3, 64, kind)
    cos, sin = (cos.to(dtype), sin.to(dtype)) if kind == "bf16" else (cos, sin)
    kw = dict(q_eps=1e-6, kv_eps=1e-5, q_norm=norm, kv_norm=norm, rope_rounding=rope_rounding,
              q_heads_first=kind == "bf16")  # fmt: skip
    got = rows.norm_rope(q, kv, cos, sin, w, w, **kw)
    want = norm_reference(q, kv, cos, sin, w, w, **kw)
    for g, r in zip(got, want, strict=True):
        check_rows(g, r, norm, 64)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads, dim, rope", [(1, 512, 64), (3, 64, 64), (3, 128, 16)])
def test_norm_rope_sizes(tokens, heads, dim, rope):
    cos, sin = tables(1, tokens, rope, "complex")
    q, kv = rand(1, tokens, heads, dim), rand(1, tokens, dim)
    kw = dict(q_eps=1e-6, kv_eps=1e-6, q_norm="rstd", kv_norm="once", rope_rounding="once")
    got = rows.norm_rope(q, kv, cos, sin, None, None, **kw)
    for g, r in zip(got, rows.reference(q, kv, cos, sin, None, None, **kw), strict=True):
        check_rows(g, r, "rstd", rope)


@pytest.mark.parametrize("batch, length", [(3, 1), (1, 3)] + ([(1, 1500)] if GPU else []))
def test_norm_rope_64_heads_strided(batch, length):
    """Heads-first storage of q, kv a slice of a wider tensor, one of the two absent."""
    q = rand(batch, 64, length, 512).transpose(1, 2)
    kv = rand(batch, length, 1024)[..., 256:768]
    cos, sin = tables(batch, length, 64)
    kw = dict(q_eps=1e-6, kv_eps=1e-6, q_norm="rstd", kv_norm="weight", rope_rounding="once",
              q_heads_first=True)  # fmt: skip
    w = rand(512)
    for a, b in ((q, kv), (q, None), (None, kv)):
        got = rows.norm_rope(a, b, cos, sin, None, w if b is not None else None, **kw)
        want = rows.reference(a, b, cos, sin, None, w if b is not None else None, **kw)
        for g, r in zip(got, want, strict=True):
            assert g.shape == r.shape and g.dtype == r.dtype
            if g.numel():
                check_rows(g, r, "rstd", 64)


def exact_norm_rope(x: Tensor, w: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    wide = x.double()
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if w is None else y * w.double()
    return atoms.rope(y, cos.double(), sin.double(), rounding="every")


@pytest.mark.parametrize("norm, weight", [("rstd", None), ("weight", BF16), ("every", FP32)])
def test_norm_rope_precise(norm, weight):
    """One rounding: half an ulp of the exact value, and never worse than eager on average."""
    q = rand(1, 9, 3, 512)
    w = None if weight is None else rand(512, dtype=weight)
    cos, sin = tables(1, 9, 64)
    kw = dict(q_eps=1e-6, kv_eps=1e-6, q_norm=norm, kv_norm="none", rope_rounding="every")
    got, _ = rows.norm_rope(q, None, cos, sin, w, None, precise=True, **kw)
    eager, _ = norm_reference(q, None, cos, sin, w, None, **kw)
    exact = exact_norm_rope(q, w, cos.unsqueeze(2), sin.unsqueeze(2), 1e-6)
    assert got.dtype == eager.dtype
    error, eager_error = (got.double() - exact).abs(), (eager.double() - exact).abs()
    half = 0.5 * torch.finfo(got.dtype).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
    assert (error <= half + 2e-6 * exact.abs().amax()).all()
    assert error.mean() <= eager_error.mean() * 1.0 + torch.finfo(FP32).eps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 0.0])
def test_norm_rope_special_values(value):
    """A special value stays in its pair (no norm) or spoils exactly its row (norm)."""
    q = rand(1, 3, 3, 128)
    q[0, 1, 2, 7] = value
    q[0, 2, 0, 120] = value
    q[0, 0, 1] = value
    cos, sin = tables(1, 3, 16)
    for norm in ("none", "rstd"):
        kw = dict(q_eps=1e-6, kv_eps=1e-6, q_norm=norm, kv_norm=norm, rope_rounding="once")
        got, _ = rows.norm_rope(q, None, cos, sin, None, None, **kw)
        want, _ = rows.reference(q, None, cos, sin, None, None, **kw)
        if norm == "none":
            same(got, want)
        assert torch.equal(got.isnan(), want.isnan())


NORMS = dict(q_eps=1e-6, kv_eps=1e-6, q_norm="rstd", kv_norm="weight", rope_rounding="once")


def calls(small):
    args = small.q, small.kv, small.cos, small.sin, None, small.w
    return {"norm_rope": (args, dict(NORMS, q_heads_first=True))}
