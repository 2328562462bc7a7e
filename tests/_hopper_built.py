"""Prints what a Hopper kernel is compiled to, for a GPU that need not be here: "attention" or
"indexer"."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from dsv4fuse.kernels import _attention as attention
from dsv4fuse.kernels import _flash_hopper_op, _indexer_hopper_op
from dsv4fuse.kernels import _hopper as hopper
from dsv4fuse.kernels import indexer_logits as indexer
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from dsv4fuse.bench.kernels import usage

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64",
         torch.int32: "*i32", torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv"}  # fmt: skip
op = {"attention": _flash_hopper_op, "indexer": _indexer_hopper_op}[sys.argv[1]]
kernel, made = op.kernel(), []


def compiled(num_warps: int, **arguments: Any) -> None:
    """Specialised as a launch would be."""
    signature, constants, attributes = {}, {}, {}
    for at, param in enumerate(kernel.params):
        value, free = arguments[param.name], param.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[param.name], attributes[(at,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif param.is_constexpr or (value == 1 and not free):
            signature[param.name], constants[(at,)] = "constexpr", value
        else:
            signature[param.name] = "i32"
            if value % 16 == 0 and not free:
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    made.append({**usage(done.asm["cubin"]), "shared": done.metadata.shared,
                 "products": done.asm["ptx"].count("wgmma.mma_async"),
                 "copies": done.asm["ptx"].count("cp.async.cg.shared.global")})  # fmt: skip


class Compiled:
    def __getitem__(self, grid: Any) -> Any:
        return compiled


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def attend(
    keys: Any, mask: Any = None, heads: int = 64, tokens: int = 600, **how: Any
) -> None:
    how = {"rounded": "", "wide": False, "nan_empty": False, **how}
    q, sinks = zeros(1, tokens, heads, 512), zeros(heads, dtype=torch.float32)
    attention.launch(q, keys, mask, sinks, zeros(*q.shape), scale=0.05, **how)


def attentions() -> None:
    # The joining kernel is Triton's, and runs nowhere here.
    attention._run = lambda kernel, grid: lambda **arguments: None
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


hopper.is_hopper, op.kernel, hopper.processors = lambda device: True, Compiled, lambda device: 132
{"attention": attentions, "indexer": indexers}[sys.argv[1]]()
print(json.dumps(made))
