"""``select="measure"``: the site itself decides, and what was measured is remembered."""

from __future__ import annotations

import pytest
import torch

import dsv4fuse
from dsv4fuse import cache, measure, select
from dsv4fuse.fusion import Sizes, registry

SIZES = Sizes(inter=128)


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "_known", {})
    monkeypatch.setattr(dsv4fuse.verify, "_verified", {})
    return tmp_path / "dsv4fuse"


def explained():
    made = registry()["clamp_swiglu_quant"].examples["plain"](3, SIZES, "cpu")
    with torch.no_grad():
        report = dsv4fuse.explain(made.fn, *made.inputs, options={"select": "measure"})
    (site,) = report.sites
    return site


def choose(monkeypatch, inductor: float, ours: float) -> list[object]:
    """The stopwatch replaced; what it was asked to time."""
    asked, answers = [], iter([inductor, ours])

    def stopwatch(fn, inputs):
        asked.append([t.clone() for t in inputs])
        fn(*inputs)  # both must run on the inputs given
        return next(answers)

    monkeypatch.setattr(measure, "_time", stopwatch)
    return asked


def test_the_faster_one_is_taken(monkeypatch):
    asked = choose(monkeypatch, 10.0, 2.5)
    site = explained()
    assert site.status == "taken" and "2.50 µs against Inductor's 10.00" in site.reason
    assert site.detail["µs"] == {"inductor": 10.0, "ours": 2.5, "measured": "here"}
    assert len(asked) == 2


def test_the_slower_one_is_declined(monkeypatch):
    choose(monkeypatch, 2.0, 2.05)
    site = explained()
    assert site.status == "declined" and "2.00 µs against 2.05 µs" in site.reason


def test_times_are_remembered_for_the_next_process(monkeypatch, store):
    asked = choose(monkeypatch, 10.0, 2.5)
    explained()
    assert len(list(store.glob("*.json"))) >= 1
    monkeypatch.setattr(measure, "_known", {})  # as a new process would have it
    torch._dynamo.reset()
    assert explained().status == "taken"
    assert len(asked) == 2, "nothing was measured again"


def test_what_cannot_be_measured_is_left_to_inductor(monkeypatch):
    def fails(fn, inputs):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(measure, "_time", fails)
    site = explained()
    assert site.status == "declined" and "out of registers" in site.reason


def padded(x, gone, also_read: bool):
    """SwiGLU behind a mask, as transformers' experts have it."""
    x = x.masked_fill(gone, 0.0)
    gate, up = x.chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)
    return (y, x) if also_read else y


@pytest.mark.parametrize("also_read", [False, True])
def test_what_inductor_would_inline_is_timed_with_the_site(monkeypatch, also_read):
    """The mask costs Inductor's kernel nothing, and the fused op a write and a read; not where the
    masked value is written anyway."""
    asked = choose(monkeypatch, 2.0, 3.0)
    x, gone = torch.randn(4, 256, dtype=torch.bfloat16), torch.tensor([[0], [1], [0], [1]]).bool()
    wanted = padded(x, gone, False)
    with torch.no_grad():
        report = dsv4fuse.explain(padded, x, gone, also_read, options={"select": "measure"})
    (site,) = report.sites
    assert site.status == "declined" and "3.00 µs" in site.reason
    assert [any(t.dtype == torch.bool for t in given) for given in asked] == [not also_read] * 2
    options = {"select": "always", "inner": "eager"}
    fused = torch.compile(padded, backend="dsv4fuse", options=options)
    with torch.no_grad():
        assert torch.equal(fused(x, gone, False), wanted)


def test_a_part_of_what_others_read_parts_of(monkeypatch):
    """The site's is drawn as a tensor, for the list of parts is not only its own."""

    def parts(x, gone):
        mine, other = x.sin().split(256, dim=-1)
        return padded(mine.cos(), gone, False), other.cos()

    asked = choose(monkeypatch, 3.0, 2.0)
    x, gone = torch.randn(4, 512, dtype=torch.bfloat16), torch.ones(4, 1, dtype=torch.bool)
    with torch.no_grad():
        report = dsv4fuse.explain(parts, x, gone, options={"select": "measure"})
    (site,) = report.sites
    assert site.status == "taken", site.reason
    assert [tuple(given[0].shape) for given in asked] == [(4, 256)] * 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"inductor": "fast", "ours": 1}', b"{}"])
def test_a_damaged_file_of_times_is_measured_again(store, content):
    cache.save_times("k", (1.0, 2.0))
    assert cache.load_times("k") == (1.0, 2.0)
    next(store.iterdir()).write_bytes(content)
    assert cache.load_times("k") is None


def test_a_tie_is_taken_and_two_percent_more_is_not():
    assert select.compare((1.0, 1.02)).take and not select.compare((1.0, 1.03)).take


@pytest.mark.slow
def test_inductor_is_really_timed():
    """With the real stopwatch on this machine: both times are there and positive."""
    site = explained()
    assert site.status in ("taken", "declined") and "µs" in site.reason


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_random_numbers():
    """What cannot be timed does not break what is compiled behind it: Inductor draws too."""
    with pytest.raises(RuntimeError):
        measure.replayed(torch.cuda.synchronize)
    assert torch.randn(8, device="cuda").isfinite().all()
