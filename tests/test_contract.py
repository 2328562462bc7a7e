"""A matrix product is read the same however it was spelled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dsv4fuse.patterns import hyper_connection_post

from dsv4fuse import recorded
from dsv4fuse.contract import Contraction, contraction
from dsv4fuse.scene import Scene


def _read(fn, *shapes) -> tuple[Contraction, list[str]]:
    graph = recorded.graph(fn, [(s, torch.float32) for s in shapes])
    (output,) = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    found = contraction(Scene(graph), output)
    assert found is not None
    return found, [n.name for n in graph.nodes if n.op == "placeholder"]


def _axes(found: Contraction, names: list[str]) -> list[object]:
    """Per factor: which input it is, and its axes by the output's."""
    factors = (found.left, found.right)
    return [next((names.index(n.name), a) for n, a in f.whole() if n.name in names)
            for f in factors]  # fmt: skip


GROUPED = [
    lambda o, w: torch.einsum("bsgd,grd->bsgr", o, w),
    lambda o, w: (o.unsqueeze(-2) @ w.transpose(1, 2)).squeeze(-2),
    lambda o, w: torch.bmm(
        o.reshape(-1, 4, 8).transpose(0, 1), w.transpose(1, 2)
    ).transpose(0, 1).reshape(2, 3, 4, 5),
    lambda o, w: torch.matmul(
        o.permute(2, 0, 1, 3), w.transpose(1, 2).unsqueeze(1)
    ).permute(1, 2, 0, 3),
    lambda o, w: (o.unsqueeze(-2) * w).sum(-1),
]  # fmt: skip


@pytest.mark.parametrize("fn", GROUPED)
def test_grouped_projection(fn):
    found, names = _read(fn, (2, 3, 4, 8), (4, 5, 8))
    assert found.size == 8 and found.summed == 4
    assert sorted(_axes(found, names)) == [(0, (0, 1, 2, 4)), (1, (2, 3, 4))]


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k: torch.einsum("bshd,btd->bsht", q, k),
        lambda q, k: torch.matmul(q, k.transpose(-1, -2).unsqueeze(1)),
        lambda q, k: torch.matmul(q.flatten(1, 2), k.mT).unflatten(1, (3, 4)),
        lambda q, k: torch.matmul(q.transpose(1, 2), k.unsqueeze(1).mT).transpose(1, 2),
    ],
)
def test_many_heads_on_the_same_keys(fn):
    found, names = _read(fn, (2, 3, 4, 8), (2, 7, 8))
    assert not found.rounded
    assert sorted(_axes(found, names)) == [(0, (0, 1, 2, 4)), (1, (0, 3, 4))]


def test_a_linear_layer_is_read_in_the_coordinates_of_the_view_asked_for():
    found, names = _read(lambda x, w: F.linear(x, w), (2, 3, 8), (5, 8))
    assert _axes(found, names) == [(0, (0, 1, 3)), (1, (2, 3))]


def test_a_summed_axis_made_of_two():
    """Heads merged into the lanes of a group: the map says how the sum runs through them."""
    found, names = _read(
        lambda o, w: torch.einsum("tgd,grd->tgr", o.reshape(3, 2, 16), w), (3, 4, 8), (2, 5, 16)
    )
    o = next(n for n, _ in found.left.places if n.name == names[0])
    tokens, heads, lanes = found.left.at(o)
    assert tokens.whole() == 0
    assert [(s, d.coord, d.div, d.size) for s, d in heads.terms] == [(2, 1, 1, 2), (1, 3, 8, 2)]
    assert [(s, d.coord, d.div, d.size) for s, d in lanes.terms] == [(1, 3, 1, 8)]


def test_what_is_no_product():
    for fn in (lambda a, b: a + b, lambda a, b: (a + b).sum(-1), lambda a, b: (2.0 * a).sum(-1)):
        graph = recorded.graph(fn, [((3, 4), torch.float32)] * 2)
        (output,) = next(n for n in graph.nodes if n.op == "output").all_input_nodes
        assert contraction(Scene(graph), output) is None


def test_a_promotion_that_no_node_shows():
    """bf16 dots times fp32 weights: the widened factor is a term, held by no node."""
    graph = recorded.graph(
        lambda x, w: (x.relu() * w).sum(1),
        [((3, 4, 5), torch.bfloat16), ((3, 4, 1), torch.float32)],
    )
    (output,) = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    found = contraction(Scene(graph), output)
    assert found is not None and found.rounded
    widened = next(f for f in (found.left, found.right) if f.term.op == "maximum")
    assert widened.term.dtype == torch.float32 and not widened.places


def test_a_leaf_is_read_whole():
    """A quantiser behind a value made of pieces: one term behind the leaf, pieces without."""
    graph = recorded.graph(
        lambda x, y: torch.cat((x, y), -1).float() * 2.0, [((3, 4), torch.bfloat16)] * 2
    )
    (output,) = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    joined = next(n for n in graph.nodes if n.target is torch.ops.aten.cat.default)
    assert Scene(graph).low.term(output).op == "cat"
    behind = Scene(graph, [joined]).low
    assert behind.term(output).op == "mul" and behind.term(joined).op == "load"
def test_a_promotion_in_the_product():
    """fp32 weights on bf16 streams: the cast is no node, and a factor all the same."""
    fn = lambda w, x: (w.unsqueeze(-1) * x).sum(1)  # noqa: E731
    graph = recorded.graph(fn, [((3, 4), torch.float32), ((3, 4, 8), torch.bfloat16)])
    (output,) = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    found = contraction(Scene(graph), output)
    assert found is not None and found.rounded and found.size == 4
    factors = [t for t in (found.left.term, found.right.term) if t.op == "cast"]
    assert [t.args[0].dtype for t in factors] == [torch.bfloat16]


def test_residual_streams_of_many_layers():
    """Written as sums, they are one term through all layers: reading it must not recurse."""

    def layers(x, post, comb):
        for _ in range(120):
            out = x[:, 0] * 2
            mixed = (comb.unsqueeze(-1) * x.unsqueeze(-2)).sum(1)
            x = (post.unsqueeze(-1) * out.unsqueeze(-2) + mixed).to(x.dtype)
        return x

    shapes = [((3, 4, 8), torch.bfloat16), ((3, 4), torch.float32), ((3, 4, 4), torch.float32)]
    scene = Scene(recorded.graph(layers, shapes))
    assert all(scene.low.term(n) for n in reversed(scene.nodes))
    assert len(hyper_connection_post.find(scene, "faithful")) == 120


def _joins(fn, *shapes):
    """The contraction at the last node of a graph in which all were looked for."""
    scene = Scene(recorded.graph(fn, [(s, torch.float32) for s in shapes]))
    return [contraction(scene, node) for node in scene.nodes][-1]


def test_a_factor_that_is_held_with_more_axes_elsewhere():
    """The same value, repeated along two axes that the product does not have."""

    def fn(a, b):
        return a[..., None, None].expand(3, 4, 2, 5).exp(), (a.exp() * b).sum(-1)

    found = _joins(fn, (3, 4), (3, 4))
    assert found is not None
    held = [n.meta["val"].shape for f in (found.left, found.right) for n, _ in f.places]
    assert held and all(s == (3, 4) for s in held)


def test_a_factor_that_is_repeated_otherwise_elsewhere():
    """The same value, repeated seven times in one product and twice in another."""

    def fn(a, b, c):
        more, less = (a.expand(n, 3, 4).exp() for n in (7, 2))
        return torch.bmm(more, b), torch.bmm(less, c)

    found = _joins(fn, (3, 4), (7, 4, 5), (2, 4, 5))
    assert found is not None
    held = [n.meta["val"].shape for n, _ in found.left.whole()]
    assert held and all(s == (2, 3, 4) for s in held)
