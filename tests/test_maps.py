"""Index maps: what a Lowering says a chain of views reads is what PyTorch reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from dsv4fuse import decompositions, maps
from dsv4fuse.fusion import Scene  # importing it registers what views mean
from dsv4fuse.lower import Lowering
from dsv4fuse.maps import Map, Size
from dsv4fuse.terms import Term

assert Scene
Step = Callable[[Tensor], Tensor]
TRACED, RUN = 6, 10  # the batch that a symbolic graph is traced with, and another


class Values(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _number(size: Size, symbols: dict[sympy.Symbol, int]) -> int:
    return int(sympy.sympify(size).subs(symbols))


def read(value: Tensor, m: Map, shape: torch.Size, symbols: dict[sympy.Symbol, int]) -> Tensor:
    """``value`` through a map, element by element of a view of ``shape``."""
    grid = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij") if shape else ()
    at = []
    for i in m:
        where = torch.full(tuple(shape), _number(i.offset, symbols))
        for stride, d in i.terms:
            div, size = _number(d.div, symbols), _number(d.size, symbols)
            where = where + _number(stride, symbols) * (grid[d.coord] // div % size)
        at.append(where)
    return value[tuple(at)] if at else value.expand(shape)


def _symbolic(x: Tensor) -> Tensor:
    """A fake of x whose first axis is a symbol."""
    axes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (x.dim() - 1)]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(axes))


def check(fn: Step, traced: Tensor, run: Tensor, symbolic: bool) -> bool:
    """Compares ``fn`` of the input with its map; does the map reach the input itself?"""
    sample = _symbolic(traced) if symbolic else traced
    gm = make_fx(dispatch_functionalize(fn), decompositions.table())(sample)
    low = Lowering()
    output = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    term = low.term(output)
    interpreter = Values(gm)
    result = interpreter.run(run)
    symbols: dict[sympy.Symbol, int] = {}
    for n in gm.graph.nodes:
        if n.op == "placeholder":
            for fake, real in zip(n.meta["val"].shape, run.shape, strict=True):
                expr = sympy.sympify(maps.as_size(fake))
                if expr.is_Symbol:
                    symbols[expr] = real
    assert isinstance(term, Term) and term.op == "load"
    node, m = term.args
    found = read(interpreter.values[node], m, result.shape, symbols)
    assert torch.equal(found, result), f"{gm.graph}\n{m}"
    return node.op == "placeholder"


# ---- chains of views, drawn with the shapes they apply to --------------------------------------


def _factors(n: int) -> list[tuple[int, int]]:
    return [(a, n // a) for a in range(1, n + 1) if n % a == 0]


@st.composite
def chains(draw, shape: tuple[int, ...], steps: int = 6) -> list[tuple[str, Step]]:
    """Steps that fit one after another, each with its name for the failure message."""
    out: list[tuple[str, Step]] = []
    x = torch.empty(shape)
    for _ in range(draw(st.integers(1, steps))):
        name, step = draw(_steps(tuple(x.shape)))
        y = step(x)
        if 0 < y.numel() <= 4096 and y.dim() <= 6:
            out.append((name, step))
            x = torch.empty(y.shape)
    return out


def _steps(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[str, Step]]:
    axes = st.integers(0, len(shape) - 1) if shape else st.nothing()
    choices = [_unsqueeze(shape)]
    if shape:
        choices += [_permute(shape), _unflatten(shape, axes), _slice(shape, axes)]
        choices += [_select(shape, axes), _split(shape, axes), _expand(shape)]
    if len(shape) > 1:
        choices += [_flatten(shape), _reshape(shape), _squeeze(shape, axes)]
    return st.one_of(choices)


@st.composite
def _unsqueeze(draw, shape):
    axis = draw(st.integers(-len(shape) - 1, len(shape)))
    return f"unsqueeze({axis})", lambda x: x.unsqueeze(axis)


@st.composite
def _squeeze(draw, shape, axes):
    axis = draw(axes)
    return f"squeeze({axis})", lambda x: x.squeeze(axis)


@st.composite
def _permute(draw, shape):
    order = draw(st.permutations(range(len(shape))))
    return f"permute({order})", lambda x: x.permute(order)


@st.composite
def _unflatten(draw, shape, axes):
    axis = draw(axes)
    parts = draw(st.sampled_from(_factors(shape[axis])))
    return f"unflatten({axis}, {parts})", lambda x: x.unflatten(axis, parts)


@st.composite
def _slice(draw, shape, axes):
    axis = draw(axes)
    start = draw(st.integers(0, shape[axis] - 1))
    end = draw(st.integers(start + 1, shape[axis]))
    step = draw(st.integers(1, 3))
    index = (slice(None),) * axis + (slice(start, end, step),)
    return f"[{axis}: {start}:{end}:{step}]", lambda x: x[index]


@st.composite
def _select(draw, shape, axes):
    axis = draw(axes)
    k = draw(st.integers(-shape[axis], shape[axis] - 1))
    return f"select({axis}, {k})", lambda x: x.select(axis, k)


@st.composite
def _split(draw, shape, axes):
    axis = draw(axes)
    size = draw(st.integers(1, shape[axis]))
    k = draw(st.integers(0, (shape[axis] - 1) // size))
    how = draw(st.sampled_from(["split", "chunk", "unbind"]))
    if how == "split":
        return f"split({size}, {axis})[{k}]", lambda x: x.split(size, axis)[k]
    if how == "chunk":
        return f"chunk({k + 1}, {axis})[0]", lambda x: x.chunk(k + 1, axis)[0]
    return f"unbind({axis})[{k}]", lambda x: x.unbind(axis)[k]


@st.composite
def _expand(draw, shape):
    to = tuple(draw(st.integers(1, 3)) if n == 1 else n for n in shape)
    return f"expand({to})", lambda x: x.expand(to)


@st.composite
def _flatten(draw, shape):
    first = draw(st.integers(0, len(shape) - 2))
    last = draw(st.integers(first + 1, len(shape) - 1))
    return f"flatten({first}, {last})", lambda x: x.flatten(first, last)


@st.composite
def _reshape(draw, shape):
    total = torch.Size(shape).numel()
    a, rest = draw(st.sampled_from(_factors(total)))
    to = (a, *draw(st.sampled_from(_factors(rest))))
    return f"reshape({to})", lambda x: x.reshape(to)


SHAPES = [(12,), (4, 6), (2, 3, 4), (1, 8, 6), (2, 1, 3, 8)]


@settings(max_examples=250)
@given(st.data())
def test_chain_of_views(data):
    shape = data.draw(st.sampled_from(SHAPES))
    chain = data.draw(chains(shape))
    x = torch.arange(torch.Size(shape).numel()).view(shape)

    def fn(x: Tensor) -> Tensor:
        for _, step in chain:
            x = step(x)
        return x.clone()

    check(fn, x, x, symbolic=False)


# ---- with a symbolic batch ---------------------------------------------------------------------

SYMBOLIC: dict[str, Step] = {
    "heads": lambda x: x.unflatten(-1, (3, 4)).transpose(1, 2),
    "merged": lambda x: x.flatten(0, 1),
    "merged and parted": lambda x: x.flatten(0, 1).unflatten(0, (-1, x.shape[1])),
    "merged and parted, heads": lambda x: x.reshape(-1, 12).view(x.shape[0], -1, 3, 4),
    "merged under a permutation": lambda x: x.permute(1, 0, 2).reshape(-1, 12),
    "pairs": lambda x: x[..., 4:].unflatten(-1, (-1, 2))[..., 1],
    "pairs of merged rows": lambda x: x.view(-1, 12)[:, 4:].view(-1, 4, 2).select(-1, 0),
    "lanes and rows": lambda x: x.reshape(x.shape[0], -1)[:, 12:].unflatten(-1, (-1, 12)),
    "rows and lanes": lambda x: x.reshape(-1),
    "half the lanes": lambda x: x.chunk(2, -1)[1].flatten(0, 1),
    "a head for all": lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1).flatten(2),
    "the first rows": lambda x: x[:2].transpose(0, 1),
    "all but the first": lambda x: x[1:, :, ::3],
    "the last row": lambda x: x[-1],
    "blocks": lambda x: x.view(-1, 4).view(x.shape[0], 5, 3, 4).select(2, 1),
    "batch inside": lambda x: x.permute(2, 0, 1).flatten(0, 1),
    "batch inside, out again": lambda x: x.permute(2, 0, 1).flatten(0, 1).unflatten(0, (12, -1)),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_batch(name):
    step = SYMBOLIC[name]
    reached = check(lambda x: step(x).clone(), *_batches(), symbolic=True)
    assert reached, "the map is right but ends at a view"


def _batches() -> tuple[Tensor, Tensor]:
    return tuple(torch.arange(n * 60).view(n, 5, 12) for n in (TRACED, RUN))  # type: ignore


@settings(max_examples=80)
@given(st.data())
def test_chain_of_views_behind_a_symbolic_batch(data):
    """A drawn chain on what one batch element holds, with the batch merged in and out."""
    inner = data.draw(chains((5, 12), steps=4))
    front = data.draw(st.sampled_from(["batch", "merged", "inside"]))

    def moved(step: Step) -> Step:
        return torch.vmap(step)

    def fn(x: Tensor) -> Tensor:
        if front == "merged":
            x = x.flatten(0, 1).unflatten(0, (-1, 5))
        if front == "inside":
            x = x.permute(1, 2, 0).flatten(1).unflatten(1, (12, -1)).permute(2, 0, 1)
        for _, step in inner:
            x = moved(step)(x)
        return x.clone()

    check(fn, *_batches(), symbolic=True)


def _assigned(x: Tensor) -> Tensor:
    """Rows of x in a larger tensor, its first left as it was."""
    out = x.new_zeros((x.shape[0] + 1, *x.shape[1:]))
    out[1:] = x
    return out


# Reads of joined rows that stay in one piece: they go on to that piece.
JOINED: dict[str, Step] = {
    "a piece of a cat": lambda x: torch.cat((x, x + 1), dim=0)[1:3],
    "the second piece": lambda x: torch.cat((x[2:] * 2, x), dim=0)[2:],
    "a middle axis": lambda x: torch.cat((x[:, :1], x[:, 2:]), dim=1)[:, 1:, ::2].transpose(0, 2),
    "rows assigned": lambda x: _assigned(x)[1:, :, 3:],
    "a row assigned": lambda x: x.select_scatter(x[0], 0, 2)[2],
    "two assignments": lambda x: _assigned(_assigned(x)[1:].transpose(0, 1))[1:].flatten(0, 1),
}


@pytest.mark.parametrize("name", JOINED)
def test_rows_of_a_join(name):
    x = torch.arange(60).view(4, 5, 3)
    assert check(lambda x: JOINED[name](x).clone(), x, x, symbolic=False)


@pytest.mark.parametrize("name, fn", [("cat", lambda x: torch.cat((x, x))[1:6]),
                                      ("assigned", lambda x: _assigned(x)[:2])])  # fmt: skip
def test_rows_of_two_pieces_are_a_new_tensor(name, fn):
    x = torch.arange(60).view(4, 5, 3)
    assert not check(lambda x: fn(x).clone(), x, x, symbolic=False)


def _lanes(x: Tensor, *, step: int) -> Tensor:
    """Every so many lanes assigned, each of them another number."""
    out = x.new_zeros((len(x), 12))
    for j in range(step):
        out[:, j::step] = x[:, j : 12 : step] * 1
    return out


# Lanes made of pieces, of which only the first are read.
FIRST: dict[str, Step] = {
    "of two pieces": lambda x: torch.cat((x[:, :4], x[:, 8:]), dim=-1)[:, :7],
    "of two of three": lambda x: torch.cat((x[:, :4], x[:, 8:], x), dim=-1)[:, :7],
    "all": lambda x: torch.cat((x[:, 4:], x[:, :4]), dim=-1),
    "of an assignment": lambda x: _lanes(x, step=2)[:, :6],
    "of a stack": lambda x: torch.stack((x, x + 100, x + 200), dim=-1)[..., :2].flatten(1),
    "of three assignments": lambda x: _lanes(x, step=3)[:, :6],
    "of the last, one": lambda x: _lanes(x, step=3)[:, :7],
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_lanes_of_a_join(name):
    """Lane by lane, what the term names is what the graph computes, and nothing else."""
    x = torch.arange(48).view(4, 12)
    gm = make_fx(dispatch_functionalize(FIRST[name]), decompositions.table())(x)
    runner = Values(gm)
    runner.run(x)
    output = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    for node in gm.graph.nodes:
        node.meta.setdefault("val", runner.values[node])
    found = runner.values[output]
    term = Lowering().term(output)
    for c in [(row, lane) for row in range(4) for lane in range(found.shape[1])]:
        assert _element(term, c, runner.values) == found[c]
    assert _length(term, found.shape[1]) == found.shape[1]


def _element(t: Term, c: tuple[int, ...], values: dict[fx.Node, Tensor]) -> Tensor:
    if t.op == "load":
        node, m = t.args
        return values[node][tuple(i.offset + sum(
            s * (c[d.coord] // d.div % d.size) for s, d in i.terms) for i in m)]  # fmt: skip
    if t.op == "add":
        a, b = sorted(t.args, key=lambda a: a.op == "const")
        return _element(a, c, values) + b.args[0]
    along, size, *pieces = t.args
    at = c[along]
    if t.op == "lace":
        assert at // len(pieces) < size
        return _element(pieces[at % len(pieces)], _put(c, along, at // len(pieces)), values)
    for n, piece in zip(size, pieces, strict=True):
        if at < n:
            return _element(piece, _put(c, along, at), values)
        at -= n
    raise AssertionError("no piece")


def _put(c: tuple[int, ...], along: int, at: int) -> tuple[int, ...]:
    return (*c[:along], at, *c[along + 1 :])


def _length(t: Term, default: int) -> int:
    """How many lanes a term of pieces has."""
    if t.op == "lace":
        return t.args[1] * (len(t.args) - 2)
    return sum(t.args[1]) if t.op == "cat" else default


@pytest.mark.parametrize("start, step, size", [(0, 1, 5), (-7, 1, 8), (3, 4, 6)])
def test_an_iota_is_a_number_of_its_coordinate(start, step, size):
    fn = lambda x: torch.arange(start, start + step * size, step)[1:].view(-1, 1)  # noqa: E731
    gm = make_fx(dispatch_functionalize(fn), decompositions.table())(torch.zeros(1))
    output = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    term = Lowering().term(output)
    assert term.op == "coord"
    (index,) = term.args
    numbers = [index.offset + sum(s * c for s, _ in index.terms) for c in range(size - 1)]
    assert numbers == fn(torch.zeros(1)).flatten().tolist()
