"""AOTInductor packages: fused, and free of dsv4fuse where they run."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import pytest
from dsv4fuse.kernels import _common
from torch._inductor.virtualized import V

import dsv4fuse
from dsv4fuse import recorded
from dsv4fuse.fusion import Sizes, registry


def ops_left(monkeypatch, packaging: bool) -> list[str]:
    """Ops of ours in the graph that Inductor is left with."""
    monkeypatch.setattr(_common, "INTERPRETED", False)
    made = registry()["clamp_swiglu_quant"].examples["plain"](3, Sizes(inter=128), "cpu")
    graph = recorded.graph(made.fn, [(t.shape, t.dtype) for t in made.inputs])
    fusing = dsv4fuse.inductor_pass({"select": "always"})
    with V.set_aot_compilation(packaging):
        fusing(graph)
    assert fusing.report.counts() == {"clamp_swiglu_quant": 1}
    return [str(n.target) for n in graph.nodes if str(n.target).startswith("dsv4fuse")]


def test_no_op_of_ours_goes_into_a_package(monkeypatch):
    assert ops_left(monkeypatch, packaging=False)
    assert not ops_left(monkeypatch, packaging=True)


def test_a_copied_configuration_has_the_same_pass():
    """AOTInductor copies its configuration; a report of the copy would be nobody's."""
    configs = {"joint_custom_pre_pass": dsv4fuse.inductor_pass()}
    assert copy.deepcopy(configs)["joint_custom_pre_pass"] is configs["joint_custom_pre_pass"]


@pytest.mark.long
def test_the_example_runs_in_a_process_without_us(checkout, tmp_path):
    command = [sys.executable, "examples/package.py", "--layers", "3"]
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        command, cwd=checkout, env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    error = re.search(r"differ from eager by (\S+) of", done.stdout)
    assert float(error[1]) < 1e-5, done.stdout
    for fusion in ("compress_kv", "indexer_logits", "norm_rope_cache", "hyper_head"):
        assert re.search(rf"{fusion} +\d+ taken", done.stdout), done.stdout
