"""Prints what a Hopper kernel is compiled to, for a GPU that need not be here: "attention" or
"indexer"."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from dsv4fuse.kernels import _attention as attention
from dsv4fuse.kernels import _flash_hopper_op, _indexer_hopper_op
from dsv4fuse.kernels import _hopper as hopper
from dsv4fuse.kernels import indexer_logits as indexer
from dsv4fuse.kernels._launch import Specialised

from dsv4fuse.bench.kernels import describing, usage


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def attend(
    keys: Any, mask: Any = None, heads: int = 64, tokens: int = 600, **how: Any
) -> None:
    how = {"rounded": "", "wide": False, "nan_empty": False, **how}
    q, sinks = zeros(1, tokens, heads, 512), zeros(heads, dtype=torch.float32)
    attention.launch(q, keys, mask, sinks, zeros(*q.shape), scale=0.05, **how)


def attentions() -> None:
    attention.SHAPES, attention.LISTED = attention.SHAPES[-1:], (1 << 30, 1)
    Keys, Mask = attention.Keys, attention.Mask
    near, far = zeros(1, 1, 600, 512), zeros(3, 90, 512)
    index, page = zeros(1, 600, 640, dtype=torch.int64), zeros(1, 600, dtype=torch.int32)
    added = Mask(zeros(1, 600, 600), "add")
    hidden = Mask(zeros(1, 600, 1240, dtype=torch.bool), "hidden")
    attend(Keys(None, far[:1], index))
    attend(Keys(near), added, rounded="psm")
    attend(Keys(near, far, index, page, True), hidden, wide=True, nan_empty=True)
    attend(Keys(near), added, heads=16)
    attend(Keys(None, far[:1], index[:, :16]), tokens=16)  # split


def scores(dtype: torch.dtype, end: bool = True, **how: Any) -> None:
    q, k, w = zeros(1, 600, 64, 128), zeros(1, 600, 128), zeros(1, 600, 64)
    some = zeros(1, 600, dtype=torch.int64)
    how = dict(scale=0.5, scale_dots=False, rounding="once", precise=False, clean=True) | how
    scales = zeros(1, 600, dtype=torch.float32) if dtype.itemsize == 1 else None
    out = indexer.allocate(q, k, how["rounding"])
    indexer._launch(q.to(dtype), k.to(dtype), w, scales, None if end else some,
                    some if end else None, out, narrow_sum=False, **how)  # fmt: skip


def indexers() -> None:
    scores(torch.bfloat16)
    scores(torch.bfloat16, end=False, rounding="every", clean=False)
    scores(torch.float8_e4m3fn)
    scores(torch.float8_e4m3fn, rounding="dot", scale_dots=True)


def made(kernel: Specialised) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        done = kernel.compiled(folder)
    return {**usage(done.asm["cubin"]), "shared": done.metadata.shared,
            "products": done.asm["ptx"].count("wgmma.mma_async"),
            "copies": done.asm["ptx"].count("cp.async.cg.shared.global")}  # fmt: skip


hopper.is_hopper, hopper.processors = lambda device: True, lambda device: 132
launches, op = {"attention": (attentions, _flash_hopper_op),
                "indexer": (indexers, _indexer_hopper_op)}[sys.argv[1]]  # fmt: skip
with describing() as found:
    launches()
print(json.dumps([made(kernel) for kernel in found if kernel.name == op.KERNEL[1]]))
