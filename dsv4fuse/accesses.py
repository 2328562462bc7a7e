"""What the launch of a Triton kernel writes: ours say it themselves (``kernels/_stores.py``).

torch compiles a kernel to Triton's IR for the answer, and asks wherever it makes a launch
functional and again, more than once a launch, in Inductor. It goes on to do so of other kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.dependencies import Dep, ReadWrites, StarDep
from torch._inductor.ir import TensorBox
from torch.utils._ordered_set import OrderedSet

from dsv4fuse.kernels._stores import written


@functools.cache
def install() -> None:
    """From now on torch is told what our kernels write."""
    for name, answer in ANSWERS.items():
        if hasattr(triton_kernel_wrap, name):
            ask = _told(getattr(triton_kernel_wrap, name), answer)
            setattr(triton_kernel_wrap, name, ask)


def _told(ask: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ask)
    def asked(kernel: Any, kwargs: dict[str, Any], descriptors: Any) -> Any:
        names = written(kernel, kwargs)
        return ask(kernel, kwargs, descriptors) if names is None else answer(names, kwargs)

    return asked


def _accesses(names: list[str], kwargs: dict[str, Any]) -> Any:
    """An epilogue is not to be fused into a kernel of ours, whose rounding it would change."""
    tensors = [n for n, value in kwargs.items() if isinstance(value, Tensor | TensorBox)]
    reads, writes = (OrderedSet[Dep](map(StarDep, held)) for held in (tensors, names))
    return triton_kernel_wrap.TensorAccesses(
        ReadWrites(reads=reads, writes=writes, index_exprs=OrderedSet()), can_fuse_epilogue=False
    )


# What torch 2.12 and later call it, and 2.11.
ANSWERS = {"identify_accessed_tensors": _accesses,
           "identify_mutated_tensors": lambda names, _: names}  # fmt: skip
