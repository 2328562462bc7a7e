"""What depends on how a version of torch works inside, with a test each; what launches of Triton's
kernels ask of it is in ``accesses``, ``launches`` and ``compile_workers``, how functions and
fused ops are traced in ``recorded`` and ``calls``, its clocks in ``bench.stopwatch``.

torch 2.11 to 2.15: ``joint_custom_pre_pass`` is called with the functional ATen graph before any
pass of Inductor's own; 2.11 and 2.12 take one callable, lists only from 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dsv4fuse import decompositions


@contextlib.contextmanager
def outside_compilation() -> Iterator[None]:
    """No fake, functional or proxy mode, no tracing context, no gradients."""
    with _disable_current_modes(), torch._guards.tracing(None), torch.no_grad():
        yield


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """fp32 matrix products in fp32, whatever the user's setting for TF32 is."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Inside, the capture of a CUDA graph may fail. torch leaves its generator of random numbers in
    the capture then, and draws none any more."""
    try:
        yield
    except Exception:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise


class _Decomposed(TorchDispatchMode):
    """Each operation by Inductor's decomposition of it, in the references of fused ops too. What
    writes in place has none: where graphs are made nothing does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types:  # a fake tensor: only its shape is asked for
            return func(*args, **kwargs)
        with self:
            if func.namespace == "dsv4fuse":
                return func.redispatch(_CPU, *args, **kwargs)
            table = {} if func._schema.is_mutable else decompositions.table()
            found = decompositions.spelled(func, args, kwargs, table)
        return func(*args, **kwargs) if found is NotImplemented else found


_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def as_in_graphs(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a CPU what runs is spelled as in a graph at our hook: torch's own softmax and softplus
    there differ from their decompositions by more than a sum's order does. Elsewhere nothing."""
    return _Decomposed() if device.type == "cpu" else contextlib.nullcontext()


class _Bodies(TorchDispatchMode):
    """An op of ours called with fake tensors is its body, launches and all, not its fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "dsv4fuse":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(_CUDA, *args, **(kwargs or {}))


_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def bodies_of_ops() -> contextlib.AbstractContextManager[Any]:
    """Inside, ops of ours called with fake tensors on a GPU make their launches."""
    return _Bodies()


def any_size(hint: int) -> torch.SymInt:
    """A size that is not known, in a world of its own; a branch on it is taken as for the hint."""
    env, source = ShapeEnv(), ConstantSource("size")
    symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC, constraint_dim=None)
    size = env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def kept_ops() -> contextlib.AbstractContextManager[None]:
    """While tracing, a ``triton_op`` stays one node."""
    from torch.export._trace import _disable_custom_triton_op_functional_decomposition

    return _disable_custom_triton_op_functional_decomposition()


@functools.cache
def takes_large_numbers() -> bool:
    """Can Inductor compile the launch of a kernel that takes a number from 2^31 on? That of torch
    2.11 looks for symbols in it."""
    env = ShapeEnv()
    asked = env.has_guarding_hint if hasattr(env, "has_guarding_hint") else env.has_hint
    try:
        return bool(asked(1 << 31))
    except AttributeError:
        return False


def large_number(graph: fx.Graph) -> int | None:
    """A number that a launch in the graph takes and Inductor cannot compile, if there is one."""
    launches = [n for n in graph.nodes if "constant_args_idx" in n.kwargs]
    if takes_large_numbers() or not launches:
        return None
    constants = (kernel_side_table.get_constant_args(n.kwargs["constant_args_idx"])
                 for n in launches)  # fmt: skip
    numbers = (v for given in constants for v in given.values() if isinstance(v, int))
    return next((v for v in numbers if v >= 1 << 31), None)


def packaging() -> bool:
    """Is AOTInductor making a package, which will run where no op of ours is registered?"""
    from torch._inductor.virtualized import V

    return bool(V.aot_compilation)


def hint(value: int | torch.SymInt) -> int:
    """The number a symbol stood for when the graph was traced; no guard is added."""
    if not isinstance(value, torch.SymInt):
        return int(value)
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


def constant(node: fx.Node) -> torch.Tensor | None:
    """The tensor that a ``get_attr`` node of a traced graph stands for."""
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, torch.Tensor) and not is_fake(value) else None


def configured_passes() -> list[Any]:
    """The passes that the user's own Inductor configuration has at our hook."""
    there = torch._inductor.config.joint_custom_pre_pass or []
    return list(there) if isinstance(there, list | tuple) else [there]


def compile_inner(
    gm: fx.GraphModule, inputs: Sequence[Any], fusing: Any, inner: str, mode: str | None = None
) -> Callable[..., Any]:
    """gm compiled with the pass (None: without), by Inductor or as the rewritten ATen graph.
    ``mode`` is one of torch.compile's ("reduce-overhead": CUDA graphs); only Inductor has them."""
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches: dict[str, Any] = torch._inductor.list_mode_options(mode) if mode else {}
        if fusing is None:
            return compile_fx(gm, inputs, config_patches=patches)
        patches |= {"joint_custom_pre_pass": fusing}
        table = decompositions.other()
        return compile_fx(gm, inputs, config_patches=patches, decompositions=table)

    from torch._dynamo.backends.common import aot_autograd

    def run_graph(graph_module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        if fusing is not None:
            fusing(graph_module.graph)
            graph_module.recompile()
        return graph_module

    table = decompositions.table()
    how = dict(decompositions=table, keep_inference_input_mutations=True)
    return aot_autograd(fw_compiler=run_graph, **how)(gm, inputs)


def will_be_differentiated(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    return torch.is_grad_enabled() and any(
        x.requires_grad for x in (*tensors, *gm.parameters(), *gm.buffers())
    )


def graph_break(gm: fx.GraphModule) -> tuple[str, str, int] | None:
    """(reason, file, line) of the break that ended this graph, None if it ended by returning."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    frame = reason.user_stack[-1] if reason.user_stack else None
    text = reason.reason.strip().splitlines()[0] if reason.reason.strip() else "a graph break"
    return (text, frame.filename, frame.lineno or 0) if frame else (text, "", 0)


@contextlib.contextmanager
def without_caches() -> Iterator[None]:
    """Compilation from scratch: a warm cache would skip the pass."""
    import torch._functorch.config as functorch_config

    with (
        torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


def tuned_anew() -> contextlib.AbstractContextManager[None]:
    """Inside, each process tunes Inductor's kernels itself: a choice on disk is anybody's."""
    return torch._inductor.config.patch(autotune_local_cache=False)


def fresh_caches() -> contextlib.AbstractContextManager[None]:
    """Empty caches on disk, Triton's too, that go again: the times of a first compilation."""
    return torch._inductor.utils.fresh_cache()
