"""compress_kv_step: a step's rows to their rings, and what is pooled of rings that hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4fuse.kernels import _windows as windows
from dsv4fuse.kernels import compress_kv as compress
from hypothesis import given as drawn_from
from hypothesis import strategies as st
from torch import Tensor

from ._kernels import BF16, DEVICE, FP16, FP32, MARKS, drawn, poisoned, rand, same, tables
from .spellings._rotations import matrix
from .test_kernel_compress import BASE, ROPE

pytestmark = MARKS


def step(
    batch: int, count: int, sizes: tuple[int, int, int], kv: torch.dtype = BF16,
    gate: torch.dtype = FP32, biased: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """A decode step in the middle of sequences, one of them at its start, one of padding."""
    width, before, dim = sizes
    channels, ring = dim * 2 if before else dim, width + before + count - 1
    last = torch.randint(width, 9 * width, (batch, 1), device=DEVICE)
    last[0], last[-1] = width - 1, 3 * width - 1
    positions = last + torch.arange(1 - count, 1, device=DEVICE)
    ends = torch.where((positions >= 0) & ((positions + 1) % width == 0), positions, -1)
    at = torch.where(positions >= 0, positions % ring, ring)
    new = rand(batch, count, channels, dtype=kv), rand(batch, count, channels, dtype=gate)
    table = tables(batch, count, ROPE)
    return dict(
        kv=rand(batch + 1, ring + 1, channels, dtype=kv),
        gate=rand(batch + 1, ring + 1, channels, dtype=FP32 if biased else gate),
        weight=rand(dim, dtype=kv), cos=table[0], sin=table[1], ends=ends,
        cache=poisoned(batch, 11, dim, dtype=kv),
        slot=torch.where(ends >= 0, ends // width, 10),
        seq=torch.arange(batch, device=DEVICE)[:, None].expand(batch, count),
        new_kv=new[0], new_gate=new[1], at=at,
        step_bias=rand(width, channels, dtype=FP32) if biased else None,
        place=positions % width if biased else None,
        how=BASE | dict(width=width, ring=ring, masked=before > 0, pool_dtype=kv),
        halves=(dim, 0) if before else (0, None),
    )  # fmt: skip


def run(s: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The rings and the cache, as the op leaves them."""
    kv, gate, cache = (s[n].clone() for n in ("kv", "gate", "cache"))
    names = ("weight", "cos", "sin", "ends")
    rows = ("slot", "seq", "new_kv", "new_gate", "at", "step_bias", "place")
    now, before = s["halves"]
    compress.compress_kv_step(
        kv, gate, *(s[n] for n in names), cache, *(s[n] for n in rows), more.pop("m", None),
        **s["how"], channel=now, channel_before=before or 0, before=before is not None, **more,
    )  # fmt: skip
    return kv, gate, cache


def apart(s: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The rows written in plain PyTorch, and then the op that pools."""
    kv, gate, cache = (s[n].clone() for n in ("kv", "gate", "cache"))
    new_gate = s["new_gate"]
    if s["step_bias"] is not None:
        new_gate = new_gate.float() + s["step_bias"][s["place"]]
    rows = kv.shape[1]
    for b, k in torch.cartesian_prod(*map(torch.arange, s["at"].shape)).tolist():
        at = s["at"][b, k].item()
        if -rows <= at < rows:
            kv[b, at], gate[b, at] = s["new_kv"][b, k], new_gate[b, k]
    dim = cache.shape[-1]
    x, g, old, old_gate = (
        None if at is None else t.narrow(-1, at, dim) for at in s["halves"] for t in (kv, gate)
    )
    compress.compress_kv_cache(
        x, g, old, old_gate, None, None, s["weight"], s["cos"], s["sin"], s["ends"], s["seq"],
        cache, s["slot"], s["seq"], more.pop("m", None), **s["how"], keep=False, spare=True, **more,
    )  # fmt: skip
    return kv, gate, cache


def both_same(s: dict[str, Any], **more: Any) -> None:
    for found, wanted in zip(run(s, **more), apart(s, **more), strict=True):
        same(found, wanted)


@pytest.mark.parametrize(
    "sizes, count, biased",
    [((4, 4, 64), 1, True), ((4, 4, 48), 3, False), ((4, 0, 48), 2, True), ((16, 0, 32), 5, True),
     ((128, 0, 16), 3, True)],
)  # fmt: skip
def test_bytes_of_both_apart(sizes, count, biased):
    s = step(3, count, sizes, biased=biased)
    assert (s["ends"] >= 0).any()
    both_same(s)


@pytest.mark.parametrize("launch", [windows.Launch(16, 4), windows.Launch(0, 4, 2, 2, 2)])
def test_launches(monkeypatch, launch):
    """Columns apart, whose programs write their own of each row; rows by steps."""
    monkeypatch.setattr(compress, "choose", lambda *_: launch)
    both_same(step(3, 2, (8, 8, 48)))


@pytest.mark.parametrize("how", [dict(precise=True), dict(pool_rounding="every"), "fp16", "fp4"])
def test_other_roundings(how):
    dtype = FP16 if how == "fp16" else BF16
    s = step(2, 2, (4, 4, 64), kv=dtype, gate=dtype)
    if how == "fp4":
        m = matrix(64).to(BF16).to(DEVICE)
        return both_same(s, m=m, factor=0.125, quant_group=32, quant_fp4="kept", quant_floor=1e-4)
    s["how"] |= how if isinstance(how, dict) else {}
    both_same(s)


def test_a_written_row_is_not_read():
    """What the step writes to is NaN before it: each window takes those rows from the step."""
    s = step(4, 3, (4, 4, 64))
    page = torch.arange(4, device=DEVICE)[:, None]
    for ring in ("kv", "gate"):
        s[ring][page, s["at"]] = float("nan")
    kv, gate, cache = run(s)
    for ring, wanted in zip((kv, gate, cache), apart(s), strict=True):
        same(ring, wanted)
    assert (cache != 777.0).any() and cache.isfinite().all()


@drawn(4)
@drawn_from(st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_rows_anywhere(batch, count, seed):
    """Rows at whatever places, some from the end, some behind it; windows at whatever ends."""
    torch.manual_seed(seed)
    s = step(batch, count, (4, 4, 16))
    rows = s["kv"].shape[1]
    at = torch.stack([torch.randperm(rows)[:count] for _ in range(batch)]).to(DEVICE)
    kind = torch.randint(4, at.shape, device=DEVICE)
    s["at"] = torch.where(kind == 0, at - rows, torch.where(kind == 1, at + rows, at))
    s["ends"] = torch.randint(0, 40, at.shape, device=DEVICE)
    s["slot"] = torch.arange(count, device=DEVICE).expand(at.shape)
    s["place"] = torch.randint(-4, 4, at.shape, device=DEVICE)
    both_same(s)


def test_strides():
    """Rows that are parts of wider ones, indices that are expanded, a ring within a larger one."""
    s = step(3, 2, (4, 4, 48))
    for name in ("new_kv", "new_gate"):
        wide = rand(3, 4, 200, dtype=s[name].dtype)
        wide[:, ::2, 8 : 8 + s[name].shape[-1]] = s[name]
        s[name] = wide[:, ::2, 8 : 8 + s[name].shape[-1]]
    s["at"] = torch.tensor([3, 5], dtype=torch.int32, device=DEVICE).expand(3, 2)
    both_same(s)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(new_kv=lambda t: t.half()), "new_kv has another dtype"),
        (dict(new_gate=lambda t: t[..., :16]), r"new_gate must be \[B, S, 128\]"),
        (dict(gate=lambda t: t.bfloat16()), "a bias is added in fp32"),
        (dict(halves=lambda t: (64, 64)), "the halves are not all of the channels"),
        (dict(new_kv=lambda t: t.repeat(1, 2, 1)), "with an entry for each"),
    ],
)
def test_no_such_step(change, sentence):
    s = step(2, 1, (4, 4, 64))
    s |= {name: edit(s[name]) for name, edit in change.items()}
    with pytest.raises(ValueError, match=sentence):
        run(s)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes, count", [((4, 4, 512), 1), ((4, 4, 512), 4), ((128, 0, 512), 2)])
def test_many_requests(sizes, count):
    """Programs of all multiprocessors at once, again and again."""
    s = step(700, count, sizes)
    wanted = apart(s)
    for _ in range(20):
        for a, b in zip(run(s), wanted, strict=True):
            same(a, b)


def calls(small):
    """``length`` requests with a token each."""
    one = small.ids[:, None]
    kv, cache = small(small.length, 9, 128), small(small.length, 7, 128)
    new = small(small.length, 1, 128)
    table = (small.fp32(small.length, 1, 32) for _ in "ab")
    how = dict(pool_rounding="once", pool_dtype=torch.bfloat16, eps=1e-6, norm="once",
               rope_rounding="once", width=4, ring=8)  # fmt: skip
    given = (kv, kv.float(), small.w, *table, one + 3, cache, one % 8, one, new, new.float())
    return {"compress_kv_step": ((*given, one % 9), how)}
