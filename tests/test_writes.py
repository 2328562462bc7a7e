"""What is read as rows written to a cache, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4fuse.writes import Place, Write, written

aten = torch.ops.aten
SLOTS, LANES, ROWS = 9, 16, 4


def found(put, *shapes: tuple[int, ...], dtype: torch.dtype = torch.int64) -> list[Write]:
    """The writes of a graph in which ``put(call, cache, slots, rows)`` goes home to the cache."""
    graph = fx.Graph()
    with FakeTensorMode():
        values = [torch.empty(SLOTS, LANES), torch.empty(shapes[0], dtype=dtype),
                  torch.empty(shapes[1])]  # fmt: skip
        inputs = [graph.placeholder(n) for n in ("cache", "slots", "rows")]
        for node, value in zip(inputs, values, strict=True):
            node.meta["val"] = value

        def call(target, *args, **kwargs) -> fx.Node:
            node = graph.call_function(target, args, kwargs)
            real = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*real[0], **real[1])
            return node

        call(aten.copy_.default, inputs[0], put(call, *inputs))
    return list(written(graph))


def index_put(call, cache, slots, rows, *more):
    return call(aten.index_put.default, cache, [slots], rows, *more)


def test_rows_by_an_index():
    (write,) = found(index_put, (ROWS,), (ROWS, LANES))
    (place,) = write.places
    assert place == Place(index=place.index, axes=(0,)) and place.index.name == "slots"
    assert write.cache.name == "cache" and write.value.name == "rows"


NONE = {
    "one number for all lanes": (index_put, (ROWS,), (ROWS, 1), torch.int64),
    "one number for everything": (index_put, (ROWS,), (), torch.int64),
    "added": (lambda *a: index_put(*a, True), (ROWS,), (ROWS, LANES), torch.int64),
    "one row for all slots": (index_put, (ROWS,), (LANES,), torch.int64),
    "a choice of rows, not their numbers": (index_put, (SLOTS,), (1, LANES), torch.bool),
    "every second row": (
        lambda call, cache, _, rows: call(aten.slice_scatter.default, cache, rows, 0, 0, 8, 2),
        (1,), (4, LANES), torch.int64,
    ),
    "lanes": (
        lambda call, cache, _, rows: call(aten.slice_scatter.default, cache, rows, 1, 0, 4),
        (1,), (SLOTS, 4), torch.int64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_none(name):
    put, *shapes, dtype = NONE[name]
    assert not found(put, *shapes, dtype=dtype)
