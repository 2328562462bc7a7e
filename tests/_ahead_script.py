"""What ``test_ahead`` runs in a process of its own, where kernels are not interpreted and torch's
compile workers are its own. The GPU is one of names only. Prints what was found as JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from types import SimpleNamespace

import torch
import triton
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import _launch
from dsv4fuse.kernels._launch import instead_of_launches
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from dsv4fuse import ahead, compile_workers, pipeline, samples, trial
from dsv4fuse.backend import parse
from dsv4fuse.bench.kernels import _Absent
from dsv4fuse.fusion import Sizes, registry
from dsv4fuse.scene import Scene
from tests.generate._graphs import traced

GPU = torch.device("cuda")
SIZES = Sizes(heads=8, groups=2, inter=256, experts=32, window=16)
OPTIONS = parse({"select": "always"})
NAMES = ("norm_rope_cache", "moe_router")
CHECKED = "hyper_head"


class Instead:
    """Takes the place of the workers' job: on their side it is a call of another function."""

    def __init__(self, call, *args):
        self.said = (call, args)

    def __call__(self):
        raise AssertionError("not here")

    def __reduce__(self):
        return self.said


def graph(name):
    made = next(iter(registry()[name].examples.values()))(8, SIZES, "cpu")
    return traced(made.fn, made.inputs).graph


def on_gpu(graph):
    """As if it had been traced there; not every torch can trace for a GPU that is not here."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            with value.fake_mode:
                node.meta["val"] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=GPU
                )
    return graph


def candidates(names):
    found = [c for n in names for c, _ in pipeline.candidates(Scene(graph(n)), OPTIONS)
             if c.fusion == n]  # fmt: skip
    assert {c.fusion for c in found} == set(names)
    return found


def launched(names):
    """Of each kernel that the check would launch, with real tensors: was it compiled before?"""
    hits = []

    def compile_only(kernel, grid, args, kwargs):
        kernel.run(*args, grid=grid, warmup=True, **kwargs)

    triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    common.INTERPRETED = True  # launch also on a CPU
    with instead_of_launches(compile_only):
        for c in candidates(names):
            drawn = samples.draw(c, list(c.inputs))
            c.call(*(drawn[n] for n in c.inputs))
    common.INTERPRETED = False
    triton.knobs.compilation.listener = None
    return hits


class Jobs(logging.Handler):
    """What is said of kernels that were not compiled ahead."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.said = []

    def emit(self, record):
        _, _, why = record.getMessage().partition(" was not compiled ahead: ")
        self.said += [why] if why else []

    def after(self, do):
        """What was said meanwhile, and the seconds it took."""
        self.said, started = [], time.perf_counter()
        do()
        return self.said, time.perf_counter() - started


def main():
    driver.set_active(_Absent(90))
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    jobs = Jobs()
    logging.getLogger("dsv4fuse").setLevel(logging.DEBUG)
    logging.getLogger("dsv4fuse").addHandler(jobs)
    result = {"workers": compile_workers.start()}
    sites, job, ahead.HERE = candidates(NAMES), compile_workers.compiled, 60.0

    def compiled():
        started = ahead.Jobs(enumerate(sites), GPU)
        for i in range(len(sites)):
            started.wait(i)

    def missing():
        return [k for c in sites for k in ahead.kernels(c, GPU)]

    # Workers that die, then some that are late, then what they cannot compile, or not alike.
    compile_workers.compiled = Instead(os._exit, 1)
    result["dead"] = jobs.after(compiled)
    compile_workers.compiled, ahead.PATIENCE = Instead(time.sleep, 1), 0.1
    result["late"] = jobs.after(compiled)
    compile_workers.compiled, ahead.PATIENCE = job, 120.0
    described, real = ahead.kernels, missing()
    result["described"] = len(real)
    wrong = [dataclasses.replace(real[0], constants={}), real[1]]
    object.__setattr__(wrong[1], "key", "0" * 64)  # of another ptxas
    ahead.kernels = lambda candidate, device: wrong if candidate is sites[0] else []
    result["wrong"] = jobs.after(compiled)
    ahead.kernels = described
    result["compiled"] = jobs.after(compiled)
    result["left"] = sum(not k.on_disk() for k in missing())
    result["hits"] = launched(NAMES)
    result["known"] = len(missing())

    # The pass: what a check launches is there.
    checks = []
    trial._found = lambda c, *_: checks.append(launched([c.fusion])) or trial.Finding()
    report = pipeline.run(on_gpu(graph(CHECKED)), OPTIONS)
    result["pass"] = [s.status for s in report.sites], checks
    # The C code of launches, which only some versions of Triton have.
    made, kernel = [], real[0]
    nvidia.make_launcher, nvidia.CudaLauncher = None, lambda src, _: made.append(src.signature)
    for ones in ((), kernel.ones):
        _launch._make_launchers(SimpleNamespace(src=kernel.source(), metadata=None), ones)
    result["launchers"] = kernel.ones, made
    print(json.dumps(result))


if __name__ == "__main__":
    main()
