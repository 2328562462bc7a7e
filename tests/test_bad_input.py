"""Input that no kernel takes: a sentence, never a crash, never a wrong result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dsv4fuse.kernels import _common as common
from torch import Tensor

import dsv4fuse
from dsv4fuse import OptionError, Report
from dsv4fuse.backend import dsv4fuse as backend

from .spellings._case import Draw
from .spellings._norms import BF16_WEIGHT
from .spellings._ropes import REAL

ALWAYS = {"select": "always", "inner": "eager"}
NORM, TURN = BF16_WEIGHT["hf_weighted"], REAL["hf"]


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)


def turned(x, w, cos, sin):
    return TURN(NORM(x, w), cos, sin)


def act(x):
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)).to(x.dtype)


def rows(*lead: int, dim: int = 48, rope: int = 16) -> tuple[Tensor, ...]:
    draw = Draw()
    return draw(*lead, 3, dim), draw(dim), *draw.angles(*lead, 1, rope // 2)


def _compiled(fn, **options):
    return torch.compile(fn, backend=backend, options=ALWAYS | options, fullgraph=True)


def _explained(fn, *args, **options) -> Report:
    return dsv4fuse.explain(fn, *args, options={"select": "always"} | options)


@torch.no_grad()
def _declined(fn, *args) -> str:
    """The reasons of a function of which nothing is taken, and whose result is right."""
    report = _explained(fn, *args)
    assert not report.counts() and {s.status for s in report.sites} <= {"declined"}
    assert torch.equal(_compiled(fn)(*args), fn(*args))
    for site in report.sites:
        assert site.reason[0].isupper() or site.reason[0].isdigit() or " " in site.reason
    return " ".join(s.reason for s in report.sites)


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"slect": "always"}, ("no option 'slect'", "select")),
        ({"select": "sometimes"}, ("sometimes", "auto", "always")),
        ({"verify": 1}, ("verify", "True or False", "int")),
        ({"fusions": "norm_rope_cache"}, ("list of names",)),
        ({"fusions": ["norm_rope"]}, ("norm_rope", "norm_rope_cache")),
        ({"exclude": ["nothing"]}, ("nothing", "clamp_swiglu_quant")),
        ({"expect": {"norm_rope_cache": -1}}, ("expect", "0 or more")),
        ({"inner": "tensorrt"}, ("tensorrt", "inductor", "eager")),
        (["select"], ("mapping",)),
    ],
)
def test_options(options, words):
    """The same message by every way in."""
    for use in (
        lambda: dsv4fuse.explain(act, Draw()(2, 8), options=options),
        lambda: dsv4fuse.inductor_pass(options),
    ):
        with pytest.raises(OptionError) as caught:
            use()
        assert all(word in str(caught.value) for word in words), str(caught.value)
    if isinstance(options, dict):
        with pytest.raises(OptionError):
            dsv4fuse.fuse(act, **options)
        # Dynamo wraps what a backend raises, and says it all the same.
        with pytest.raises(Exception) as caught, torch.no_grad():
            torch.compile(act, backend=backend, options=options)(Draw()(2, 8))
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(TypeError, match="nn.Module"):
        dsv4fuse.fuse(42)
    with pytest.raises(TypeError, match="nn.Module"):
        dsv4fuse.fuse(int)


# ---- sizes and layouts -------------------------------------------------------------------------


def test_head_size_too_large():
    assert "2048" in _declined(turned, *rows(2, 5, dim=2048))


def test_head_size_of_no_multiple():
    assert "24" in _declined(turned, *rows(2, 5, dim=24, rope=8))


def test_rope_of_one_pair_and_of_the_whole_head():
    for rope in (2, 48):
        args = rows(2, 5, rope=rope)
        assert torch.equal(_compiled(turned)(*args), turned(*args))


def test_odd_rope_dim():
    """Lanes that make no pairs: eager refuses them, and so does the compiled function."""
    x, w, cos, sin = rows(2, 5)

    def odd(x, w, cos, sin):
        r = NORM(x, w)[..., -15:].float()
        return torch.stack((r[..., 0::2] * cos, r[..., 1::2] * sin), dim=-1)

    with pytest.raises(RuntimeError):
        odd(x, w, cos, sin)
    with pytest.raises((RuntimeError, torch._dynamo.exc.TorchDynamoException)):
        _compiled(odd)(x, w, cos, sin)


def _quant(group: int):
    def quant(x):
        y = act(x).unflatten(-1, (-1, group)).float()
        s = y.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448.0
        return (y / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * s

    return quant


@pytest.mark.parametrize("group", [4, 16, 48, 96])
def test_group_that_no_kernel_takes(group):
    x = Draw()(7, 192)
    report = _explained(_quant(group), x)
    assert {s.status for s in report.sites} <= {"declined", "taken"}
    assert torch.equal(_compiled(_quant(group))(x), _quant(group)(x))


def test_lanes_that_are_not_dense():
    x, w, cos, sin = rows(2, 5)
    x = torch.empty(2, 5, 3, 96, dtype=x.dtype)[..., ::2].copy_(x)
    assert "dense" in _declined(turned, x, w, cos, sin)


def test_fp64_is_left_alone():
    x, w, cos, sin = rows(2, 5)
    args = x.double(), w.double(), cos, sin
    assert torch.equal(_compiled(turned)(*args), turned(*args))
    assert not _explained(turned, *args).counts()


def _writes(x, w, cos, sin, cache, slots):
    cache[slots] = turned(x, w, cos, sin)
    return cache.float().sum()


@pytest.mark.parametrize("view", ["columns", "every second row", "transposed"])
def test_cache_that_is_a_view(view):
    """Rows outside the slots, and what lies between the rows, keep their bits."""
    x, w, cos, sin = (t.squeeze(1) if t.dim() == 3 else t for t in rows(5))
    x = x[:, 0]
    slots = torch.tensor([3, 1, 7, 0, 5])

    def cache() -> tuple[Tensor, Tensor]:
        if view == "columns":
            base = Draw(3)(11, 80)
            return base, base[:, 16:64]
        if view == "every second row":
            base = Draw(3)(22, 48)
            return base, base[::2]
        base = Draw(3)(48, 11)
        return base, base.t()

    (wanted_base, wanted), (found_base, found) = cache(), cache()
    with torch.no_grad():
        a = _writes(x, w, cos, sin, wanted, slots)
        b = _compiled(_writes)(x, w, cos, sin, found, slots)
    assert torch.equal(a, b) and torch.equal(wanted_base, found_base)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_no_tokens(shape):
    args = rows(*shape)
    with torch.no_grad():
        assert torch.equal(_compiled(turned)(*args), turned(*args))
        for fn in (act, _quant(32)):
            x = Draw()(*shape, 192)
            assert torch.equal(_compiled(fn)(x), fn(x))


def test_no_tokens_after_some_and_nothing_is_written():
    def step(x, w, cos, sin, cache, slots):
        cache[slots] = turned(x, w, cos, sin)

    fn = _compiled(step, inner="eager")
    cache = Draw(3)(11, 48)
    before = cache.clone()
    for n in (5, 4, 0, 1):
        x, w, cos, sin = Draw()(n, 48), Draw()(48), *Draw().angles(n, 8)
        with torch.no_grad():
            fn(x, w, cos, sin, cache, torch.arange(n))
            step(x, w, cos, sin, before, torch.arange(n))
        assert torch.equal(cache, before)


# ---- changing sizes ----------------------------------------------------------------------------


def test_changing_sizes_compile_once():
    count = 0

    def counting(gm, inputs, **kwargs):
        nonlocal count
        count += 1
        return backend(gm, inputs, options=ALWAYS)

    fn = torch.compile(turned, backend=counting, fullgraph=True)
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 7), (4, 9), (6, 2), (2, 64)):
            x, w, cos, sin = rows(batch, length)
            for t in (x, cos, sin):
                torch._dynamo.mark_dynamic(t, 0)
                torch._dynamo.mark_dynamic(t, 1)
            assert torch.equal(fn(x, w, cos, sin), turned(x, w, cos, sin))
        assert count == 1
        one = rows(1, 1)  # torch itself compiles sizes of one anew
        assert torch.equal(fn(*one), turned(*one))
    assert count == 2


def test_changing_rows_compile_once_more_without_marks():
    count = 0

    def counting(gm, inputs, **kwargs):
        nonlocal count
        count += 1
        return backend(gm, inputs, options=ALWAYS)

    fn = torch.compile(_quant(32), backend=counting, fullgraph=True)
    with torch.no_grad():
        for n in (7, 8, 33, 100, 2):
            x = Draw()(n, 192)
            assert torch.equal(fn(x), _quant(32)(x))
    assert count == 2  # once with fixed sizes, once with a symbol


# ---- where nothing may be fused ----------------------------------------------------------------


def test_a_cpu_is_said_to_be_one():
    report = dsv4fuse.explain(turned, *rows(2, 5))
    (site,) = report.sites
    assert site.status == "declined" and "no GPU" in site.reason and not report.counts()


@pytest.mark.parametrize("value", ["1", "true"])
def test_switched_off_by_the_environment(value, monkeypatch):
    monkeypatch.setenv("DSV4FUSE_DISABLE", value)
    args = rows(2, 5)
    assert torch.equal(_compiled(turned)(*args), turned(*args))
    assert not _explained(turned, *args).sites


def test_gradients_pass_through_with_a_note():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(Draw(1)(48))

        def forward(self, x, cos, sin):
            return turned(x, self.weight, cos, sin)

    layer, (x, _, cos, sin) = Layer(), rows(2, 5)
    x = x.float()
    out = _compiled(layer)(x, cos, sin)
    out.float().sum().backward()
    found = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x, cos, sin).float().sum().backward()
    # torch's own decompositions round differently than eager's backward, in the last bits of fp32.
    wanted = layer.weight.grad
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    report = Report.of(layer)
    assert not report.sites
    assert any("gradient" in note and "no_grad" in note for note in report.notes)
