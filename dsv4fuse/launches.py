"""What Inductor does for each launch of a Triton kernel, in less time.

It is told what ours write (``accesses``). It reads the source of the kernel, and of all that it
calls, for each launch anew: once will do. Its compile workers get the kernel only when the
generated code is loaded: here as that is written, like kernels of Inductor's own. And it traces a
function for the launch that writes in place: where nothing is to be cloned, that is a node with the
same arguments.
"""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import fx
from torch._higher_order_ops.triton_kernel_wrap import (
    triton_kernel_wrapper_functional,
    triton_kernel_wrapper_mutation,
)
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen import wrapper
from torch._inductor.fx_passes import post_grad
from torch._inductor.virtualized import V

from dsv4fuse import accesses

SOURCE = "user_defined_triton_kernel_transitive_closure_source_code"
IN_PLACE = "decompose_triton_kernel_wrapper_functional"


@functools.cache
def install() -> None:
    """From now on it is so in this process."""
    accesses.install()
    code = wrapper.PythonWrapperCodegen
    for place, name, better in (
        (wrapper, SOURCE, _once),
        (code, "define_kernel", _started),
        (post_grad, IN_PLACE, _in_place),
    ):
        if hasattr(place, name):
            setattr(place, name, better(getattr(place, name)))


def _once(read: Callable[..., str]) -> Callable[..., str]:
    """Of ours only: nobody writes into them."""
    known: dict[int, tuple[Any, str]] = {}

    @functools.wraps(read)
    def source(kernel: Any, *changed: Any) -> str:
        if any(changed) or not hasattr(kernel, "stores"):
            return read(kernel, *changed)
        if id(kernel) not in known:
            known[id(kernel)] = kernel, read(kernel)
        return known[id(kernel)][1]

    return source


def _in_place(decompose: Callable[[fx.Graph], None]) -> Callable[[fx.Graph], None]:
    @functools.wraps(decompose)
    def decomposed(graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional):
            given = dict(node.kwargs)
            if given.pop("tensors_to_clone", None) == [] and not node.users:
                with graph.inserting_before(node):
                    writing = graph.call_function(triton_kernel_wrapper_mutation, (), given)
                writing.meta = dict(node.meta)
                graph.erase_node(node)
        decompose(graph)

    return decomposed


def _started(define: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(define)
    def defined(code: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(Exception):  # then it is compiled when the code is loaded
            start(kernel_body)
        return define(code, kernel_name, kernel_body, *args, **kwargs)

    return defined


def start(definition: str) -> None:
    """What ``definition`` will do when it is run, if it is of a launch's kernel: its result is kept
    by the kernel's source, and found then."""
    if "custom_kernel=True" not in definition or V.graph.cpp_wrapper or V.aot_compilation:
        return
    if AsyncCompile.use_process_pool():
        call = ast.parse(definition.strip(), mode="eval").body
        assert isinstance(call, ast.Call)
        given = {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
        AsyncCompile().triton(*map(ast.literal_eval, call.args), **given)
