"""What ``test_plans`` runs in a process of its own, where kernels are not interpreted: each plan of
each example's sites, as it would be on a GPU, which is one of names only. Prints JSON."""

from __future__ import annotations

import json

import torch
from torch._higher_order_ops import triton_kernel_wrap
from triton.runtime import driver

from dsv4fuse import accesses, calls, pipeline
from dsv4fuse.backend import parse
from dsv4fuse.bench.kernels import _Absent
from dsv4fuse.fusion import Sizes, registry
from dsv4fuse.plans import Plans
from dsv4fuse.scene import Scene

from ._ahead_script import on_gpu
from ._plans import launches, misreadings, shown
from .generate._graphs import traced

SIZES = Sizes(heads=8, groups=2, inter=256, experts=32, window=16)
OPTIONS = parse({"select": "always"})


def sites(fusion, example):
    made = example(8, SIZES, "cpu")
    graph = on_gpu(traced(made.fn, made.inputs).graph)
    return [c for c, _ in pipeline.candidates(Scene(graph), OPTIONS) if c.fusion == fusion.name]


def planned(site):
    """Launches, how often Triton made its IR, what torch would read otherwise, and whether the plan
    copied is the plan."""
    made, real = [], triton_kernel_wrap.generate_ttir
    triton_kernel_wrap.generate_ttir = lambda kernel, *rest: made.append(0) or real(kernel, *rest)
    plan = Plans().of(site)
    triton_kernel_wrap.generate_ttir = real
    fakes, like = ([n.meta["val"] for n in nodes] for nodes in (site.inputs, site.outputs))
    copied = shown(calls.again(plan, fakes, like)) == shown(plan)
    return len(launches(plan)), len(made), misreadings(plan), copied


def main():
    driver.set_active(_Absent(90))
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    accesses.install()
    print(json.dumps({
        f"{fusion.name}: {variant}": [planned(site) for site in sites(fusion, example)]
        for fusion in registry().values() if fusion.kernel
        for variant, example in fusion.examples.items()
    }))  # fmt: skip


if __name__ == "__main__":
    main()
