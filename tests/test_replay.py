"""Times under CUDA graphs: as many calls as the GPU asks for."""

from __future__ import annotations

import time

import pytest
import torch

from dsv4fuse import replay


@pytest.mark.parametrize(
    "once, count, graphs, warm", [(2.0, 100, 3, 0.0), (40.0, 25, 1, 7.0), (5000.0, 1, 1, 7.0)]
)
def test_how_many_calls_a_graph_has(monkeypatch, once, count, graphs, warm):
    asked = []

    def of(calls, count, warm=0.0):
        asked.append((count, len(calls), warm))
        return [once + 3.0, once]

    monkeypatch.setattr(replay, "of", of)
    found = replay.times(
        lambda: None, span=1000.0, most=100, others=lambda: [lambda: None] * 2, warm=7.0
    )
    assert found == [once + 3.0, once] and asked == [(1, 1, 0.0), (count, graphs, warm)]


@pytest.mark.gpu
def test_each_graph_has_results_of_its_own():
    a, places = torch.zeros(1 << 20, device="cuda"), []
    found = replay.of([lambda: places.append((a + 1).data_ptr())] * 3, 4)
    assert len(found) == 9 and len(set(places[1:])) >= 3


@pytest.mark.gpu
def test_what_is_warm_does_not_count():
    a = torch.zeros(1 << 26, device="cuda")
    started = time.perf_counter()
    assert len(replay.of([lambda: a.add_(1)], 10, warm=0.2e6)) == 9
    assert time.perf_counter() - started > 0.2


@pytest.mark.gpu
def test_each_graph_is_replayed_as_often():
    a, b = (torch.zeros(4, device="cuda") for _ in range(2))
    found = replay.of([lambda: a.add_(1), lambda: b.add_(1)], 3)
    assert len(found) == 10 and torch.equal(a, b) and a[0] == 1 + 3 + 5 * 3


@pytest.mark.gpu
def test_the_host_does_not_count():
    """A call of two copies takes twice as long as one of one, however slowly it is launched."""
    a, b = (torch.empty(1 << 26, dtype=torch.int8, device="cuda") for _ in range(2))

    def copies(count):
        time.sleep(0.002)
        for _ in range(count):
            b.copy_(a)

    one, two = (min(replay.times(lambda n=n: copies(n), span=2e3, most=50)) for n in (1, 2))
    assert 10 < one < 200 and 1.6 < two / one < 2.4
