"""The kernels compile for GPUs that are not here: at the models' sizes, within what one has."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from dsv4fuse.kernels import _common as common

from dsv4fuse.bench import kernels as built
from dsv4fuse.fusion import has_kernel, registry

# Spills of a few registers: bytes of stack of a thread that a kernel may have.
SPILLED = {"attention_kernel": 16, "indexer_logits_kernel": 56}
PRO = {"pro": {"attention_kernel": 24}, "pro-tp8": {"attention_kernel": 120}}  # for 64 queries


def compiled(path, *arguments):
    """In a process of its own: here kernels may be interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dsv4fuse", "kernels", *arguments, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return done, json.loads(path.read_text())["launches"] if path.exists() else []


NAMES = sorted(f.name for f in registry().values() if f.examples and has_kernel(f.name))


def checked(path, names, *arguments, model="flash"):
    done, found = compiled(path, *names, *arguments, "--model", model)
    spilled = SPILLED | PRO.get(model, {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["fusion"] for row in found} == set(names)
    for row in found:
        b = row["built"]
        assert 16 <= b["registers"] <= 255 and b["warps"] in (1, 2, 4, 8), row
        assert b["stack"] <= spilled.get(b["kernel"], 0), row


@pytest.mark.parametrize("half", [0, 1])  # beside each other
def test_every_kernel_for_an_h200(tmp_path, half):
    checked(tmp_path / "found.json", NAMES[half::2], "--tokens", "1,2048")


@pytest.mark.long
@pytest.mark.parametrize("model", ["flash", "pro", "pro-tp8"])
def test_every_kernel_at_every_size(tmp_path, model):
    counts = "1,16,64,256,1024,8192"
    checked(tmp_path / "found.json", NAMES, "--tokens", counts, model=model)


def test_a_kernel_that_does_not_fit():
    launch = built.Launch("f", "v", 3, built.Built("k", 4, 32, 0, 240 << 10, 0.1))
    broken = built.Launch("f", "w", 3, built.Built("k", error="no such instruction"))
    assert built.wrong([launch, broken], 90) == [
        f"f (v) at 3 tokens: k takes {240 << 10} of {227 << 10} bytes.",
        "f (w) at 3 tokens: k: no such instruction",
    ]
    assert built.wrong([launch], 999) == []  # a GPU whose limit is not known


@pytest.mark.skipif(not common.INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), built.describing():
        pass


def test_bad_arguments(tmp_path):
    done, _ = compiled(tmp_path / "none.json", "nothing")
    assert done.returncode == 2 and "nothing" in done.stderr
