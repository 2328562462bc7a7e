"""Where Inductor's code defines the Triton kernel of a launch: its source is read once, and compile
workers have it at once.

Inductor reads the source of a kernel, and of all that it calls, for each launch anew. And workers
get it only when the generated code is loaded; kernels of Inductor's own they get as it is written.
"""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen import wrapper
from torch._inductor.virtualized import V

SOURCE = "user_defined_triton_kernel_transitive_closure_source_code"


@functools.cache
def install() -> None:
    """From now on it is so in this process."""
    code = wrapper.PythonWrapperCodegen
    code.define_kernel = _started(code.define_kernel)
    if hasattr(wrapper, SOURCE):
        setattr(wrapper, SOURCE, _once(getattr(wrapper, SOURCE)))


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
