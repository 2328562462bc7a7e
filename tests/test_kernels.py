"""The kernels as registered operators: opcheck, fakes, launch choice, messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import clamp_swiglu_quant as swiglu
from dsv4fuse.kernels import compress_kv as compress
from dsv4fuse.kernels import indexer_logits as indexer
from dsv4fuse.kernels import indexer_q, norm_quant
from dsv4fuse.kernels import inv_rope_grouped_bmm as grouped
from dsv4fuse.kernels import inv_rope_quant as inv
from dsv4fuse.kernels import moe_router as router
from dsv4fuse.kernels import norm_rope_cache as rows
from dsv4fuse.kernels._launch import instead_of_launches

from dsv4fuse import ops
from dsv4fuse.fusion import register_ops

from ._calls import calls
from ._kernels import all_equal, all_near

OPS = list(calls("cpu"))
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
])]  # fmt: skip


def test_every_op_is_sampled():
    """An op without a call in its kernel's test would miss opcheck, its fake, the sanitizer."""
    register_ops()
    names = (n for n in torch._C._dispatch_get_all_op_names() if n.startswith("dsv4fuse::"))
    found = {n.partition("::")[2].partition(".")[0] for n in names}
    # For a GPU only: torch's own product (test_kernel_properties), Gluon (test_*_hopper).
    assert found == {*OPS, "grouped_scaled_mm", "attention_hopper", "indexer_hopper"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, device):
    torch.manual_seed(0)
    args, kwargs = calls(device)[name]
    tests = ["test_autograd_registration", "test_faketensor"]
    if all(t.dtype.itemsize > 1 for t in _tensors(args)):
        tests.append("test_schema")  # compares inputs by a product, which fp8 lacks
    if device == "cpu":
        # Makes every size symbolic; on a GPU head counts and widths are compiled into a kernel.
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.dsv4fuse, name).default, args, kwargs, test_utils=tests)


# Ops whose launch, chosen by the token count, decides the order of a sum; by how much of a row's
# largest value two launches may differ beside rounding steps: sums in fp32, or a code of e4m3.
BY_LAUNCH = {
    "hyper_connection_pre": 3e-5, "hyper_connection_pre_norm": 3e-5, "hyper_head": 3e-5,
    "hyper_connection_post_pre_norm": 3e-5, "inv_rope_grouped_bmm": 1e-5,
    "inv_rope_grouped_bmm_": 1e-5, "inv_rope_grouped_fp8": 1e-5, "grouped_bmm": 1e-5,
    "indexer_logits": 1e-5, "indexer_q": 1 / 8, "moe_router_hash": 1e-6,
    "sink_attention": 1e-5, "sparse_sink_attention": 1e-5,
}  # fmt: skip
LENGTHS = (3, 129, 1500)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_compiled_once_for_any_token_count(name, monkeypatch):
    """Through Inductor with symbolic tokens: one compilation, whose launch is that of its first
    token count. The bits of eager with the same launch; of eager's own, where bits are promised.
    """
    op, kwargs = getattr(torch.ops.dsv4fuse, name), calls("cuda")[name][1]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs)

    compiled = torch.compile(lambda *args: op(*args, **kwargs), backend=backend, fullgraph=True)
    # The key of torch's cache has no launch: what an earlier run left there may have another.
    fresh = torch._functorch.config.patch(enable_autograd_cache=False)
    for length in LENGTHS:
        with fresh, monkeypatch.context() as pinned:
            pinned.setattr(common, "size_hint", lambda *_: LENGTHS[0])
            got = _called(compiled, _marked(name, length))
            want = _called(lambda *args: op(*args, **kwargs), _drawn(name, length))
        for g, w in zip(got, want, strict=True):
            assert (g.dtype, g.shape, g.stride()) == (w.dtype, w.shape, w.stride())
        all_equal(got, want)
        own = _called(lambda *args: op(*args, **kwargs), _drawn(name, length))
        if name in BY_LAUNCH:
            all_near(got, own, BY_LAUNCH[name])
        else:
            all_equal(got, own)
    # torch 2.11 guards on "tokens are a multiple of 4 or not" where scale rows are padded to 4.
    assert len(graphs) <= (2 if kwargs.get("col_major") else 1)


def _drawn(name: str, length: int) -> tuple:
    """The op's arguments, the same in each call, and their memory shared in the same way."""
    torch.manual_seed(length)
    return calls("cuda", length)[name][0]


def _marked(name: str, length: int) -> tuple:
    """The same, every axis dynamic that is longer for more tokens."""
    args = _drawn(name, length)
    for t, more in zip(_tensors(args), _tensors(_drawn(name, length + 1)), strict=True):
        for axis, (size, longer) in enumerate(zip(t.shape, more.shape, strict=True)):
            if size != longer:
                torch._dynamo.mark_dynamic(t, axis)
    return args


def _called(fn: Callable, args: tuple) -> list[torch.Tensor]:
    """The results, and then the arguments, which may have been written."""
    found = fn(*args)
    return [*(found if isinstance(found, tuple) else (found,)), *_tensors(args)]


def _tensors(args: tuple) -> list[torch.Tensor]:
    return [a for a in args if isinstance(a, torch.Tensor)]


@pytest.mark.parametrize("name", OPS)
def test_fake_gives_dtype_shape_and_stride(name):
    """Real and fake agree exactly, for absent inputs and both memory orders as well."""
    op = getattr(torch.ops.dsv4fuse, name)
    args, kwargs = calls("cpu")[name]
    real = op(*args, **kwargs)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = op(*fakes, **kwargs)
    pair = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for r, f in pair:
        assert (r.dtype, r.shape, r.stride()) == (f.dtype, f.shape, f.stride())


@pytest.mark.skipif(not common.INTERPRETED, reason="launches nothing")
@pytest.mark.parametrize("name", OPS)
def test_no_launch_takes_the_stride_of_an_axis_of_one(name):
    """Of one long sequence it may pass 2^31, which torch 2.11 cannot compile."""

    def far(t: object) -> object:
        if not isinstance(t, torch.Tensor) or t.dim() < 2:
            return t
        ones = [n == 1 and axis < t.dim() - 1 for axis, n in enumerate(t.shape)]
        steps = [1 << 31 if one else s for one, s in zip(ones, t.stride(), strict=True)]
        return t.as_strided(t.shape, steps)

    taken: list[int] = []

    def launch(kernel, grid, args, kwargs):
        taken.extend(v for v in (*args, *kwargs.values()) if isinstance(v, int))

    args, kwargs = calls("cpu", 1)[name]
    with instead_of_launches(launch):
        getattr(ops, name)(*map(far, args), **{k: far(v) for k, v in kwargs.items()})
    assert max(taken, default=0) < 1 << 31
    assert taken or name == "grouped_bmm"  # torch's own product


def test_a_launch_is_chosen_without_a_guard():
    """Symbolic token counts choose by their hint; no guard, and any count stays correct."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    with torch._subclasses.FakeTensorMode(shape_env=env) as mode:
        x = mode.from_tensor(torch.empty(300, 8), static_shapes=False)
        guards = len(env.guards)
        small, large = common.Config(1, 1), common.Config(2, 1)
        table = ((64, small), (None, large))
        assert common.launch_config(table, x.shape[0]) is large
        assert common.launch_config(table, x.shape[0] * 3 // 50) is small
        assert common.align4(x.shape[0] + 1) == 304
        assert common.flat_mode(1, x.shape[0]) == 1 and common.flat_mode(2, x.shape[0]) == 0
        assert len(env.guards) <= guards + 1  # align4(...) == 304 above is ours


@pytest.mark.parametrize(
    "columns, wanted, group, block",
    [(2048, 1024, 128, 1024), (3072, 1024, 128, 1024), (1536, 1024, 128, 512), (96, 1024, 32, 32),
     (2048, 64, 128, 128), (100, 256, 0, 128), (33, 1024, 0, 64), (4096, 256, 64, 256)],
)  # fmt: skip
def test_column_blocks_waste_no_lanes(columns, wanted, group, block):
    assert swiglu.column_block(columns, wanted, group) == block


def test_traffic_counts_every_byte_once():
    q, kv = torch.empty(1, 4, 64, 512, dtype=torch.bfloat16), torch.empty(1, 4, 512).bfloat16()
    cos = torch.empty(1, 1, 32).expand(1, 4, 32)
    cache = torch.empty(8, 512).bfloat16()
    q_bytes, kv_bytes, table = 4 * 64 * 1024, 4 * 1024, 32 * 4
    assert rows.traffic(q, kv, cos, cos, cache=cache) == 2 * q_bytes + 3 * kv_bytes + 2 * table
    assert inv.traffic(q, cos, cos, q.to(torch.float8_e4m3fn)) == q_bytes * 3 // 2 + 2 * table
    assert norm_quant.traffic(q, kv, q.to(torch.float8_e4m3fn)) == q_bytes * 3 // 2 + kv_bytes
    assert indexer_q.traffic(q, cos, cos, q.to(torch.float8_e4m3fn)) == q_bytes * 3 // 2 + 2 * table
    scores = torch.empty(1, 4, 100)
    keys, weights = torch.empty(1, 100, 512).bfloat16(), torch.empty(1, 4, 64)
    moved = q_bytes + 100 * 1024 + 4 * 256 + 4 * 400
    assert indexer.traffic(q, keys, weights, scores) == moved
    w, out = torch.empty(8, 1024, 4096).to(torch.float8_e4m3fn), torch.empty(4, 8, 1024).bfloat16()
    moved = q_bytes + 2 * table + 8 * 1024 * 4096 + 4 * 8 * 1024 * 2
    assert grouped.traffic(q, cos, cos, w, None, out) == moved
    gate = torch.empty(4, 256).bfloat16()
    assert swiglu.traffic(gate, gate, None, gate) == 3 * 4 * 512
    chosen = torch.empty(4, 6, dtype=torch.int64)
    assert router.traffic(gate, gate[0].float(), chosen) == 4 * 512 + 1024 + 4 * 6 * 8
    out = torch.empty(1, 4, 512).bfloat16()
    moved = compress.traffic(out, out.float(), cos, entries=4, rows=8, out=out)
    assert moved == 4 * (8 * 512 * 6 + 1024) + 2 * table


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda a: inv.inv_rope_quant(*a["inv_rope"][0], groups=2, group=96, rope_rounding="once"),
         "the group must be 32, 64 or 128"),
        (lambda a: rows.norm_rope(None, None, *a["inv_rope"][0][1:], None, None,
                                  **{k: v for k, v in a["norm_rope"][1].items()}),
         "needs q, kv or both"),
        (lambda a: swiglu.clamp_swiglu(a["inv_rope"][0][0][0, 0], torch.ones(2, 128), None,
                                       limit=1.0, rounding="once"),
         "gate is torch.bfloat16, up is torch.float32"),
    ],
)  # fmt: skip
def test_misuse_is_explained(call, sentence):
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        call(calls("cpu"))


@pytest.mark.skipif(not common.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn"])
def test_the_shim_rounds_to_nearest_even(name):
    """The interpreter's own casts truncate to bf16 and miss some of fp8."""
    import triton.language as tl
    from triton.runtime import interpreter

    kind = getattr(torch, name)
    target = {"bfloat16": tl.bfloat16, "float8_e4m3fn": tl.float8e4nv}[name]
    x = torch.randn(4096) * 100
    handle = interpreter.TensorHandle(x.numpy(), tl.float32)
    got = torch.from_numpy(interpreter.interpreter_builder.create_fp_trunc(handle, target).data)
    want = x.clamp(-448, 448).to(kind) if kind.itemsize == 1 else x.to(kind)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
