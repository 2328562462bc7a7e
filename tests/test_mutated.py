"""What torch believes a kernel writes: nothing but its outputs and caches, each given once.

Kernels say it themselves; here torch reads it too, in the kernel's IR, with plain ints for sizes.
Where an argument counts for written that is not, Inductor copies it and gives up CUDA graphs.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging
import torch, triton
import torch._higher_order_ops.triton_kernel_wrap as wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

class Driver:  # a GPU to compile for, none to run on
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0

triton.runtime.driver.set_active(Driver())
torch.cuda.get_device_capability = lambda *_: (9, 0)
from dsv4fuse import accesses, calls as fused
import dsv4fuse
from tests._calls import calls
from tests._plans import misreadings

accesses.install()
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger(wrap.__name__).addHandler(handler)

def fake(t):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

for name, (args, kwargs) in calls("cpu").items():
    op = getattr(dsv4fuse.ops, name)
    given = [fake(a) if isinstance(a, torch.Tensor) else a for a in args]
    places = [i for i, a in enumerate(given) if isinstance(a, torch.Tensor)]

    def call(*tensors):
        filled = list(given)
        for i, t in zip(places, tensors):
            filled[i] = t
        found = op(*filled, **kwargs)
        return found if isinstance(found, (tuple, list)) else (found,)

    graph = fused.graph(call, [given[i] for i in places], keep_ops=False)
    assert not (wrong := misreadings(graph)), (name, wrong)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for node in graph.nodes:
        if node.target is wrap.triton_kernel_wrapper_functional:
            given_to = node.kwargs["kwargs"]
            written = [a for a in node.kwargs["tensors_to_clone"] if given_to[a] in inputs]
            print(name, ",".join(written))
            # Of a tensor given twice torch would keep what one of the two arguments became.
            tensors = [given_to[a] for a in node.kwargs["tensors_to_clone"]]
            assert len(tensors) == len(set(tensors)), (name, node.kwargs["tensors_to_clone"])
assert not said, said
print("done")
"""
WRITES = {
    "norm_rope_cache": "cache_ptr",
    "norm_rope_cache_fp8": "cache_ptr",
    "compress_kv_cache": "cache_ptr",
    "inv_rope_grouped_bmm_": "o_ptr",
}


@pytest.mark.slow
def test_only_caches_are_written(checkout):
    env = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=str(checkout))
    run = dict(cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
    done = subprocess.run([sys.executable, "-c", PROGRAM], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    assert last == "done" and len(lines) > 15
    for line in lines:
        name, _, written = line.partition(" ")
        assert written == WRITES.get(name, ""), line
