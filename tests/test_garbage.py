"""Python's collector of cycles is as it was when a pass is over."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import fx

from dsv4fuse import garbage, pipeline
from dsv4fuse.options import Options


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_what_is_alive_is_passed_by_and_cycles_are_collected():
    assert gc.get_freeze_count() < garbage.FEW
    with garbage.passed_by():
        assert (before := gc.get_freeze_count()) > 1000
        with garbage.growing():
            assert not gc.isenabled()
            kept = [Cycle() for _ in range(100)]
        assert gc.isenabled() and gc.get_freeze_count() >= before + len(kept)
        inside = weakref.ref(Cycle())
        gc.collect()
        assert inside() is None
    assert gc.get_freeze_count() == 0


def test_the_few_that_python_starts_with(monkeypatch):
    count = gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)
    with garbage.passed_by():
        assert count() > 10 * garbage.FEW
    assert count() == 0


def test_it_is_as_before_behind_an_error():
    with pytest.raises(ZeroDivisionError), garbage.passed_by(), garbage.growing():
        raise ZeroDivisionError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_so():
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with garbage.passed_by(), garbage.growing():
            kept = [Cycle() for _ in range(100)]
        assert count - 100 < gc.get_freeze_count() < count + len(kept)  # some of it has died
    finally:
        gc.unfreeze()


def test_a_collector_that_is_off_stays_off():
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch.empty(3)
    graph.output(node)
    gc.disable()
    try:
        pipeline.run(graph, Options())
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_inside_another_one_of_ours():
    """A pass in a compilation: what it makes is passed by until that ends."""
    with garbage.passed_by():
        with garbage.passed_by(), garbage.growing():
            kept = [Cycle() for _ in range(100)]
        assert gc.get_freeze_count() > 1000 + len(kept)
    assert gc.get_freeze_count() == 0
