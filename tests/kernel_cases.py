"""The cases of test_kernels.py: every op's kernel against its reference and against fp64.

test_kernels.py runs this file twice in a process of its own: interpreted on the CPU
(TRITON_INTERPRET=1 must be set before Triton is imported) and compiled on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import clamp_swiglu_quant as swiglu
from dsv4fuse.kernels import inv_rope_quant as inv
from dsv4fuse.kernels import norm_rope_cache as rows
from torch import Tensor

from dsv4fuse import atoms

if common.INTERPRETED:
    import _interpreter

    _interpreter.install()
elif not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

DEVICE = "cpu" if common.INTERPRETED else "cuda"
GPU = DEVICE == "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32}
TOKENS = [1, 3, 127, 129] + ([1500] if GPU else [])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def tables(batch: int, length: int, rope: int, kind: str = "fp32") -> tuple[Tensor, Tensor]:
    """cos and sin ``[batch, length, rope/2]`` in the strides and dtypes that models produce."""
    angle = torch.randn(batch, length, rope // 2, device=DEVICE) * 3
    if kind == "complex":
        real = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
        assert real.stride(-2) == 2
        return real[..., 0], real[..., 1]
    if kind == "expanded":
        angle = angle[:1].expand(batch, -1, -1)
        return angle[:1].cos().expand(angle.shape), angle[:1].sin().expand(angle.shape)
    dtype = {"fp32": FP32, "bf16": BF16}[kind]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(SIGNED[x.element_size()])


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Distance in representable values; two NaNs are equal, +0 and -0 are one apart."""
    assert a.dtype == b.dtype and a.shape == b.shape
    lowest = torch.iinfo(SIGNED[a.element_size()]).min
    ordered = [torch.where(x < 0, lowest - x.long() - 1, x.long()) for x in (bits(a), bits(b))]
    both = a.float().isnan() & b.float().isnan()
    return torch.where(both, 0, (ordered[0] - ordered[1]).abs())


def same(a: Tensor, b: Tensor) -> None:
    """Equal bytes (NaN equals NaN), dtype, shape and strides."""
    assert a.stride() == b.stride(), (a.stride(), b.stride())
    wrong = (ulps(a, b) != 0).sum().item()
    assert wrong == 0, f"{wrong} of {a.numel()} differ"


def close(a: Tensor, b: Tensor, *, worst: int, fraction: float) -> None:
    assert a.stride() == b.stride(), (a.stride(), b.stride())
    off = ulps(a, b)
    if off.numel() == 0:
        return
    assert off.max().item() <= worst, f"{off.max().item()} ulp apart"
    share = (off != 0).double().mean().item()
    assert share <= fraction, f"{share:.2e} of the values differ"


# ---------------------------------------------------------------------- norm_rope, no cache
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
    """Without a norm bit-exact; else 1 ulp, rope lanes measured against their pair's length."""
    if norm == "none":
        return same(got, want)
    assert got.stride() == want.stride()
    split = got.shape[-1] - rope
    close(got[..., :split], want[..., :split], worst=4 if got.dtype == FP32 else 1,
          fraction=0.5 if got.dtype == FP32 else 0.01)  # fmt: skip
    pairs = [t[..., split:].double().unflatten(-1, (-1, 2)) for t in (got, want)]
    length = pairs[1].norm(dim=-1, keepdim=True).clamp_min(1e-30)
    worst = ((pairs[0] - pairs[1]).abs() / length).max().item()
    eps = torch.finfo(got.dtype).eps
    assert worst <= (4 if got.dtype == FP32 else 1) * eps, worst
    assert ((pairs[0] != pairs[1]).double().mean() <= 0.01) or got.dtype == FP32


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


# ------------------------------------------------------------------------- norm_rope_cache
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


def poisoned(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.full(shape, 777.0, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrap", [True, False])
def test_cache_slots(wrap, index):
    """Negative slots wrap or skip, slots past the end are skipped, the rest is untouched."""
    kv, (cos, sin) = rand(2, 4, 128), tables(2, 4, 32, "complex")
    slot = torch.tensor([[5, -1, 9, 2], [0, 20, -12, -40]], dtype=index, device=DEVICE)
    (_, kv_out), written = cache_call(kv, cos, sin, poisoned(12, 128), slot, wrap=wrap)
    rows_hit = {5, 9, 2, 0, 11} if wrap else {5, 9, 2, 0}
    rows_hit = rows_hit - {0} if wrap else rows_hit  # 0 is written twice under wrap, see below
    assert rows_hit <= set(written.nonzero().flatten().tolist()) <= rows_hit | {0}
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


# ------------------------------------------------------------------------------- swiglu
def packed(tokens: int, columns: int, layout: str, dtype: torch.dtype = BF16):
    if layout == "two":
        return rand(tokens, columns, dtype=dtype, scale=6), rand(tokens, columns, dtype=dtype,
                                                                 scale=6)  # fmt: skip
    both = rand(tokens, 2 * columns, dtype=dtype, scale=6)
    return both.chunk(2, -1) if layout == "chunk" else (both[:, 0::2], both[:, 1::2])


def swiglu_agrees(got: Tensor, want: Tensor) -> None:
    """Bit-exact on a GPU; the interpreter's exp is NumPy's, at most an ulp from PyTorch's."""
    if GPU:
        same(got, want)
    else:
        close(got, want, worst=4 if got.dtype == FP32 else 1,
              fraction=1.0 if got.dtype == FP32 else 2e-3)  # fmt: skip


SWIGLU = [
    # T, I, layout, weight, limit, rounding, dtype
    (1, 3072, "chunk", None, 10.0, "silu", BF16),
    (3, 1536, "interleaved", (FP32, 2), 10.0, "once", BF16),
    (129, 96, "two", (FP32, 1), 7.3, "silu", BF16),
    (127, 96, "chunk", (BF16, 1), None, "silu", BF16),
    (3, 100, "two", None, 7.3, "once", FP16),
    (3, 33, "interleaved", (BF16, 1), 5.0, "silu", FP16),
    (5, 256, "two", None, 10.0, "once", FP32),
] + ([(1500, 2048, "chunk", None, 10.0, r, BF16) for r in ("once", "silu")] if GPU else [])


def swiglu_inputs(tokens, columns, layout, weight, dtype):
    gate, up = packed(tokens, columns, layout, dtype)
    if weight is not None:
        shape = (tokens,) if weight[1] == 1 else (tokens, 1)
        weight = rand(*shape, dtype=weight[0])
    return gate, up, weight


@pytest.mark.parametrize("tokens, columns, layout, weight, limit, rounding, dtype", SWIGLU)
def test_clamp_swiglu(tokens, columns, layout, weight, limit, rounding, dtype):
    args = swiglu_inputs(tokens, columns, layout, weight, dtype)
    kw = dict(limit=limit, rounding=rounding)
    swiglu_agrees(swiglu.clamp_swiglu(*args, **kw), swiglu.reference(*args, **kw))


@pytest.mark.parametrize("scale", ["fp32", "pow2", "e8m0"])
@pytest.mark.parametrize("col_major", [False, True])
@pytest.mark.parametrize("tokens, columns, group", [(1, 3072, 128), (3, 1536, 64), (9, 96, 32)])
def test_clamp_swiglu_quant(tokens, columns, group, scale, col_major):
    """Equal to quantising what clamp_swiglu returns, bytes and scales and strides and padding."""
    gate, up = packed(tokens, columns, "chunk")
    gate[0, 3], up[-1, 40], gate[0, 50] = float("nan"), float("inf"), -200.0
    up[0, 64:96] = 0.0
    up[0, 64:96:2] = -0.0
    w = rand(tokens, dtype=FP32)
    kw = dict(limit=10.0, rounding="silu")
    quant = dict(group=group, floor=1e-10, scale=scale, via="mul" if columns == 96 else "div")
    codes, scales = swiglu.clamp_swiglu_quant(gate, up, w, col_major=col_major, **kw, **quant)
    y = swiglu.clamp_swiglu(gate, up, w, **kw)
    quant["scale"] = "fp32" if scale == "fp32" else "pow2"
    want, s = atoms.group_quant(y, **quant)
    same(codes, want)
    if scale == "e8m0":
        s = s.to(torch.float8_e8m0fnu)
        assert torch.equal(scales.view(torch.uint8), s.view(torch.uint8))
    else:
        assert torch.equal(scales.nan_to_num(-1.0), s.nan_to_num(-1.0))
    assert scales.dtype == s.dtype and scales.shape == s.shape
    aligned = (tokens + 3) // 4 * 4
    assert scales.stride() == ((1, aligned) if col_major else (columns // group, 1))
    if col_major:
        check_padding(scales, aligned, columns // group)


def check_padding(scales: Tensor, aligned: int, groups: int) -> None:
    """The rows behind the view exist and are zero."""
    raw = scales.view(torch.uint8) if scales.element_size() == 1 else scales
    physical = raw.as_strided((groups, aligned), (aligned, 1))
    assert (physical[:, scales.shape[0] :] == 0).all()
    assert raw.untyped_storage().nbytes() == groups * aligned * raw.element_size()


@pytest.mark.parametrize("col_major", [False, True])
def test_clamp_swiglu_quant_1500(col_major):
    """M = 1500: padding to a program's rows instead of 4 would show here."""
    gate, up = packed(1500, 32, "interleaved")
    kw = dict(limit=10.0, rounding="once", group=32, scale="fp32", col_major=col_major)
    saved = swiglu.CONFIGS
    try:
        swiglu.CONFIGS = ((None, common.Config(rows=64, warps=4, columns=32)),)
        codes, scales = swiglu.clamp_swiglu_quant(gate, up, None, **kw)
    finally:
        swiglu.CONFIGS = saved
    y = swiglu.clamp_swiglu(gate[:40], up[:40], None, limit=10.0, rounding="once")
    want, s = atoms.group_quant(y, group=32, floor=1e-10, scale="fp32")
    same(codes[:40], want)
    assert torch.equal(scales[:40], s)
    if col_major:
        check_padding(scales, 1500, 1)


@pytest.mark.parametrize("weight", [None, FP32])
def test_clamp_swiglu_precise(weight):
    gate, up = packed(9, 256, "two")
    w = None if weight is None else rand(9, dtype=weight)
    kw = dict(limit=10.0, rounding="silu")
    got = swiglu.clamp_swiglu(gate, up, w, precise=True, **kw)
    eager = swiglu.reference(gate, up, w, **kw)
    exact = gate.double().clamp(max=10.0)
    exact = exact * exact.sigmoid() * up.double().clamp(-10.0, 10.0)
    exact = exact if w is None else exact * w.double().unsqueeze(-1)
    error, eager_error = (got.double() - exact).abs(), (eager.double() - exact).abs()
    half = 0.5 * torch.finfo(got.dtype).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
    assert (error <= half + 2e-6 * exact.abs()).all()
    assert error.mean() <= eager_error.mean()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_silu_of_every_16_bit_value(dtype):
    """All 2^16 gates, infinities and NaN included, with up = 1; bit-exact on a GPU."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).to(DEVICE).view(256, 256)
    for limit in (None, 10.0):
        kw = dict(limit=limit, rounding="silu")
        got = swiglu.clamp_swiglu(gate, torch.ones_like(gate), None, **kw)
        want = swiglu.reference(gate, torch.ones_like(gate), None, **kw)
        if GPU:
            same(got, want)
        assert torch.equal(got.isnan(), want.isnan())
        near = ulps(got, want)[want.float().abs() > 1e-30]
        assert near.max() <= 1


# -------------------------------------------------------------------- block scales, division
@pytest.mark.parametrize("scale", ["fp32", "pow2"])
def test_scales_near_powers_of_two(scale):
    """amax whose 448th is within some ulps of 2^k: ceil(log2) as eager's, not by exponent."""
    k = 2.0 ** torch.arange(-20, 21, dtype=torch.float64)
    steps = torch.arange(-4, 5, dtype=torch.float64) * 2.0**-23
    amax = (448.0 * k[:, None] * (1 + steps)).flatten().float().to(DEVICE)
    o = torch.zeros(1, amax.numel(), 1, 128, device=DEVICE)
    o[0, :, 0, 5] = amax
    o[0, :, 0, 6] = -0.0
    o[0, :, 0, 7:100] = amax[:, None] * torch.randn(93, device=DEVICE).clamp(-1, 1)
    cos, sin = tables(1, amax.numel(), 2)
    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    kw = dict(groups=1, group=128, scale=scale, rope_rounding="once")
    got = inv.inv_rope_quant(o, cos, sin, **kw)
    want = inv.reference_quant(o, cos, sin, **kw)
    same(got[1], want[1])
    same(got[0], want[0])


# ------------------------------------------------------------------------------ inverse rope
@pytest.mark.parametrize("kind", ["fp32", "bf16", "complex", "expanded"])
@pytest.mark.parametrize("rope_rounding", ["once", "every"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_inv_rope(kind, rope_rounding, heads_first):
    o = rand(2, 3, 192, 3).transpose(2, 3).contiguous() if heads_first else rand(2, 3, 3, 192)
    cos, sin = tables(2, 3, 64, kind)
    for inverse in (True, False):
        kw = dict(rope_rounding=rope_rounding, inverse=inverse, heads_first=heads_first)
        same(inv.inv_rope(o, cos, sin, **kw), inv.reference(o, cos, sin, **kw))


QUANT = [
    # batch, length, heads, groups, dim, rope, group, tables, heads first
    (1, 1, 64, 8, 512, 64, 128, "fp32", True),
    (3, 1, 4, 2, 512, 64, 128, "complex", False),
    (2, 5, 3, 3, 192, 64, 64, "bf16", True),
    (1, 127, 2, 1, 128, 128, 128, "expanded", False),
    (1, 129, 3, 1, 64, 16, 32, "fp32", True),
] + ([(1, 1500, 64, 8, 512, 64, 128, "fp32", True)] if GPU else [])


@pytest.mark.parametrize("batch, length, heads, groups, dim, rope, group, kind, first", QUANT)
@pytest.mark.parametrize("scale, via", [("fp32", "div"), ("pow2", "mul")])
@pytest.mark.parametrize("col_major, token_major", [(False, True), (True, False)])
def test_inv_rope_quant(
    batch, length, heads, groups, dim, rope, group, kind, first, scale, via, col_major, token_major
):
    o = rand(batch, *((heads, length) if first else (length, heads)), dim)
    o = o.transpose(1, 2) if first else o
    cos, sin = tables(batch, length, rope, kind)
    kw = dict(groups=groups, group=group, scale=scale, via=via, rope_rounding="once",
              col_major=col_major, token_major=token_major)  # fmt: skip
    got, want = (f(o, cos, sin, **kw) for f in (inv.inv_rope_quant, inv.reference_quant))
    same(got[0], want[0])
    same(got[1], want[1])  # the padded physical tensor: pad rows are compared with zero
    if col_major:
        assert (got[1][..., batch * length :] == 0).all()


@pytest.mark.parametrize("rope_rounding, kind", [("every", "bf16"), ("every", "fp32")])
@pytest.mark.parametrize("columns", [0, 128])
def test_inv_rope_quant_launches(monkeypatch, rope_rounding, kind, columns):
    """Any launch shape gives the same bytes, NaN, inf and zeros included."""
    monkeypatch.setattr(inv, "CONFIGS", ((None, common.Config(8, 1, columns)),))
    o = rand(1, 13, 2, 512)
    o[0, 1, 0, 3], o[0, 2, 1, 400], o[0, 3, 0, 500] = float("nan"), float("inf"), float("nan")
    o[0, 4] = 0.0
    o[0, 5] = -0.0
    cos, sin = tables(1, 13, 64, kind)
    for scale in ("fp32", "pow2"):
        kw = dict(groups=1, scale=scale, rope_rounding=rope_rounding, col_major=True)
        got, want = (f(o, cos, sin, **kw) for f in (inv.inv_rope_quant, inv.reference_quant))
        same(got[0], want[0])
        same(got[1], want[1])


def test_inv_rope_quant_precise():
    """Scales and codes from the fp32 rotation, without the rounding to bf16 in between."""
    o, (cos, sin) = rand(1, 9, 2, 512), tables(1, 9, 64)
    kw = dict(groups=2, rope_rounding="every", precise=True)
    codes, scales = inv.inv_rope_quant(o, cos, sin, **kw)
    y = atoms.rope(o.double(), cos.double().unsqueeze(2), sin.double().unsqueeze(2), inverse=True,
                   rounding="every").unflatten(-1, (4, 128))  # fmt: skip
    exact = y.abs().amax(-1).flatten() / 448
    assert ((scales.flatten() - exact).abs() <= 3e-7 * exact).all()
    back = codes.float().view(9, 2, 4, 128).double() * scales.view(9, 2, 4, 1).double()
    step = torch.maximum(back.abs() / 16, scales.view(9, 2, 4, 1) * 2.0**-10) * (1 + 1e-5)
    assert ((back - y).abs() <= step).all()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_offsets_past_2_31():
    """40000 rows of 64 × 512 pass 2^31 elements; the last rows must land where they belong."""
    tokens = 66000
    o = torch.zeros(1, tokens, 64, 512, dtype=BF16, device=DEVICE)
    o[:, -3:] = rand(1, 3, 64, 512)
    cos, sin = tables(1, tokens, 64)
    got = inv.inv_rope(o, cos, sin, rope_rounding="once")
    same(got[:, -3:], inv.reference(o[:, -3:], cos[:, -3:], sin[:, -3:], rope_rounding="once"))
    codes, _ = inv.inv_rope_quant(o, cos, sin, groups=8, rope_rounding="once", col_major=True)
    want, _ = inv.reference_quant(o[:, -3:], cos[:, -3:], sin[:, -3:], groups=8,
                                  rope_rounding="once")  # fmt: skip
    same(codes[-3:], want)


def test_the_shim_rounds_to_nearest_even():
    if not common.INTERPRETED:
        pytest.skip("interpreter only")
    import triton.language as tl

    for target, kind in ((tl.bfloat16, BF16), (tl.float8e4nv, FP8)):
        x = torch.randn(4096) * 100
        want = x.clamp(-448, 448).to(kind) if kind == FP8 else x.to(kind)
        got = _interpreter._cast(x.numpy(), tl.float32, target)
        assert np.array_equal(got.view(f"int{8 * want.element_size()}"), bits(want).numpy())
