"""Which nodes a value is made of: not what it was written over as a whole."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dsv4fuse import atoms, recorded
from dsv4fuse.scene import Scene
from dsv4fuse.specs import RMS_NORM

aten = torch.ops.aten
# base, x → a tensor that x + 1 is written to, and whether nothing is left of what it was
WRITES = {
    "the only one": (lambda b, x: aten.select_scatter(b, x + 1, 1, 0), (2, 1, 8, 4), True),
    "all rows": (lambda b, x: aten.slice_scatter(b, x + 1, 1, 0, 8), (2, 8, 4), True),
    "one of two": (lambda b, x: aten.select_scatter(b, x + 1, 1, 0), (2, 2, 8, 4), False),
    "some rows": (lambda b, x: aten.slice_scatter(b, x + 1, 1, 0, 8), (2, 9, 4), False),
    "every second row": (lambda b, x: aten.slice_scatter(b, x + 1, 1, 0, 16, 2), (2, 16, 4), False),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_over_as_a_whole(name):
    write, shape, whole = WRITES[name]
    made = make_fx(lambda b, x: write(b * 2, x), tracing_mode="fake")
    graph = made(torch.zeros(shape), torch.zeros(2, 8, 4)).graph
    (before,) = (n for n in graph.nodes if n.target is aten.mul.Tensor)
    (value,) = (n for n in graph.nodes if n.target is aten.add.Tensor)
    (written,) = (n for n in graph.nodes if "scatter" in str(n.target))
    assert (before not in Scene(graph).region(written, [value])) == whole


def test_a_value_that_is_repeated_otherwise_elsewhere():
    """Seven times and three times the same rows: a norm of the three reads the three."""

    def fn(x, w):
        more, less = (x.expand(n, 5, 64) * 2 for n in (7, 3))
        return more, atoms.rms_norm(less, w, eps=1e-6, rounding="once")

    shapes = [((5, 64), torch.bfloat16), ((64,), torch.float32)]
    scene = Scene(recorded.graph(fn, shapes))
    (hit,) = scene.outermost(RMS_NORM)
    assert hit.node.meta["val"].shape == hit.x.node.meta["val"].shape == (3, 5, 64)
    assert hit.x.rows == (0, 1)


def test_no_place_where_an_input_is_made_of_a_result():
    """One op for ``a`` and ``c``, which would read what is made of its own ``a``."""
    graph = recorded.graph(lambda x: ((x * 2).exp() + 1) * x, [((5, 4), torch.float32)])
    scene = Scene(graph)
    x, a, between, _, c = (n for n in graph.nodes if n.op != "output")
    assert scene.placeable([x], [a, c])
    assert not scene.placeable([x, between], [a, c])
    assert not scene.placeable([x, a], [a, c])
