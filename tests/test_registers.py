"""Registers and spills of compiled kernels, as Inductor's launchers have them.

On a GPU the real thing; elsewhere what stands in for the modules that Inductor writes.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsv4fuse.bench import fusions as bench
from dsv4fuse.bench import fusions_table, registers
from dsv4fuse.bench.registers import Kernel


def launcher(registers, spills=0, warps=4, **kwargs):
    config = SimpleNamespace(num_warps=warps, num_stages=2, kwargs=kwargs)
    return SimpleNamespace(config=config, n_regs=registers, n_spills=spills, shared=1024)


def autotuner(name, *launchers, **constants):
    return SimpleNamespace(fn=SimpleNamespace(__name__=name), launchers=list(launchers),
                           triton_meta={"constants": constants})  # fmt: skip


def test_each_configuration_of_our_kernels_once():
    ours = autotuner("clamp_swiglu_kernel", launcher(40), launcher(255, 12, warps=8, BLOCK=64),
                     LIMIT=7.0, HAS_W=True, w_ptr=None, dtype=torch.float32)  # fmt: skip
    modules = [
        SimpleNamespace(a=ours, b=autotuner("triton_poi_fused_add_0", launcher(16)), call=print),
        SimpleNamespace(again=ours, other=autotuner("moe_router_kernel", launcher(None, None))),
    ]
    constants = {"LIMIT": 7.0, "HAS_W": True}
    found = registers.of(modules)
    assert found == [
        Kernel("clamp_swiglu_kernel", 4, 2, 40, 0, 1024, constants),
        Kernel("clamp_swiglu_kernel", 8, 2, 255, 12, 1024, {**constants, "BLOCK": 64}),
        Kernel("moe_router_kernel", 4, 2, None, None, 1024),
    ]
    assert str(found[0]) == "clamp_swiglu_kernel ×4: 40"
    assert str(found[1]) == "clamp_swiglu_kernel ×8: 255 + 12 spilled"


def test_a_kernel_that_was_not_run_has_no_configuration():
    assert registers.of([SimpleNamespace(a=autotuner("moe_router_kernel"))]) == []
    assert registers.of([]) == []


def test_what_was_loaded_before_does_not_count(monkeypatch):
    from torch._inductor.codecache import PyCodeCache

    before = SimpleNamespace(a=autotuner("moe_router_kernel", launcher(16)))
    monkeypatch.setattr(PyCodeCache, "modules", [before])
    with registers.collected() as found:
        new = SimpleNamespace(a=autotuner("merge_kernel", launcher(32)))
        PyCodeCache.modules.append(new)
        assert found == []
    assert [(k.name, k.registers) for k in found] == [("merge_kernel", 32)]


def test_they_are_kept_and_shown(tmp_path):
    kernel = Kernel("moe_router_kernel", 8, 3, 64, 4, 2048, {"E": 256})
    row = bench.Row("moe_router", "topk", "flash", 1, 4.0, 2.0, None, True, kernels=(kernel,))
    bench.save([row], tmp_path / "x.json", {"gpu": "a GPU"})
    assert bench.load(tmp_path / "x.json")[0] == [row]
    assert fusions_table._cells(row)[-1] == "moe_router_kernel ×8: 64 + 4 spilled"
    assert len(fusions_table._cells(row)) == len(fusions_table.TITLES)


@pytest.mark.gpu
def test_registers_of_a_real_kernel():
    made = bench.measure("clamp_swiglu_quant", "quant", "flash", 64)
    (kernel,) = made.kernels
    assert kernel.name == "clamp_swiglu_kernel" and 16 <= kernel.registers <= 255
    assert kernel.spills == 0 and kernel.warps in (1, 2, 4, 8, 16) and kernel.constants
