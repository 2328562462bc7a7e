"""sink_attention and sparse_sink_attention against fp64, on masks of every kind."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from dsv4fuse.kernels import _attention as attention
from dsv4fuse.kernels import sink_attention as dense
from dsv4fuse.kernels import sparse_sink_attention as sparse
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ._kernels import BF16, DEVICE, FP16, FP32, GPU, MARKS, rand

pytestmark = MARKS
INF = math.inf


LAUNCHED = [shape for _, shape in attention.SHAPES]
# Interpreted, a tile of 64 rows and keys takes seconds: of few, several tiles.
SMALL = [dataclasses.replace(LAUNCHED[0], block=16)]


@pytest.fixture(autouse=True, params=LAUNCHED if GPU else SMALL, ids=lambda s: f"{s.rows} rows")
def _one_shape(request, monkeypatch):
    """Each launch shape, whatever the sizes."""
    monkeypatch.setattr(attention, "SHAPES", ((None, request.param),))


def exact(q: Tensor, keys: Tensor, bias: Tensor | None, sinks: Tensor, scale: float) -> Tensor:
    """In fp64; keys ``[B,G,T,D]``, bias ``[B,S,T]``: -inf hides."""
    (b, s, h, d), groups = q.shape, keys.shape[1]
    keys = keys.double()
    z = (q.double().reshape(b, groups, -1, d) @ keys.mT).view(b, s, h, -1) * scale
    z = z if bias is None else z + bias.double().unsqueeze(2)
    sink = sinks.double().view(1, 1, -1, 1).expand(b, s, h, 1)
    w = torch.cat((z, sink), -1).softmax(-1)[..., :-1]
    return (w.reshape(b, groups, -1, w.shape[-1]) @ keys).view(b, s, h, d)


def steps(found: Tensor, true: Tensor, dtype: torch.dtype = BF16) -> float:
    """The error in rounding steps of a dtype at the largest value of a row."""
    scale = true.abs().amax(-1, keepdim=True) * torch.finfo(dtype).eps + 1e-30
    return ((found.double() - true).abs() / scale).nan_to_num().max().item()


def as_mask(bias: Tensor, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    return bias.to(BF16) if kind == "add" else bias == 0 if kind == "allowed" else bias != 0


def kind_of(kind: str) -> str:
    return "add" if kind == "none" else kind


KINDS = pytest.mark.parametrize("kind", ["add", "allowed", "hidden", "none"])
CELLS = [(2, 5, 4, 33, 32, False), (1, 3, 20, 17, 48, False), (2, 3, 4, 21, 32, True)] + (
    [(1, 129, 64, 1500, 512, False), (4, 1, 64, 640, 512, False), (2, 3, 64, 640, 512, True),
     (2, 77, 128, 1003, 512, False), (1, 1000, 16, 900, 512, False)] if GPU else []
)  # fmt: skip


@KINDS
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_as_near_to_exact_as_eager(cell, kind):
    """Rounded weights and all; a query that sees nothing gives 0."""
    b, s, h, t, d, own = cell
    q, kv, sinks = rand(b, s, h, d), rand(b, s if own else 1, t, d), rand(h, dtype=FP32)
    bias = torch.where(rand(b, s, t) > 0, 0.0, -INF)
    bias[:, -1] = -INF
    call = dict(scale=d**-0.5, mask_kind=kind_of(kind))
    mask = as_mask(bias, kind)
    found = torch.ops.dsv4fuse.sink_attention(q, kv, mask, sinks, **call)
    true = exact(q, kv, None if kind == "none" else bias, sinks, d**-0.5)
    eager = dense.reference(q, kv, mask, sinks, **call)
    assert steps(found, true) <= steps(eager, true) + 1
    if kind != "none":
        assert (found[:, -1] == 0).all()


def test_empty_rows_and_sinks_of_any_size():
    """Nothing seen and a sink: 0. No sink either, or nan_empty: NaN. A huge sink: nearly 0."""
    q, kv = rand(1, 3, 4, 32), rand(1, 1, 40, 32)
    sinks = torch.tensor([0.0, -INF, 200.0, -200.0], device=DEVICE)
    mask = torch.zeros(1, 3, 40, device=DEVICE)
    mask[:, 0] = -INF
    mask[:, 1] = torch.finfo(BF16).min
    call = lambda **kw: torch.ops.dsv4fuse.sink_attention(  # noqa: E731
        q, kv, mask, sinks, scale=0.2, **kw
    )
    found, true = call(), exact(q, kv, mask, sinks, 0.2)
    assert torch.equal(found.isnan(), true.isnan()) and true.isnan()[0, 0, 1].all()
    assert steps(found, true) <= 2 and (found[0, 0, [0, 2, 3]] == 0).all()
    assert call(nan_empty=True)[:, 0].isnan().all() and not call(nan_empty=True)[:, 2].isnan().any()


def logits(s: Tensor, scale: float, mask: Tensor, rounded: str) -> Tensor:
    """fp32 scores times the scale and behind the mask, rounded to bf16 after those steps (p, s, m)
    that ``rounded`` names."""

    def step(z: Tensor, name: str) -> Tensor:
        return z.to(BF16).float() if name in rounded else z

    return step(step(step(s, "p") * scale, "s") + mask.float(), "m")


def test_scores_are_rounded_where_the_module_rounds():
    """With one key and a sink of 0 the weight is a function of the one logit."""
    q, kv, sinks = rand(1, 64, 4, 32, scale=3.0), rand(1, 1, 1, 32), torch.zeros(4, device=DEVICE)
    mask = rand(1, 64, 1)
    s = (q.double() @ kv[0, 0, 0].double()).float()
    for rounded in ("", "p", "ps", "psm"):
        z = logits(s, 0.3, mask, rounded)
        found = torch.ops.dsv4fuse.sink_attention(
            q, kv, mask, sinks, scale=0.3, rounded=rounded, wide=True, out_dtype=FP32
        )
        true = z.double().sigmoid().unsqueeze(-1) * kv.double()[:, 0]
        assert steps(found, true, FP32) < 400  # 3e-5; a rounding to bf16 is a thousand times that


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("heads_first", [False, True])
def test_layouts_and_dtypes(dtype, heads_first):
    """Strided q and keys, a broadcast mask; out as asked for."""
    q = rand(2, 4, 6, 32, dtype=dtype).transpose(1, 2)
    kv = rand(1, 50, 2, 32, dtype=dtype)[:, :, 1].unsqueeze(1).expand(2, -1, -1, -1)
    mask = torch.where(rand(1, 1, 50) > 0, 0.0, -INF)
    sinks = rand(8, dtype=FP32)[::2]
    found = torch.ops.dsv4fuse.sink_attention(
        q, kv, mask, sinks, scale=0.2, heads_first=heads_first
    )
    assert found.dtype == dtype and found.transpose(1, 2).is_contiguous() == heads_first
    assert steps(found, exact(q, kv, mask, sinks, 0.2), dtype) <= 2


def test_empty_batch_and_no_keys():
    sinks = rand(4, dtype=FP32)
    q, kv = rand(0, 3, 4, 32), rand(0, 1, 8, 32)
    assert torch.ops.dsv4fuse.sink_attention(q, kv, None, sinks, scale=1.0).shape == q.shape
    q, kv = rand(2, 3, 4, 32), rand(2, 1, 0, 32)
    assert (torch.ops.dsv4fuse.sink_attention(q, kv, None, sinks, scale=1.0) == 0).all()


@pytest.mark.parametrize("kind", ["add", "allowed"])
@pytest.mark.parametrize("value", [-INF, torch.finfo(BF16).min, -1e4])
def test_tiles_that_nobody_sees_are_not_read(kind, value, monkeypatch):
    """A NaN there would show. -1e4 hides nothing for certain, so all tiles count."""
    monkeypatch.setattr(attention, "LISTED", (1, 2))
    q, kv, sinks = rand(1, 40, 4, 32), rand(1, 1, 150, 32), rand(4, dtype=FP32)
    place = torch.arange(40, device=DEVICE)[:, None] * 3 - torch.arange(150, device=DEVICE)
    seen = ((place >= 0) & (place < 20)).unsqueeze(0)
    bias = torch.where(seen, 0.0, value)
    skipped = value < -1e30
    if skipped:
        kv[:, :, 140:] = float("nan")
    mask = bias if kind == "add" else seen
    found = torch.ops.dsv4fuse.sink_attention(
        q, kv, mask, sinks, scale=0.2, mask_kind=kind, fill=None if value == -INF else value
    )
    # The last live tile of 16 (or 64) keys ends with keys that exist: look only at whole ones.
    rows = slice(0, 40) if not skipped else slice(0, 20)
    true = exact(q[:, rows], kv.nan_to_num(), bias[:, rows], sinks, 0.2)
    assert steps(found[:, rows], true) <= 2 and not found[:, rows].isnan().any()


@pytest.mark.parametrize("tiles", [0, 1, 2, 9, 10, 20, 64, 200])
@pytest.mark.parametrize("programs", [1, 4, 16, 40, 64, 132, 500])
def test_no_split_is_without_keys(programs, tiles):
    """As many as the GPU has room for and joining is worth; one fewer makes the longest longer."""
    splits = attention.splits_for(programs, tiles)
    room = max(1, min(attention.PROGRAMS // programs, tiles, 64))
    longest = -(-tiles // splits)
    assert 1 <= splits <= room
    assert tiles == 0 or (splits - 1) * longest < tiles
    assert splits == 1 or -(-tiles // (splits - 1)) > longest


def test_joining_costs_more_where_there_are_more_sums():
    """An H200's: 10 tiles of few queries are split as far as they go, those of 64 not at all."""
    assert [attention.splits_for(n, 10) for n in (1, 4, 8, 64, 128)] == [10, 10, 5, 1, 1]
    assert attention.splits_for(16, 10) in (4, 5) and attention.splits_for(64, 2) == 1
    assert attention.splits_for(64, 10, rows=16) == 2


@pytest.mark.parametrize("splits", [1, 3, 4])
def test_split_keys_are_merged(splits, monkeypatch):
    monkeypatch.setattr(attention, "splits_for", lambda *_: splits)
    q, kv, sinks = rand(2, 1, 4, 32), rand(2, 1, 100, 32), rand(4, dtype=FP32)
    bias = torch.where(rand(2, 1, 100) > 0, 0.0, -INF)
    bias[1] = -INF
    found = torch.ops.dsv4fuse.sink_attention(q, kv, bias, sinks, scale=0.2)
    assert steps(found, exact(q, kv, bias, sinks, 0.2)) <= 2 and (found[1] == 0).all()


JOINED = """
import tempfile
import torch
from dsv4fuse import ops
from dsv4fuse.bench.kernels import describing

q, kv = (torch.zeros(4, 1, n, 512, dtype=torch.bfloat16) for n in (64, 640))
with describing() as found:
    torch.ops.dsv4fuse.sink_attention(q, kv, None, torch.zeros(64), scale=1.0)
(joining,) = (kernel for kernel in found if kernel.name == "merge_kernel")
with tempfile.TemporaryDirectory() as folder:
    ptx = joining.compiled(folder).asm["ptx"]
print(ptx.count("ld.global"), ptx.count("shfl"), ptx.count("bar.sync"))
"""


def test_splits_are_joined_in_their_order():
    """No sum crosses threads, in an order that would hang on what is known of the strides."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", JOINED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loads, *crossing = map(int, done.stdout.split())
    assert loads > 0 and crossing == [0, 0]


@pytest.mark.parametrize("near", [0, 10])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("wrap", [False, True])
def test_chosen_keys(near, paged, wrap):
    """Indices out of range are no keys; pages; near keys in front; a mask over both."""
    b, s, h, n, k, d = 2, 3, 4, 40, 21, 32
    q, far, sinks = rand(b, s, h, d), rand(4 if paged else b, n, d), rand(h, dtype=FP32)
    beside = rand(b, near, d) if near else None
    index = torch.randint(-3, n + 2, (b, s, k), device=DEVICE)
    index[:, 0] = n
    page = torch.randint(-1, 4, (b, 1), device=DEVICE) if paged else None
    mask = rand(b, s, near + k) > 0
    found = sparse.sparse_sink_attention(
        q, beside, far, index, page, mask, sinks, scale=0.2, mask_kind="allowed", wrap=wrap
    )
    at = torch.where(index < 0, index + n, index) if wrap else index
    valid = (at >= 0) & (at < n)
    pages = page if paged else torch.arange(b, device=DEVICE)[:, None]
    keys = far[pages[:, :, None], torch.where(valid, at, 0)]
    valid = torch.cat((torch.ones(b, s, near, dtype=torch.bool, device=DEVICE), valid), -1)
    if near:
        keys = torch.cat((beside[:, None].expand(-1, s, -1, -1), keys), 2)
    true = exact(q, keys, torch.where(mask & valid, 0.0, -INF), sinks, 0.2)
    assert steps(found, true) <= 2
    if not near:
        assert (found[:, 0] == 0).all()


@given(data=st.data())
def test_any_sizes_and_masks(data):
    """Sizes that no tile divides; logits and sinks of any size; every share of hidden keys."""
    b, s, h, t = (data.draw(st.integers(1, m)) for m in (2, 6, 9, 40))
    d = data.draw(st.sampled_from([16, 24, 32]))
    scale = data.draw(st.sampled_from([0.01, 0.3, 5.0]))
    share = data.draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    q, kv, sinks = rand(b, s, h, d), rand(b, 1, t, d), rand(h, dtype=FP32, scale=30.0)
    hidden = torch.rand(b, s, t, device=DEVICE) < share
    bias = torch.where(hidden, -INF, 0.0)
    found = torch.ops.dsv4fuse.sink_attention(q, kv, hidden, sinks, scale=scale, mask_kind="hidden")
    true = exact(q, kv, bias, sinks, scale)
    eager = dense.reference(q, kv, hidden, sinks, scale=scale, mask_kind="hidden")
    assert steps(found, true) <= steps(eager, true) + 1


@pytest.mark.parametrize(
    "change, sentence",
    [({"mask_kind": "seen"}, "mask_kind must be"), ({"mask_kind": "hidden"}, "dtype and kind"),
     ({"q": FP32}, "16"), ({"d": 520}, "head_dim must be")],
)  # fmt: skip
def test_messages(change, sentence):
    change = dict(change)
    d = change.pop("d", 32)
    q, kv = rand(1, 2, 4, d, dtype=change.pop("q", BF16)), rand(1, 1, 8, d)
    with pytest.raises(ValueError, match=sentence):
        torch.ops.dsv4fuse.sink_attention(
            q, kv, torch.zeros(1, 1, 8, device=DEVICE), rand(4), scale=1.0, **change
        )


def calls(small):
    q, kv, n, even = small.q, small.kv, small.length, small.even
    index = torch.arange(8, device=small.device).view(2, 1, 4)
    return {
        "sink_attention": (
            (q, kv.unsqueeze(1), small(2, n, n) * even, small(2) * even),
            dict(scale=0.1 * even, rounded="psm", heads_first=True),
        ),
        "sparse_sink_attention": (
            (q, kv, small(2, 9, 128), index, None, small(2, 1, n + 4) * even, small(2) * even),
            dict(scale=0.1 * even, wide=False),
        ),
    }
