"""What every fused kernel promises, asked of each sequence that the registry knows.

All run ``Fusion.examples`` through the backend, so that a new fusion is held to this by itself.
On a CPU the kernels are interpreted, which takes minutes in all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from dsv4fuse.kernels import _common as common
from torch import Tensor

from dsv4fuse import Report, backend
from dsv4fuse.fusion import Example, Sizes, registry

from . import _calls
from ._kernels import DEVICE, GPU, all_equal, all_near, bits
from .sanitize import main

pytestmark = pytest.mark.gpu if GPU else pytest.mark.long
SIZES = Sizes() if GPU else Sizes(heads=4, groups=2, inter=256, experts=32)
TOKENS = 37 if GPU else 5
VARIANTS = [(f, v) for f, made in registry().items() for v in made.examples]
# A row's bits depend on how many rows there are where the way to sum is chosen by their number.
BY_COUNT = {"hyper_connection_pre", "hyper_head", "inv_rope_grouped_bmm", "sink_attention",
            "sparse_sink_attention", "indexer_logits"}  # fmt: skip
ORDERS = {"expert_sort"}  # all rows: where one is hangs on the others


@dataclass(frozen=True)
class Site:
    """A sequence as people write it, and what the backend makes of it."""

    name: str
    variant: str
    example: Example

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}"

    @property
    def fn(self) -> Callable[..., object]:
        return self.example.fn

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.example.inputs

    @property
    def slack(self) -> float:
        return self.example.slack

    @functools.cached_property
    def fused(self) -> Callable[..., object]:
        # Of inputs with other strides a site may be declined, which is as good.
        options = {"select": "always", "inner": "eager", "verify": False}
        return torch.compile(self.fn, backend=backend.dsv4fuse, options=options, dynamic=False)

    def run(self, fn: Callable[..., object], given: list[Tensor]) -> list[Tensor]:
        """The results and then the inputs, which may have been written."""
        with torch.no_grad():
            found = fn(*given)
        found = [found] if isinstance(found, Tensor) else list(found)  # type: ignore
        return [*found, *self.example.read(given)]


def site(name: str, variant: str, tokens: int = TOKENS) -> Site:
    torch.manual_seed(0)
    made = registry()[name].examples[variant](tokens, SIZES, DEVICE)
    return Site(name, variant, made)


@pytest.fixture(params=VARIANTS, ids=lambda nv: "-".join(nv))
def made(request) -> Iterator[Site]:
    """With every fresh tensor full of NaN, or of the largest integer: nothing is zero by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield site(*request.param)
    torch.use_deterministic_algorithms(False)


def clones(s: Site) -> list[Tensor]:
    return [t.clone() for t in s.inputs]


def test_what_the_sanitizer_is_given():
    """Every op and every variant; on a GPU make sanitize runs it."""
    done = main(DEVICE, (3,))
    assert len(done) == len(_calls.calls("cpu")) + len(VARIANTS)


@pytest.mark.gpu
def test_the_op_that_is_torchs_own_product():
    codes, w = (torch.randn(8, 2, 512, device="cuda").to(common.FP8) for _ in "cw")
    w = w.repeat(16, 1, 1).transpose(0, 1).contiguous()  # [2, 128, 512]
    scales, w_scale = torch.rand(2, 4, 8, device="cuda"), torch.rand(2, 1, 4, device="cuda")
    op = torch.ops.dsv4fuse.grouped_scaled_mm
    tests = ["test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(op.default, (codes, scales, w, w_scale), test_utils=tests)
    wide = codes.double().unflatten(-1, (4, 128)) * scales.permute(2, 0, 1).unsqueeze(-1)
    heavy = w.double().unflatten(-1, (4, 128)) * w_scale.unsqueeze(-1)
    exact = torch.einsum("tgk,gnk->tgn", wide.flatten(-2), heavy.flatten(-2))
    off = (op(codes, scales, w, w_scale).double() - exact).abs()
    assert (off <= 2**-8 * exact.abs().amax(-1, keepdim=True)).all()


def test_the_same_bits_again(made):
    """Run to run; what is not a cache is only read; and the site is taken in the first place."""
    given, again = clones(made), clones(made)
    first, second = made.run(made.fused, given), made.run(made.fused, again)
    all_equal(first, second)
    eager = made.run(made.fn, clones(made))
    all_near(first, eager, made.slack)
    written, unwritten = eager[-len(given) :], made.example.read(made.inputs)
    for ours, theirs, before in zip(made.example.read(given), written, unwritten, strict=True):
        kept = bits(theirs) == bits(before) if ours.element_size() <= 4 else theirs == before
        assert torch.equal(ours[kept], before[kept]), "written where eager writes nothing"
    holder = torch.nn.Module()
    for k, t in enumerate(given):
        holder.register_buffer(f"x{k}", t)
    assert Report.of(holder).counts() == {made.name: 1}


def _poisoned(t: Tensor) -> tuple[Tensor, Tensor]:
    """t's values with the same axes in a buffer with room around every row; and that buffer."""
    wider = [n + 16 * (k == t.dim() - 1) + 2 * (k == 0) for k, n in enumerate(t.shape)]
    poison = math.nan if t.dtype.is_floating_point else 1 << 20
    poison = poison if t.element_size() > 1 else 0
    buffer = torch.empty(wider, dtype=t.dtype, device=t.device).fill_(poison)
    return _inside(buffer).copy_(t), buffer


def _inside(buffer: Tensor) -> Tensor:
    return buffer[1:-1, ..., 8:-8] if buffer.dim() > 1 else buffer[9:-9] if buffer.dim() else buffer


def test_room_around_rows_is_neither_read_nor_written(made):
    """Rows apart in memory, poison between them: the bits of dense rows, and the poison stays."""
    pairs = [_poisoned(t) for t in made.inputs]
    before = [buffer.clone() for _, buffer in pairs]
    found = made.run(made.fused, [view for view, _ in pairs])
    dense = made.run(made.fused, clones(made))
    all_near(found, dense, made.slack)
    for (view, buffer), kept in zip(pairs, before, strict=True):
        view.zero_()
        _inside(kept).zero_()
        all_equal([buffer], [kept])


def _token_axes(name: str, variant: str, s: Site) -> list[int | None]:
    """Of each input the axis along which its tokens lie: what is longer with one token more."""
    longer = site(name, variant, TOKENS + 1).inputs
    axes = [
        next((k for k, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)
        for a, b in zip(s.inputs, longer, strict=True)
    ]
    return [None if k is not None and t.shape[k] != TOKENS else k
            for k, t in zip(axes, s.inputs, strict=True)]  # fmt: skip


SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "zeros": 0.0, "-0": -0.0,
           "subnormal": 1e-40, "large": 3e4}  # fmt: skip


def test_special_values(made):
    """One token's row, in one input after another: what eager makes of it, and in no other row."""
    axes = enumerate(_token_axes(made.name, made.variant, made))
    places = [(k, a) for k, a in axes if a is not None and made.inputs[k].is_floating_point()]
    for (k, axis), value in itertools.product(places, SPECIAL):
        given, theirs = clones(made), clones(made)
        for t in (given[k], theirs[k]):
            row = t.select(axis, TOKENS // 2)
            part = row if value in ("zeros", "-0", "subnormal") or not row.dim() else row[..., :1]
            part.copy_(torch.tensor(SPECIAL[value]).to(part.dtype))  # NaN where it does not fit
        ours, theirs = made.run(made.fused, given), made.run(made.fn, theirs)
        all_near(ours, theirs, made.slack, (value, "in input", k))


def test_rows_do_not_depend_on_their_number(made):
    """The first rows of many are the rows of a few."""
    axes = _token_axes(made.name, made.variant, made)
    if made.name in BY_COUNT | ORDERS or None in (axes[0],):
        pytest.skip("no such promise")
    few = TOKENS - 2
    part = [t.clone() if a is None else t.narrow(a, 0, few).clone()
            for t, a in zip(made.inputs, axes, strict=True)]  # fmt: skip
    many = made.run(made.fused, clones(made))[: -len(part)]
    less = made.run(made.fused, part)[: -len(part)]
    cut = [m[:few] if m.shape != n.shape else m for m, n in zip(many, less, strict=True)]
    all_equal([c.contiguous() for c in cut], [n.contiguous() for n in less])


# Hopper's tensor cores add products of e4m3 to fewer bits than fp32 has, and cut the rest off: a
# tenth more of the differing results were the smaller on an H200.
CUT_OFF = {("inv_rope_grouped_bmm", "fp8"): 0.2}


def test_rounding_leans_nowhere(made):
    """Where the fused result and eager's are not the same, either is the larger as often.

    Truncation, or a rounding point too many, would be on one side: |fused| < |eager|. The chance
    of a fair coin to be as far off is below 1e-6.
    """
    lean = CUT_OFF.get((made.name, made.variant), 0.0)
    found = made.run(made.fused, clones(made))
    wanted = made.run(made.fn, clones(made))
    for x, y in zip(found, wanted, strict=True):
        if x.dtype.is_floating_point:
            smaller = (x.double().abs() < y.double().abs()).sum().item()
            larger = (x.double().abs() > y.double().abs()).sum().item()
            all_of = smaller + larger
            chance = 4.9 * math.sqrt(all_of) + lean * all_of
            assert abs(smaller - larger) <= chance, (smaller, larger)


def test_several_tokens_for_one_slot(made):
    """Each element is one of theirs, as it would be alone; every other row is as before. (On a GPU
    two programs write a row's halves in any order.)"""
    axes = _token_axes(made.name, made.variant, made)
    given, before = clones(made), made.example.read(made.inputs)
    written = made.run(made.fn, given)[-len(given) :]
    caches = [k for k, (a, b) in enumerate(zip(written, before, strict=True))
              if not torch.equal(a, b)]  # fmt: skip
    slots = [k for k, (t, a) in enumerate(zip(made.inputs, axes, strict=True))
             if t.dtype in (torch.int32, torch.int64) and a is not None]  # fmt: skip
    if not caches or len(slots) != 1:
        pytest.skip("no cache is written by index")
    (cache,), (slot,) = caches, slots
    written = made.run(made.fused, clones(made))[-len(given) :]
    alone = written[cache].flatten(0, -2)
    alone = alone[(alone != before[cache].flatten(0, -2)).any(-1)]
    given = clones(made)
    given[slot].fill_(3)
    found = made.run(made.fused, given)[-len(given) :][cache].flatten(0, -2)
    changed = (found != before[cache].flatten(0, -2)).any(-1)
    assert changed.sum() == 1
    assert (alone == found[changed]).any(0).all()



