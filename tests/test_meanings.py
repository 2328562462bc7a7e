"""What each ATen operation means, proved: its term computes the bits that the operation does.

And what brings terms to normal form beside the rules: interning, which takes commuted operands
for equal, and rules on top of rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4fuse import joins, lower, recorded, tables, views
from dsv4fuse.lower import Lowering
from dsv4fuse.terms import COMMUTATIVE, Term, straight

from ._bits import BF16, E4M3, FLOATS, FP16, FP32, FP64, OPS, evaluate, every, same_bits, specials

assert views and joins and tables  # importing them registers meanings
aten, prims = torch.ops.aten, torch.ops.prims

# ---- one operation ----------------------------------------------------------------------------

NUMBERS = (0.0, -0.0, 1.0, -1.5, 0.3, 448.0)
UNARY = ("neg", "abs", "exp", "exp2", "log", "log1p", "log2", "ceil", "floor", "sqrt", "rsqrt",
         "reciprocal", "sigmoid", "cos", "sin", "round", "trunc", "sign", "logical_not",
         "isnan")  # fmt: skip
WITH_NUMBER = ("add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "clamp_min.default",
               "clamp_max.default", "remainder.Scalar", "eq.Scalar", "ne.Scalar", "gt.Scalar",
               "ge.Scalar", "lt.Scalar", "le.Scalar")  # fmt: skip
OF_TWO = ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum.default",
          "minimum.default", "clamp_min.Tensor", "clamp_max.Tensor", "remainder.Tensor",
          "eq.Tensor", "ne.Tensor", "gt.Tensor", "ge.Tensor", "lt.Tensor", "le.Tensor",
          "copysign.Tensor", "logical_and.default", "logical_or.default")  # fmt: skip
CASTS = (prims.convert_element_type.default, aten.to.dtype)
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # target, arguments (T: a tensor), keywords
T = object()


def _target(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


ONE: list[Call] = [
    *((_target(n), (T,), {}) for n in (*UNARY, "relu", "square")),
    *((_target(n), (T, c), {}) for n in WITH_NUMBER for c in NUMBERS if c or n[0] != "r"),
    *((aten.pow.Tensor_Scalar, (T, e), {}) for e in (2, 0.5, -0.5, 1)),
    *((target, (T, to), {}) for target in CASTS for to in (BF16, FP16, FP32, FP64, E4M3)),
    *((aten._to_copy.default, (T,), {"dtype": to}) for to in (BF16, FP32)),
    *((aten.add.Tensor, (T, c), {}) for c in NUMBERS),
]  # fmt: skip
TWO: list[Call] = [(_target(n), (T, T), {}) for n in OF_TWO] + [(aten.copy.default, (T, T), {})]
ELSEWHERE = {  # where what these mean is tested
    "test_maps.py": {
        "view", "_unsafe_view", "reshape", "permute", "t", "transpose", "unsqueeze", "squeeze",
        "expand", "slice", "select", "getitem", "cat", "slice_scatter", "select_scatter", "iota",
        "clone", "alias", "detach", "contiguous", "lift_fresh_copy",
    },
    "test_folds below": {"mean", "sum", "amax"},
    "test_numbers below": {"full", "full_like", "new_full", "scalar_tensor"},
    "test_pairs below": {"view_as_complex", "view_as_real", "_conj", "_conj_physical",
                         "conj_physical", "mul"},
    "test_choices below": {"where", "index_put"},
    "test_masks below": {"bitwise_and", "bitwise_or", "bitwise_not"},
    "test_tables below": {"bucketize", "searchsorted", "index"},
    "test_powers_of_two below": {"pow"},
}  # fmt: skip


def _name(target: Any) -> str:
    return str(getattr(target, "overloadpacket", target)).rpartition(".")[2].split()[-1].strip(">")


def test_every_operation_is_proved():
    known = {*lower.ELEMENTWISE, *lower.FOLDS, *lower.HANDLERS}
    proved = {target for target, _, _ in (*ONE, *TWO)}
    left = {_name(t) for t in known - proved}
    assert left <= set().union(*ELSEWHERE.values()), left


def _read(
    fn: Callable[..., Any], *values: Tensor
) -> tuple[Tensor, Term, dict[Term, Tensor]]:
    """What fn, one or a few nodes, answers, and its term with the values of the leaves."""
    graph = fx.Graph()
    inputs = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for k, v in enumerate(values):
            inputs.append(graph.placeholder(f"x{k}"))
            inputs[-1].meta["val"] = mode.from_tensor(v)

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            node = graph.call_function(target, args, kwargs)
            fakes = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*fakes[0], **fakes[1])
            return node

        node = fn(call, *inputs)
    graph.output(node)
    found = fx.Interpreter(fx.GraphModule(torch.nn.Module(), graph)).run(*values)
    low = Lowering()
    term = low.term(node)
    assert isinstance(term, Term) and term.args[:1] != (node,), "read as a tensor of its own"
    env = {low.interner.load(n, straight(n)): v for n, v in zip(inputs, values, strict=True)}
    return found, term, env


def _sides(fn: Callable[..., Any], *values: Tensor) -> tuple[Tensor, Tensor, Term]:
    """What fn answers, and what its term does."""
    found, term, env = _read(fn, *values)
    return found, evaluate(term, env), term


def _alike(found: Tensor, meant: Any) -> None:
    meant = torch.as_tensor(meant, dtype=found.dtype).expand(found.shape)
    if found.dtype == torch.bool:
        assert torch.equal(found, meant)
    else:
        same_bits(found, meant)


def _numbers(dtype: torch.dtype) -> Tensor:
    if dtype is not FP32:
        return every(dtype)
    bits = torch.randint(-(2**31), 2**31, (1 << 15,), generator=torch.Generator().manual_seed(0))
    return torch.cat((specials(FP32), bits.to(torch.int32).view(FP32)))


def _id(call: Call) -> str:
    return f"{call[0]}{[a for a in call[1] if a is not T]}{call[2] or ''}"


@pytest.mark.parametrize("call", ONE, ids=_id)
def test_one_operand(call):
    target, args, kwargs = call
    for d in (*FLOATS, E4M3) if target in CASTS else FLOATS:
        x = _numbers(d)
        if target is aten.pow.Tensor_Scalar and d is FP16:
            x = x[x != float("-inf")].abs()  # pow answers for -0 and -inf, a root does not
        found, meant, _ = _sides(
            lambda node, x, a=args: node(target, *(x if i is T else i for i in a), **kwargs), x
        )
        _alike(found, meant)


@pytest.mark.parametrize("call", TWO, ids=_id)
def test_two_operands(call):
    for d, e in itertools.product(FLOATS, FLOATS):
        known, other = specials(d), specials(e)
        x, y = known.repeat_interleave(len(other)), other.repeat(len(known))
        found, meant, term = _sides(lambda node, x, y: node(call[0], x, y), x, y)
        if term.op in ("minimum", "maximum"):  # of two zeros either: operands commute
            keep = (x != 0) | (y != 0)
            found, meant = found[keep], meant[keep]
        _alike(found, meant)


def test_choices():
    x, y = specials(FP32), specials(BF16).flip(0)
    for narrow in (FP32, BF16):
        found, meant, _ = _sides(
            lambda node, x, y: node(aten.where.self, node(aten.gt.Scalar, x, 0.25), x, y),
            x.to(narrow), y,
        )  # fmt: skip
        _alike(found, meant)


def test_masks():
    x = specials(FP32)
    for op in (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor):
        found, meant, _ = _sides(
            lambda node, x, op=op: node(
                op, node(aten.gt.Scalar, x, 0.25), node(
                    aten.bitwise_not.default, node(aten.le.Scalar, x, 3.0))
            ), x,
        )  # fmt: skip
        _alike(found, meant)


BOUNDS = [-1.0, 0.25, 0.25, 3.0]


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("how", ["bucketize", "searchsorted", "side"])
@pytest.mark.parametrize("table", [torch.float32, torch.int64])
def test_tables(how, right, table):
    """Of a constant: NaN above all bounds, negative indices from the end."""

    def looked_up(x: Tensor) -> Tensor:
        bounds = torch.tensor(BOUNDS)
        if how == "bucketize":
            i = torch.bucketize(x, bounds, right=right)
        elif how == "side":
            i = torch.searchsorted(bounds, x, side="right" if right else "left")
        else:
            i = torch.searchsorted(bounds, x, right=right)
        return torch.tensor([2, 3, 5, 7, 11], dtype=table)[i - 2]

    x = torch.cat((specials(FP32), torch.tensor(BOUNDS)))
    _alike_traced(looked_up, x)


def _alike_traced(fn: Callable[..., Any], x: Tensor) -> None:
    graph = recorded.graph(fn, [(x.shape, x.dtype)])
    low = Lowering()
    (leaf,) = (n for n in graph.nodes if n.op == "placeholder")
    term = low.term(next(n for n in graph.nodes if n.op == "output").args[0])
    assert isinstance(term, Term) and term.op == "where", "read as a tensor of its own"
    meant = evaluate(term, {low.interner.load(leaf, straight(leaf)): x})
    assert torch.equal(meant.double(), fn(x).double())


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.bucketize(x, torch.tensor([3.0, 1.0])),
        lambda x: torch.bucketize(x, torch.tensor([1.0, float("nan")])),
        lambda x: torch.searchsorted(
            torch.tensor([3.0, 1.0]), x, sorter=torch.tensor([1, 0])
        ),
        lambda x: torch.bucketize(x, x),
        lambda x: torch.arange(99.0)[x.long()],
        lambda x: torch.tensor([[1.0, 2.0]])[x.long()],
    ],
)
def test_no_tables(fn):
    """Not sorted, not a constant, long ones, of several axes."""
    graph = recorded.graph(fn, [((2,), FP32)])
    node = next(n for n in graph.nodes if n.op == "output").args[0]
    assert Lowering().term(node).op == "load"


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_assignment_where_a_mask_says_so(dtype, value):
    def assigned(node: Any, x: fx.Node) -> fx.Node:
        one = node(aten.full.default, [], value, dtype=dtype)
        return node(aten.index_put.default, x, [node(aten.gt.Scalar, x, 0.25)], one)

    found, meant, term = _sides(assigned, _numbers(dtype))
    assert term.op == "where"
    _alike(found, meant)


@pytest.mark.parametrize("value", [*NUMBERS, float("inf"), float("-inf"), 0.1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers(dtype, value):
    """A filled tensor is the number that its dtype holds."""
    x = specials(FP32)
    shape = [len(x)]
    ways = (
        lambda node, x: node(aten.full.default, shape, value, dtype=dtype),
        lambda node, x: node(aten.full_like.default, x, value, dtype=dtype),
        lambda node, x: node(aten.new_full.default, x, shape, value, dtype=dtype),
        lambda node, x: node(aten.scalar_tensor.default, value, dtype=dtype),
    )
    for make in ways:
        found, meant, _ = _sides(make, x)
        _alike(found, meant)
        found, meant, _ = _sides(
            lambda node, x, m=make: node(aten.mul.Tensor, x, node(CASTS[0], m(node, x), FP32)), x
        )
        _alike(found, meant)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("target, axes", [
    (aten.mean.dim, [-1]), (aten.mean.dim, [0, 1]), (aten.sum.dim_IntList, [1]),
    (aten.sum.dim_IntList, [-2]), (aten.amax.default, [-1]), (aten.amax.default, [0]),
])  # fmt: skip
def test_folds(target, axes, keep):
    """Which axes are folded, and to which dtype; the order of a sum is Inductor's."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    x[2, 3] = float("inf")
    found, _, term = _sides(lambda node, x: node(target, x, axes, keep), x)
    how, body, reduced, shape, m = term.args
    meant = getattr(torch, how)(x, reduced, keepdim=keep)
    _alike(found, meant)
    assert shape == (6, 5) and reduced == tuple(sorted(a % 2 for a in axes))
    assert term.dtype == found.dtype and body.op == "load"
    wide = {"dtype": FP32} if target is not aten.amax.default else {}
    _, _, term = _sides(lambda node, x: node(target, x, axes, keep, **wide), x.to(BF16))
    inner = term.args[1] if wide else term
    assert term.dtype == (FP32 if wide else BF16) and (inner.op == "cast") == bool(wide)


def test_amax_commutes_with_widening():
    """|max| of a widened tensor is read as the widened |max|: choosing rounds nothing."""
    for d in (BF16, FP16):
        x = every(d).view(256, -1)
        found, _, term = _sides(
            lambda node, x: node(
                aten.amax.default, node(aten.abs.default, node(CASTS[0], x, FP32)), [1]
            ), x,
        )  # fmt: skip
        assert term.op == "cast" and term.args[0].op == "fold" and term.args[0].dtype == d
        same_bits(found, x.abs().amax(1).to(FP32))


def test_a_sum_over_two_is_an_addition():
    """But for two zeros: a sum starts at +0."""
    for d in FLOATS:
        known = specials(d)
        x = torch.stack((known.repeat_interleave(len(known)), known.repeat(len(known))), -1)
        x = x[(x != 0).any(-1)]
        same_bits(x.sum(-1), x[:, 0] + x[:, 1])


def test_pairs():
    """Complex products and conjugates, written out in real numbers."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 2, generator=g), torch.randn(64, 2, generator=g)

    def turned(node: Any, x: fx.Node, y: fx.Node, conj: Any) -> fx.Node:
        a, b = (node(aten.view_as_complex.default, t) for t in (x, y))
        return node(aten.view_as_real.default, node(aten.mul.Tensor, a, node(conj, b)))

    for conj in (aten._conj_physical.default, aten.conj_physical.default):
        found, term, _ = _read(lambda node, x, y, c=conj: turned(node, x, y, c), x, y)
        assert term.op == "cat" and term.args[1] == (1, 1)
        a, b = torch.view_as_complex(x).to(torch.complex128), torch.view_as_complex(y)
        torch.testing.assert_close(
            found.double(), torch.view_as_real(a * b.conj()), rtol=1e-6, atol=1e-6
        )
        signs = [sorted(t.op for t in part.args) for part in term.args[2:]]
        assert signs == [["mul", "mul"], ["mul", "neg"]]


def test_powers_of_two():
    """2 ** x is another function of the maths library than exp2: a rounding step apart at most."""
    x = torch.cat((torch.arange(-160.0, 140.0), _numbers(FP32)))
    found, meant, term = _sides(lambda node, x: node(aten.pow.Scalar, 2, x), x)
    assert term.op == "exp2"
    whole = x == x.floor()
    same_bits(found[whole], meant[whole])
    least = 2.0**-149  # of the subnormals
    torch.testing.assert_close(found, meant, rtol=2.0**-23, atol=least, equal_nan=True)


# ---- interning, and rules on top of rules -------------------------------------------------------


@pytest.mark.parametrize("op", sorted(COMMUTATIVE))
@pytest.mark.parametrize("dtype", FLOATS)
def test_commuted_operands_are_equal(op, dtype):
    """Bit for bit; but a minimum or maximum of two zeros may be the other one."""
    known = specials(dtype)
    x, y = known.repeat_interleave(len(known)), known.repeat(len(known))
    a, b = (OPS.get(op) or getattr(torch, op))(x, y), (OPS.get(op) or getattr(torch, op))(y, x)
    if op in ("minimum", "maximum"):
        zeros = (x == 0) & (y == 0)
        assert (a[zeros] == 0).all() and (b[zeros] == 0).all()
        a, b = a[~zeros], b[~zeros]
    same_bits(a, b)


def test_numbers_are_one_term_only_where_they_are_one():
    make = Lowering().interner.const
    assert make(1.0) is make(1) is make(True) and make(0.0) is make(0) is make(False)
    assert make(0.0) is not make(-0.0) and make(float("nan")) is make(float("nan"))


@st.composite
def _expressions(draw: Any, depth: int = 4) -> Any:
    """(name, operands...) over two leaves; a number stands second, as in most graphs."""
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(["x", "y"]))
    below = _expressions(depth - 1)
    kind = draw(st.sampled_from(["unary", "number", "number", "two", "cast", "cast", "choice"]))
    number = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 10.0, -10.0, 0.1])
    if kind == "unary":
        return draw(st.sampled_from(["neg", "neg", "abs", "reciprocal"])), draw(below)
    if kind == "number":
        op = draw(st.sampled_from(["mul", "sub", "add", "minimum", "maximum"]))
        return op, draw(below), draw(number)
    if kind == "two":
        return draw(st.sampled_from(["mul", "sub", "add"])), draw(below), draw(below)
    if kind == "cast":
        return "cast", draw(below), draw(st.sampled_from([BF16, FP16, FP32, FP64]))
    return "where", draw(st.sampled_from(["gt", "lt"])), draw(below), draw(number), draw(number)


def _built(make: Any, const: Any, leaves: dict[str, Term], e: Any) -> Term:
    """An expression as PyTorch would compute it: tensors promote, numbers do not."""
    if isinstance(e, str):
        return leaves[e]
    op, *rest = e
    if op == "cast":
        return make("cast", (_built(make, const, leaves, rest[0]),), rest[1])
    if op == "where":
        test, below, bound, value = rest
        x = _built(make, const, leaves, below)
        above = make(test, (x, const(bound)), torch.bool)
        return make("where", (above, const(value), x), x.dtype)
    args = [const(a) if isinstance(a, float) else _built(make, const, leaves, a) for a in rest]
    dtypes = [a.dtype for a in args if a.op != "const"]
    dtype = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)
    wide = [a if a.op == "const" or a.dtype is dtype else make("cast", (a,), dtype) for a in args]
    return make(op, tuple(wide), dtype)


@given(_expressions(), st.sampled_from([BF16, FP16, FP32]), st.sampled_from([BF16, FP16, FP32]))
def test_the_normal_form_of_an_expression_computes_the_same_bits(e, d, f):
    low = Lowering()
    make, const = low.interner.make, low.interner.const
    leaves = {n: make("load", (n, None), t) for n, t in (("x", d), ("y", f))}
    plain, normal = (_built(m, const, leaves, e) for m in (make, low.make))
    a, b = specials(d), specials(f)
    env = {leaves["x"]: a.repeat_interleave(len(b)), leaves["y"]: b.repeat(len(a))}
    assert plain.dtype == normal.dtype
    same_bits(evaluate(plain, env), evaluate(normal, env))
