"""What breaks inside or around the pass: the model runs, unfused where need be, and it is said."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import types

import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import clamp_swiglu_quant as swiglu
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4fuse import Report, backend, cache, pipeline, plans, rewrite, select, verify
from dsv4fuse.front import in_front
from dsv4fuse.fusion import Candidate, Sizes, registry
from dsv4fuse.options import Options

NAME = "clamp_swiglu_quant"
TAKE = {"select": "always", "inner": "eager"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(verify, "_verified", {})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.delenv("DSV4FUSE_DEBUG")


def made():
    torch.manual_seed(0)
    return registry()[NAME].examples["plain"](5, Sizes(inter=64), "cpu")


@torch.no_grad()
def compiled(**options) -> Report:
    """The report of an example that was run, and gave what eager gives."""
    torch._dynamo.reset()
    example = made()
    fused = torch.compile(example.fn, backend=backend.dsv4fuse, options=TAKE | options)
    (x,) = example.inputs
    assert torch.equal(fused(x), example.fn(x))
    holder = torch.nn.Module()
    holder.register_buffer("x", x)
    return Report.of(holder)


def raising(error):
    def broken(*args, **kwargs):
        raise error

    return broken


# ---- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("PassManager::run failed\nlong dump"), OSError("ptxas: not found"),
              AssertionError()],
)  # fmt: skip
def test_a_kernel_that_does_not_compile(monkeypatch, error):
    """Its site stays as it was; the sentence holds the compiler's first line."""
    monkeypatch.setattr(swiglu, "reference", raising(error))
    (site,) = compiled().sites
    assert site.status == "rejected" and verify.said(error) in site.reason
    assert "could not be run" in site.reason and "dump" not in site.reason


def test_a_kernel_module_that_does_not_load(monkeypatch):
    missing = raising(ImportError("libcuda.so.1: no such file"))
    monkeypatch.setattr(plans, "importlib", types.SimpleNamespace(import_module=missing))
    (site,) = compiled().sites
    assert site.status == "declined" and "libcuda.so.1" in site.reason


@pytest.mark.parametrize("where", ["draw", "kernel", "compare"])
def test_out_of_memory_in_the_check(monkeypatch, where):
    """Nothing is taken without its check; and the next graph is checked anew."""
    error = raising(torch.OutOfMemoryError("CUDA out of memory."))
    with monkeypatch.context() as patch:
        if where == "draw":
            patch.setattr(verify.samples, "draw", error)
        elif where == "kernel":
            patch.setattr(swiglu, "reference", error)
        else:
            patch.setattr(verify, "_steps", error)
        (site,) = compiled().sites
        assert site.status == "rejected" and "not enough memory" in site.reason
    assert compiled().counts() == {NAME: 1}


# ---- the pass itself --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["find", "near misses", "plan", "apply"])
def test_an_error_inside_the_pass(monkeypatch, where, caplog):
    """The graph goes on as it was: also where a part of the new one was there already."""
    error = raising(ZeroDivisionError("a bug"))
    if where == "find":
        monkeypatch.setattr(pipeline.chaining, "chained", error)
    elif where == "near misses":
        monkeypatch.setattr(pipeline, "near_misses", error)
    elif where == "plan":
        monkeypatch.setattr(plans.calls, "graph", error)
    else:
        monkeypatch.setattr(rewrite, "_moved_behind", error)
    report = compiled()
    assert not report.counts() and any("a bug" in note for note in report.notes)
    assert "a bug" in caplog.text
    monkeypatch.setenv("DSV4FUSE_DEBUG", "1")
    with pytest.raises(Exception, match="a bug"):
        compiled()


def test_another_thread_compiles_meanwhile():
    """Its report is its own, and is checked: an explain here takes nothing of it."""
    inside, done = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def other():
        inside.wait(60)
        try:
            compiled(expect={NAME: 7})
        except Exception as error:
            failed.append(error)
        finally:
            done.set()

    def paused(x):
        return x * 2

    thread = threading.Thread(target=other)
    thread.start()
    with backend.collecting(collected := Report()):
        inside.set()
        assert done.wait(120)
        torch.compile(paused, backend=backend.dsv4fuse, options=TAKE)(torch.ones(3))
    thread.join()
    assert "Expected 7 sites" in str(failed[0])
    assert collected.graphs == 1 and not collected.sites


# ---- machines ---------------------------------------------------------------------------------


def on_gpu(width: int = 128, **changes) -> Candidate:
    """A candidate on a GPU that is not there, of a fusion with measurements."""
    with FakeTensorMode():
        value = torch.empty(4, width, dtype=torch.bfloat16, device="cuda")
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = value
    return Candidate(NAME, node, (node,), lambda x: (x,), (node,), variant="plain", tokens=4,
                     **changes)  # fmt: skip


@pytest.mark.parametrize("capability", [(7, 0), (12, 9), (99, 0)])
def test_a_gpu_that_nothing_was_measured_on(monkeypatch, capability):
    """Its sites are timed on the spot, not taken by another GPU's table."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert select.measured(NAME)["capability"] != list(capability)
    assert select.decide(on_gpu(), Options()).take is None
    assert select.decide(on_gpu(), Options(select="always")).take
    known = tuple(select.measured(NAME)["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: known)
    assert select.decide(on_gpu(Sizes().inter), Options()).take is not None


@pytest.mark.parametrize("ours, take", [(6.9, True), (7.1, None), (10.1, None), (11.0, None)])
def test_a_varied_site_is_timed_unless_its_table_is_clear(monkeypatch, ours, take):
    """Its time hangs on more than tokens, or on what is in front of it: a table near to Inductor's
    time settles nothing."""
    known = tuple(select.measured(NAME)["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: known)
    row = {"variant": "plain", "tokens": 4, "inductor": 10.0, "ours": ours}
    data = {"capability": list(known), "gpu": "", "date": "", "rows": [row]}
    monkeypatch.setattr(select, "measured", lambda fusion: data)
    assert select.decide(on_gpu(), Options()).take is (ours < 10.0)
    site = on_gpu()
    assert select.decide(site, Options(), front=[site.root]).take is take
    varied = dataclasses.replace(registry()[NAME], varied=True)
    monkeypatch.setattr(select, "registry", lambda: {NAME: varied})
    assert select.decide(on_gpu(), Options()).take is take


@pytest.mark.parametrize("floor, repeated, take", [
    (None, False, None), (5.0, False, None), (6.0, False, False), (6.0, True, None),
])  # fmt: skip
def test_a_front_that_takes_more_than_is_won(monkeypatch, floor, repeated, take):
    """Read and written by kernels of its own it takes another floor: nobody need time that. Of a
    wide tensor it reads no more than it computes (half a floor), of a repeated row the row."""
    known = tuple(select.measured(NAME)["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: known)
    row = {"variant": "plain", "tokens": 4, "inductor": 10.0, "ours": 9.0, "floor": floor}
    data = {"capability": list(known), "gpu": "", "date": "", "rows": [row]}
    monkeypatch.setattr(select, "measured", lambda fusion: data)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    shows = (torch.ops.aten.expand.default, (x, [4, 128])) if repeated else (
        torch.ops.aten.slice.Tensor, (x, 1, 0, 128))  # fmt: skip
    part = graph.call_function(*shows)
    front = graph.call_function(torch.ops.aten.relu.default, (part,))
    root = graph.call_function(torch.ops.aten.exp.default, (front,))
    with FakeTensorMode():
        wide = (1, 128) if repeated else (4, 4096)
        for node, shape in ((x, wide), (part, (4, 128)), (front, (4, 128)), (root, (4, 128))):
            node.meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    site = Candidate(NAME, root, (front,), lambda x: (x.exp(),), (root,), variant="plain", tokens=4)
    found = in_front(site, [root])
    assert found == [part, front]
    assert select.decide(site, Options(), found).take is take


@pytest.mark.parametrize("bytes_, took", [(256.0, "flash"), (900.0, "tp8"), (64.0, None)])
def test_a_table_speaks_for_sizes_like_its_own(monkeypatch, bytes_, took):
    """256 bytes of results for a token; other sizes are timed unless the table is clear."""
    known = tuple(select.measured(NAME)["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: known)
    row = {"variant": "plain", "tokens": 4, "inductor": 10.0}
    rows = [
        row | {"model": "flash", "result_bytes": bytes_, "ours": 9.0},
        row | {"model": "tp8", "result_bytes": 256.0 if took == "tp8" else 9999.0, "ours": 8.0},
    ]
    data = {"capability": list(known), "gpu": "", "date": "", "rows": rows}
    monkeypatch.setattr(select, "measured", lambda fusion: data)
    verdict = select.decide(on_gpu(), Options())
    assert verdict.take is (True if took else None)
    if took:
        assert verdict.times["ours"] == (9.0 if took == "flash" else 8.0)
    rows[0]["ours"] = 6.0
    assert select.decide(on_gpu(), Options()).take


def test_a_gpu_without_fp8_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(ValueError, match=r"needs compute capability 8\.9, this GPU has \(8, 0\)"):
        common.require_fp8(torch.device("cuda"))


# ---- files ------------------------------------------------------------------------------------

TIMES = [b"", b"{", b"[]", b"null", b'{"inductor": 1}', b'{"inductor": NaN, "ours": 1.0}',
         b'{"inductor": 1.0, "ours": -1.0}', b'{"inductor": 0, "ours": 0}',
         b'{"inductor": "x", "ours": 1}', b'{"inductor": null, "ours": 1}',
         b'{"inductor": 1e999, "ours": 1}', b"\x80\x04N."]  # fmt: skip


@pytest.mark.parametrize("content", TIMES)
def test_damaged_times_are_none(tmp_path, content):
    """Not even ones that compare as the faster."""
    cache.save_times("k", (2.0, 1.0))
    (file,) = (tmp_path / "dsv4fuse").iterdir()
    assert cache.load_times("k") == (2.0, 1.0)
    file.write_bytes(content)
    assert cache.load_times("k") is None


REPORTS = [
    {"sites": 3}, {"sites": [3]}, {"sites": [{"fusion": "f"}]}, {"breaks": [{"x": 1}]},
    {"sites": [{"fusion": "f", "status": "wrong"}]}, {"graphs": "many"}, {"notes": 3},
    {"graphs": None}, {"seconds": []}, {"format": 2},
]  # fmt: skip


@pytest.mark.parametrize("change", REPORTS, ids=str)
def test_reports_of_another_form_are_none(tmp_path, change):
    cache.save_report("k", Report(graphs=1))
    (file,) = (tmp_path / "dsv4fuse").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert cache.load_report("k") is None


KILLED = """
import os, signal, sys
from dsv4fuse import cache
from dsv4fuse.report import Report
cache.save_report("k", Report(graphs=1, notes=["old"]))
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "write":
    class Out:
        def __init__(self, handle, *_, **__): self.handle = handle
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def write(self, text): os.write(self.handle, text[:20].encode()); die()
    cache.os.fdopen = Out
else:
    cache.os.replace = die
cache.save_report("k", Report(graphs=1, notes=["new"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize("when", ["write", "rename"])
def test_killed_in_the_middle_of_a_write(tmp_path, checkout, when):
    """The old report is whole, and the next process writes over it."""
    env = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-c", KILLED, when], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "dsv4fuse").iterdir())) == 2, "it died too early or too late"
    assert cache.load_report("k").notes == ["old"]
    cache.save_report("k", Report(graphs=1, notes=["newer"]))
    assert cache.load_report("k").notes == ["newer"]


@pytest.mark.parametrize("way", ["a file", "read-only", "full"])
def test_no_place_for_reports(monkeypatch, tmp_path, way):
    """The model runs fused; the report in this process is whole."""
    if way == "a file":
        (tmp_path / "dsv4fuse").write_text("")
    else:
        number = 13 if way == "read-only" else 28
        monkeypatch.setattr(cache.tempfile, "mkstemp", raising(OSError(number, way)))
    assert compiled().counts() == {NAME: 1}


def test_a_corrupt_report_is_written_anew(tmp_path):
    compiled()
    files = list((tmp_path / "dsv4fuse").glob("*.json"))
    assert len(files) == 1
    files[0].write_bytes(b"\x80\x04garbage")
    assert compiled().counts() == {NAME: 1}
    assert Report.from_json(files[0].read_bytes()).counts() == {NAME: 1}


def test_without_a_bug_it_is_taken():
    """So that none of the above passes by never matching."""
    assert compiled().counts() == {NAME: 1}
