"""What is compiled ahead is what the check would compile: it then compiles nothing anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# In a process of its own: here kernels may be interpreted. The GPU is one of names only.
SCRIPT = """
import json, sys
import torch
from triton.runtime.jit import JITFunction
from dsv4fuse import built, pipeline, precompile, samples
from dsv4fuse.backend import parse
from dsv4fuse.fusion import Sizes, registry
from dsv4fuse.scene import Scene
from tests.generate import _graphs

compiled, failed = [], []
compile_one = JITFunction._do_compile
JITFunction._do_compile = lambda self, *a, **k: compiled.append(self) or compile_one(self, *a, **k)
torch.cuda.get_device_capability = lambda device=None: (9, 0)
sizes = Sizes(heads=8, groups=2, inter=256, experts=32, window=16)
found = {}
for name in sys.argv[1:]:
    made = next(iter(registry()[name].examples.values()))(8, sizes, "cpu")
    module = _graphs.traced(made.fn, made.inputs)
    sites = pipeline.candidates(Scene(module.graph), parse({"select": "always"}))
    candidates = [c for c, _ in sites if c.fusion == name]
    with built.building() as launched:
        compiled.clear()
        precompile.precompile([*candidates, *candidates], torch.device("cuda"))
        ahead = len(compiled)
        compiled.clear()
        for c in candidates:
            drawn = samples.draw(c, list(c.inputs))
            c.call(*(drawn[n] for n in c.inputs))
    found[name] = [ahead, len(compiled), len(launched)]
print(json.dumps(found))
"""
NAMES = ("norm_rope_cache", "hyper_connection_pre", "moe_router", "norm_quant")


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_the_check_compiles_nothing_anew(counts, name):
    ahead, anew, launched = counts[name]
    assert ahead >= launched >= 1 and anew == 0, counts[name]
