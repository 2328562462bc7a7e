"""Kernels compiled ahead: what the check launches is in Triton's cache, and nothing that happens to
the workers reaches the pass."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from dsv4fuse import compile_workers

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="nothing to compile"),
    pytest.mark.xdist_group("compiled ahead"),
]


def printed(script, folder, *args):
    """What a script beside this file prints, where kernels are not interpreted."""
    checkout = pathlib.Path(__file__).parents[1]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TORCHINDUCTOR_COMPILE_THREADS": "2", "PYTHONPATH": str(checkout)}
    env["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", f"tests.{script}", *args]
    done = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return printed("_ahead_script", tmp_path_factory.mktemp("triton"))


def test_the_check_compiles_nothing_anew(found):
    """By its own launches, with real tensors: the same specialisations, the same keys."""
    assert found["workers"] and found["described"] >= 2
    assert found["compiled"][0] == [] and found["left"] == 0
    assert found["hits"] == [True] * found["described"]


def test_what_this_process_has_compiled_is_not_described(found):
    assert found["known"] == 0


def test_the_pass_compiles_before_it_checks(found):
    statuses, hits = found["pass"]
    assert statuses == ["taken"] and hits == [[True, True]]


def test_the_launchers_of_inductors_launches_too(found):
    """For which what is 1 is a constant, whatever the kernel says of it."""
    ones, (alone, own, inductors) = found["launchers"]
    assert ones and alone == own and all(own[n] == "i32" for n in ones)
    assert inductors == own | dict.fromkeys(ones, "constexpr")


def test_a_kernel_has_one_key_whatever_had_one_before(tmp_path):
    """Triton's own hangs on the order: with these two 17 of 113 differ (triton 3.7.1)."""
    keys, others = (printed("_keys_script", tmp_path, seed) for seed in ("1", "2"))
    assert len(keys) > 100 and keys == others


def test_workers_that_die_and_workers_that_are_late(found):
    said, seconds = found["dead"]
    assert len(said) == found["described"] and all("terminated abruptly" in s for s in said)
    assert seconds < 60
    said, seconds = found["late"]
    assert said == ["no worker was free"] * found["described"] and seconds < 1


def test_what_does_not_compile_and_what_would_have_another_key(found):
    said, _ = found["wrong"]
    assert len(said) == 2 and "must be of type tl.constexpr" in said[0] and "another key" in said[1]


def test_without_workers(monkeypatch):
    """TORCHINDUCTOR_COMPILE_THREADS=1: nothing is described, nothing started."""
    from dsv4fuse import ahead

    monkeypatch.setattr(ahead, "kernels", lambda *_: pytest.fail("described"))
    assert compile_workers.start() is False
    ahead.Jobs([(0, None)], None).wait(0)


class Workers:
    """Take jobs, and end them when they are told to."""

    def __init__(self):
        self.jobs = {}

    def submit(self, job, kernel, folder):
        self.jobs[kernel.key] = Future()
        return self.jobs[kernel.key]


@pytest.fixture
def workers(monkeypatch):
    from dsv4fuse import ahead

    found = Workers()
    monkeypatch.setattr(compile_workers, "start", lambda: True)
    monkeypatch.setattr(compile_workers, "pool", lambda patience: found)
    monkeypatch.setattr(ahead, "kernels", lambda keys, _: [
        SimpleNamespace(key=k, name=k, on_disk=lambda: False) for k in keys()
    ])  # fmt: skip
    return found


def test_each_is_started_as_soon_as_it_is_known(workers):
    """But for the first, which might be the only one."""
    from dsv4fuse import ahead

    begun = []

    def launching(keys):
        return lambda: begun.append(list(workers.jobs)) or keys

    ahead.Jobs(enumerate(map(launching, ("a", "bc", "bd", "c"))), None)
    assert begun == [[], [], ["a", "b", "c"], ["a", "b", "c", "d"]]


def test_a_call_waits_for_its_own(workers, monkeypatch):
    from dsv4fuse import ahead

    monkeypatch.setattr(ahead, "PATIENCE", 60.0)
    jobs = ahead.Jobs([(k, lambda k=k: k) for k in ("ab", "bc")], None)
    for key in "ab":
        workers.jobs[key].set_result(None)
    started = time.perf_counter()
    jobs.wait("ab")
    jobs.wait("another")
    assert time.perf_counter() - started < 1
    jobs._late = 0.0
    jobs.wait("bc")  # c is late
    assert jobs._told == {"c"}
