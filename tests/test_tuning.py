"""``autotune``: each launch shape of a kernel's table is tried on the site, the fastest is used."""

from __future__ import annotations

import functools

import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import clamp_swiglu_quant as swiglu
from dsv4fuse.kernels._common import Config

from dsv4fuse import Report, backend, tuning, verify
from dsv4fuse.fusion import Sizes, registry

TABLE = ((4, Config(1, 1, 128)), (8, Config(2, 1, 128)), (None, Config(1, 2, 128)))
OPTIONS = {"select": "always", "inner": "eager", "autotune": True}


@pytest.fixture
def timed(monkeypatch):
    """A stopwatch: µs by what is launched; and what was launched last, and with what."""
    launched, spent = [], {}
    monkeypatch.setattr(swiglu, "CONFIGS", TABLE)
    choose = common.launch_config

    def chosen(table, tokens):
        launched.append(choose(table, tokens))
        return launched[-1]

    def replayed(call):
        call()
        found = spent[launched[-1]]
        if found is None:
            raise RuntimeError("out of resources")
        return found

    monkeypatch.setattr(common, "launch_config", chosen)
    monkeypatch.setattr(tuning.measure, "replayed", replayed)
    monkeypatch.setattr(tuning, "_on_gpu", lambda candidate: True)
    tuning.forget()
    verify.forget()
    return launched, spent


def fused(**changes):
    made = registry()["clamp_swiglu_quant"].examples["plain"](3, Sizes(inter=128), "cpu")
    holder = torch.nn.Module()
    holder.register_buffer("x", made.inputs[0])
    torch._dynamo.reset()
    run = torch.compile(made.fn, backend=backend.dsv4fuse, options=OPTIONS | changes)
    with torch.no_grad():
        assert torch.equal(run(holder.x), made.fn(holder.x))
    (site,) = Report.of(holder).sites
    return site


@pytest.mark.skipif(not common.INTERPRETED, reason="on a CPU nothing is launched")
@pytest.mark.parametrize("times, best", [
    ((3.0, 2.0, 1.0), 2), ((3.0, 2.0, None), 1), ((1.0, 1.0, 1.0), 0),
])  # fmt: skip
def test_the_fastest_shape_is_used(timed, times, best):
    """Of the three of the table; one does not launch; of equals the table's own."""
    launched, spent = timed
    spent.update({shape: us for (_, shape), us in zip(TABLE, times, strict=True)})
    site = fused()
    checked = launched[-2]  # on a CPU the last call is of the op itself, by its table
    assert site.status == "taken" and checked == TABLE[best][1]
    assert (f"Launched here with {TABLE[best][1]}." in site.reason) is (best > 0)
    tried = len(launched)
    fused()  # known by now, and checked
    assert len(launched) == tried + 1


@pytest.mark.skipif(not common.INTERPRETED, reason="on a CPU nothing is launched")
def test_a_shape_is_checked_though_the_site_was(timed):
    """A site that was checked with the table's shape is checked again with another."""
    launched, spent = timed
    spent.update({shape: us for (_, shape), us in zip(TABLE, (3.0, 1.0, 2.0), strict=True)})
    fused(autotune=False)
    fused()
    assert launched[-2] == TABLE[1][1]


def test_it_is_asked_for(timed, monkeypatch):
    monkeypatch.setattr(tuning, "tuned", lambda *_: pytest.fail("nobody asked"))
    fused(autotune=False)


def test_max_autotune_is_a_mode(timed, monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "tuned", lambda candidate, _: asked.append(candidate) or candidate)
    made = registry()["clamp_swiglu_quant"].examples["plain"](3, Sizes(inter=128), "cpu")
    options = {"select": "always", "inner": "eager"}
    for mode in (None, "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        compiler = functools.partial(backend.dsv4fuse, options=options, mode=mode)
        with torch.no_grad():
            torch.compile(made.fn, backend=compiler)(*made.inputs)
        assert bool(asked) is (mode is not None)


@pytest.mark.gpu
def test_on_a_gpu():
    made = registry()["clamp_swiglu_quant"].examples["quant"](300, Sizes(), "cuda")
    options = {"autotune": True, "expect": {"clamp_swiglu_quant": 1}, "select": "always"}
    run = torch.compile(made.fn, backend=backend.dsv4fuse, options=options)
    with torch.no_grad():
        for found, wanted in zip(run(*made.inputs), made.fn(*made.inputs), strict=True):
            assert torch.equal(found.float(), wanted.float())
