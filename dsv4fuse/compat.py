"""Everything that depends on how a version of torch works inside, with a test each.

torch 2.11 to 2.15: ``joint_custom_pre_pass`` is called with the functional ATen graph before any
pass of Inductor's own; 2.11 and 2.12 take one callable, lists only from 2.13.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def outside_compilation() -> Iterator[None]:
    """No fake, functional or proxy mode, no tracing context, no gradients."""
    with _disable_current_modes(), torch._guards.tracing(None), torch.no_grad():
        yield


def trace(
    fn: Callable[..., Any], inputs: Sequence[tuple[Sequence[int], torch.dtype]]
) -> fx.Graph:
    """fn as the functional ATen graph that Inductor would be given. Nothing is computed."""
    with outside_compilation(), FakeTensorMode() as mode:
        fakes = [torch.empty(tuple(shape), dtype=dtype) for shape, dtype in inputs]
        del mode
        traced = make_fx(dispatch_functionalize(fn), select_decomp_table(), tracing_mode="real")
        return traced(*fakes).graph


def trace_fused(fn: Callable[..., Any], fakes: Sequence[Any], *, keep_ops: bool) -> fx.GraphModule:
    """fn, which calls fused ops, as a functional graph over the fakes' own fake mode.

    ``keep_ops`` leaves each op one node; otherwise an op becomes the launch of its Triton kernel,
    which Inductor's wrapper then makes itself instead of going through the dispatcher.
    """
    from torch.export._trace import _disable_custom_triton_op_functional_decomposition

    kept = _disable_custom_triton_op_functional_decomposition if keep_ops else contextlib.nullcontext
    modes = {x.fake_mode for x in fakes if hasattr(x, "fake_mode")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(kept())
        for mode in modes:
            stack.enter_context(mode)
        return make_fx(dispatch_functionalize(fn), tracing_mode="real")(*fakes)


def hint(value: torch.SymInt) -> int:
    """The number a symbol stood for when the graph was traced; no guard is added."""
    node = value.node
    if node.hint is not None:
        return int(node.hint)
    return int(node.shape_env.size_hint(node.expr, fallback=64))


def place(node: fx.Node) -> tuple[str, str, int]:
    """(module path, file, line) of the user's code behind a node; "" and 0 where unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    module = ""
    for entry in stack.values():
        module = entry[0] if isinstance(entry, tuple) else str(entry)
    module = _PATH.sub("", module).strip(".")
    module = re.sub(r"\._modules\['([^']+)'\]|\['([^']+)'\]", r".\1\2", module).strip(".")
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if "/torch/" not in f[0]] or frames
    return (module, own[-1][0], int(own[-1][1])) if own else (module, "", 0)


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_PATH = re.compile(r"^L\['self'\]\.?|^L__self___?")
