"""The Hopper attention kernel: on a GPU as it is, elsewhere run as Python (``_gluon``)."""

from __future__ import annotations

import math

import pytest
import torch
from dsv4fuse.kernels import _attention as attention
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import _flash_hopper_op as op
from dsv4fuse.kernels import sink_attention as dense
from dsv4fuse.kernels import sparse_sink_attention as sparse
from torch import Tensor
from torch import _functorch as functorch
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from ._hopper import built, check_compiled_and_replayed, gpu_too, launched
from ._kernels import BF16, DEVICE, FP16, FP32, GPU, rand
from .test_kernel_sink_attention import KINDS, as_mask, exact, kind_of, logits, steps

INF, SCALE = math.inf, 512**-0.5
WHOLE = attention.SHAPES[-1][1]


SPLIT = pytest.mark.parametrize("hopper", [1, 3], indirect=True, ids="in {}".format)


@pytest.fixture
def hopper(monkeypatch, request):
    """Launches go to the kernel whatever their size, and at least one does; parameter: splits."""
    takes, splits = op.takes, getattr(request, "param", 1)
    monkeypatch.setattr(attention, "SHAPES", ((None, WHOLE),))
    monkeypatch.setattr(attention, "splits_for", lambda *_: splits)
    monkeypatch.setattr(op, "takes", lambda *a: takes(*a[:4], 1, 64))
    with launched(monkeypatch, op, processors=2):
        yield


# batch, tokens, heads, keys; each query's own keys. Heads that fill no 64 rows, in part or twice.
CELLS = [(1, 3, 64, 129, False), (2, 5, 16, 65, False), (1, 2, 96, 1, False),
         (1, 2, 33, 70, True), (1, 2, 16, 70, True)] + (
    [(1, n, 64, t, False) for n, t in ((1, 3), (3, 127), (127, 129), (129, 1000), (1000, 1003))]
    + [(2, 77, 128, 900, False), (3, 129, 16, 1500, False), (1, 300, 8, 64, False)] if GPU else []
)  # fmt: skip


@KINDS
@pytest.mark.parametrize("cell", CELLS, ids=str)
@SPLIT
@gpu_too
def test_as_near_to_exact_as_eager(cell, kind):
    b, s, h, t, own = cell
    q, kv, sinks = rand(b, s, h, 512), rand(b, s if own else 1, t, 512), rand(h, dtype=FP32)
    bias = torch.where(rand(b, s, t) > 0, 0.0, -INF)
    bias[:, -1] = -INF
    call = dict(scale=SCALE, mask_kind=kind_of(kind))
    mask = as_mask(bias, kind)
    found = torch.ops.dsv4fuse.sink_attention(q, kv, mask, sinks, **call)
    true = exact(q, kv, None if kind == "none" else bias, sinks, SCALE)
    eager = dense.reference(q, kv, mask, sinks, **call)
    assert steps(found, true) <= steps(eager, true) + 1
    if kind != "none":
        assert (found[:, -1] == 0).all()


@gpu_too
def test_no_keys():
    q, kv, sinks = rand(2, 3, 64, 512), rand(2, 1, 0, 512), rand(64, dtype=FP32)
    assert (torch.ops.dsv4fuse.sink_attention(q, kv, None, sinks, scale=SCALE) == 0).all()


@pytest.mark.parametrize("near", [0, 70])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("kind", ["none", "allowed", "add"])
@gpu_too
def test_chosen_keys(near, paged, wrap, kind):
    """Indices out of range are no keys; pages; near keys in front; a mask over both."""
    h = 16 if paged else 64
    b, s, n, k = (2, 130, 900, 200) if GPU else (2, 3, 40, 70)
    q, far, sinks = rand(b, s, h, 512), rand(4 if paged else b, n, 512), rand(h, dtype=FP32)
    beside = rand(b, near, 512) if near else None
    index = torch.randint(-3, n + 2, (b, s, k), device=DEVICE)
    index[:, 0] = n
    index = index.int() if paged else index
    page = torch.randint(-1, 4, (b, s), device=DEVICE) if paged else None
    mask = as_mask(torch.where(rand(b, s, near + k) > 0, 0.0, -INF), kind)
    call = dict(scale=SCALE, mask_kind=kind_of(kind), wrap=wrap)
    arguments = (q, beside, far, index, page, mask, sinks)
    found = torch.ops.dsv4fuse.sparse_sink_attention(*arguments, **call)
    true = sparse.reference(*(_double(t) for t in arguments), **call)
    assert steps(found, true) <= 2
    if not near:
        assert (found[:, 0] == 0).all()


@pytest.mark.parametrize("hopper", [2, 7], indirect=True)
@pytest.mark.parametrize("near", [0, 70])
@gpu_too
def test_chosen_keys_in_splits(near):
    """Also more splits than there are tiles."""
    test_chosen_keys(near, paged=True, wrap=True, kind="allowed")


def _double(t: Tensor | None) -> Tensor | None:
    return t.double() if t is not None and t.is_floating_point() else t


@SPLIT
@gpu_too
def test_huge_logits_and_rising_maxima():
    """Whether maxima are passed by a little or by much, at each tile."""
    q, kv, sinks = rand(1, 4, 64, 512), rand(1, 1, 400, 512), rand(64, dtype=FP32, scale=30.0)
    kv *= torch.linspace(0.01, 6.0, 400, device=DEVICE).to(BF16)[:, None]
    for scale in (0.001, 0.05, 2.0):
        found = torch.ops.dsv4fuse.sink_attention(q, kv, None, sinks, scale=scale)
        eager = dense.reference(q, kv, None, sinks, scale=scale)
        true = exact(q, kv, None, sinks, scale)
        assert steps(found, true) <= steps(eager, true) + 1


@SPLIT
@gpu_too
def test_empty_rows_and_sinks_of_any_size():
    """Nothing seen and a sink: 0. No sink either, or nan_empty: NaN. A huge sink: nearly 0."""
    q, kv = rand(1, 3, 64, 512), rand(1, 1, 70, 512)
    sinks = torch.tensor([0.0, -INF, 200.0, -200.0], device=DEVICE).repeat(16)
    mask = torch.zeros(1, 3, 70, device=DEVICE)
    mask[:, 0] = -INF
    mask[:, 1] = torch.finfo(BF16).min
    call = lambda **kw: torch.ops.dsv4fuse.sink_attention(  # noqa: E731
        q, kv, mask, sinks, scale=SCALE, **kw
    )
    found, true = call(), exact(q, kv, mask, sinks, SCALE)
    assert torch.equal(found.isnan(), true.isnan()) and true.isnan()[0, 0, 1].all()
    assert steps(found, true) <= 2 and (found[0, 0, [0, 2, 3]] == 0).all()
    assert call(nan_empty=True)[:, 0].isnan().all() and not call(nan_empty=True)[:, 2].isnan().any()


@pytest.mark.parametrize("rounded", ["", "p", "ps", "psm"])
@gpu_too
def test_scores_are_rounded_where_the_module_rounds(rounded):
    """With one key and a sink of 0 the weight is a function of the one logit."""
    q, kv, sinks = rand(1, 8, 64, 512, scale=0.3), rand(1, 1, 1, 512), torch.zeros(64).to(DEVICE)
    mask = rand(1, 8, 1)
    s = (q.double() @ kv[0, 0, 0].double()).float()
    z = logits(s, 0.3, mask, rounded)
    found = torch.ops.dsv4fuse.sink_attention(
        q, kv, mask, sinks, scale=0.3, rounded=rounded, wide=True, out_dtype=FP32
    )
    true = z.double().sigmoid().unsqueeze(-1) * kv.double()[:, 0]
    # A sum in another order may round a score to the other side; most it does not.
    off = (found.double() - true).abs().amax(-1) / true.abs().amax(-1)
    assert (off < 3e-5).double().mean() > (0.9 if rounded else 0.999)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("heads_first", [False, True])
@gpu_too
def test_layouts_and_dtypes(dtype, heads_first):
    """Strided q and keys, rows at odd places, a broadcast mask, strided sinks."""
    q = rand(2, 64, 5, 513, dtype=dtype).transpose(1, 2)[..., 1:]
    kv = rand(1, 70, 2, 512, dtype=dtype)[:, :, 1].unsqueeze(1).expand(2, -1, -1, -1)
    q = torch.empty(2, 64, 5, 512, dtype=dtype, device=DEVICE).transpose(1, 2).copy_(q)
    mask = torch.where(rand(1, 1, 70) > 0, 0.0, -INF)
    sinks = rand(128, dtype=FP32)[::2]
    found = torch.ops.dsv4fuse.sink_attention(
        q, kv, mask, sinks, scale=SCALE, heads_first=heads_first
    )
    assert found.dtype == dtype and found.transpose(1, 2).is_contiguous() == heads_first
    assert steps(found, exact(q, kv, mask, sinks, SCALE), dtype) <= 2


def test_rows_at_odd_places_are_copied():
    even, odd = torch.zeros(3, 512), torch.zeros(3, 520)[:, :512]
    assert op.hopper.aligned(even) is even and op.hopper.aligned(odd).stride() == (512, 1)
    assert op.hopper.aligned(torch.zeros(1, 520)[:, :512]).stride() == (520, 1)
    assert op.hopper.aligned(torch.zeros(1028)[4:].view(2, 512)).storage_offset() == 0


@pytest.mark.parametrize("kind", ["add", "allowed"])
@SPLIT
@gpu_too
def test_tiles_that_nobody_sees_are_not_read(kind, monkeypatch):
    """A NaN there would show."""
    monkeypatch.setattr(attention, "LISTED", (1, 2))
    q, kv, sinks = rand(1, 6, 64, 512), rand(1, 1, 330, 512), rand(64, dtype=FP32)
    place = torch.arange(6, device=DEVICE)[:, None] * 30 - torch.arange(330, device=DEVICE)
    seen = ((place >= 0) & (place < 40)).unsqueeze(0)
    seen[:, 3] = False
    kv[:, :, 192:] = float("nan")
    bias = torch.where(seen, 0.0, -INF)
    found = torch.ops.dsv4fuse.sink_attention(
        q, kv, bias if kind == "add" else seen, sinks, scale=SCALE, mask_kind=kind
    )
    assert steps(found, exact(q, kv.nan_to_num(), bias, sinks, SCALE)) <= 2
    assert not found.isnan().any() and (found[:, 3] == 0).all()


@pytest.mark.parametrize("splits", [1, 3])
@gpu_too
def test_opcheck(splits):
    q, kv, out, sinks = rand(1, 2, 64, 512), rand(1, 1, 70, 512), rand(1, 2, 64, 512), rand(64)
    parts = (rand(128 * splits, 512, dtype=FP32), rand(128 * splits, 2, dtype=FP32))
    how = dict(scale=SCALE, rounded="", wide=False, nan_empty=False, tokens=1, width=64,
               splits=splits)  # fmt: skip
    op.launch(q, attention.Keys(kv), None, sinks, None, out, None if splits == 1 else parts, **how)
    written = (out, None, None) if splits == 1 else (None, *parts)
    arguments = (q, kv, None, None, None, None, sinks, None, None, *written)
    how |= dict(wrap=False, mask_kind="add", fill=None)
    torch.library.opcheck(torch.ops.dsv4fuse.attention_hopper.default, arguments, how)


@pytest.mark.skipif(GPU, reason="on a GPU graphs are run: test_compiled_and_replayed")
@pytest.mark.usefixtures("hopper")
def test_in_a_graph_for_any_token_count(monkeypatch):
    """Traced once, as one op that writes its output in place."""
    monkeypatch.setattr(common, "use_reference", lambda q: False)
    graphs = []

    def fn(q, kv, mask, sinks):
        out = torch.ops.dsv4fuse.sink_attention(
            q, kv, mask, sinks, scale=SCALE, mask_kind="hidden", fill=-1e4, heads_first=True
        )
        return out * 2

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for s in (3, 5, 6):
        given = rand(2, s, 64, 512), rand(2, 1, 70, 512), rand(2, s, 70) > 0, rand(64, dtype=FP32)
        for t in (given[0], given[2]):
            torch._dynamo.mark_dynamic(t, 1)
        found, wanted = compiled(*given), fn(*given)
        assert torch.equal(found, wanted) and found.stride() == wanted.stride()
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@SPLIT
def test_compiled_and_replayed():
    """Through Inductor, for any token count, and from a CUDA graph: the bits of eager."""
    def fn(q, kv, index, sinks):
        out = torch.ops.dsv4fuse.sparse_sink_attention(q, None, kv, index, None, None, sinks,
                                                       scale=SCALE)  # fmt: skip
        return out * 2

    def given(s):
        index = torch.randint(-1, 500, (1, s, 128), device="cuda")
        return rand(1, s, 64, 512), rand(1, 500, 512), index, rand(64, dtype=FP32)

    check_compiled_and_replayed(fn, given, by_tokens=(0, 2))


def test_rows_of_a_fake_tensor():
    """It has no address: its first row is taken for one at a good place."""
    refused = functorch.config.patch(fake_tensor_allow_unsafe_data_ptr_access=False)
    with refused, FakeTensorMode():
        even, odd = torch.zeros(3, 512), torch.zeros(3, 520)[:, :512]
        assert op.hopper.aligned(even) is even and op.hopper.aligned(odd).stride() == (512, 1)


def test_what_it_takes(monkeypatch):
    q, kv = torch.zeros(1, 3, 64, 512, dtype=BF16), torch.zeros(1, 1, 70, 512, dtype=BF16)
    keys = attention.Keys(kv)
    assert "capability 9" in op.refusal(q, keys, 64, 64, 1, 64)
    monkeypatch.setattr(op.hopper, "is_hopper", lambda device: True)
    assert op.refusal(q, keys, 64, 64, 1, 64) is None and op.takes(q, keys, 64, 64, 3, 64)
    assert "512 lanes" in op.refusal(q[..., :256], keys, 64, 64, 1, 64)
    assert "64 rows" in op.refusal(q, keys, 32, 64, 1, 32) and not op.takes(q, keys, 64, 32, 1, 64)
    assert "empty" in op.refusal(q, keys, 64, 64, 3, 16) and op.takes(q, keys, 64, 64, 2, 16)
    odd = torch.zeros(1, 70, 520)[..., :512]
    assert "32 bytes" in op.refusal(q, attention.Keys(None, odd), 64, 64, 1, 64)
    with V.set_aot_compilation(True):
        assert "package" in op.refusal(q, keys, 64, 64, 1, 64)
    monkeypatch.setattr(op, "kernel", lambda: None)
    assert "Gluon" in op.refusal(q, keys, 64, 64, 1, 64)


def test_compiles_for_an_h200():
    """Two warpgroups' products and 16-byte copies; what does not fit registers is a few bytes."""
    found = built("attention")
    assert len(found) == 5
    for made in found:
        assert made["STACK"] <= 128 and made["shared"] <= 227 << 10
        assert made["products"] in (36, 40) and made["copies"] == 64
