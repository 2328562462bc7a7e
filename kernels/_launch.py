"""Launches of kernels, and what takes their place: where there is no GPU or nothing is to run, and
where kernels are compiled before they are launched, in other processes."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler.compiler import get_cache_invalidating_env_vars
from triton.runtime import cache, driver
from triton.runtime.jit import JITCallable, JITFunction, MockTensor

from . import _common as common

Instead = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], object]
_instead: ContextVar[Instead | None] = ContextVar("instead", default=None)


@contextlib.contextmanager
def instead_of_launches(do: Instead) -> Iterator[None]:
    """Inside, a launch is ``do(kernel, grid, args, kwargs)``."""
    token = _instead.set(do)
    try:
        yield
    finally:
        _instead.reset(token)


@dataclass(frozen=True)
class _Replaced:
    kernel: Any
    do: Instead

    def __getitem__(self, grid: Any) -> Callable[..., object]:
        return lambda *args, **kwargs: self.do(self.kernel, grid, args, kwargs)


def wrap_triton(kernel: Any) -> Any:
    """``torch.library.wrap_triton``; the kernel itself where Triton interprets.

    It has torch's name, by which torch finds the kernels of an op in the op's source.
    """
    found = opaque(kernel)
    return torch.library.wrap_triton(found) if isinstance(found, JITFunction) else found


def opaque(kernel: Any) -> Any:
    """The same for a launch that torch does not look into, as it cannot into those of Gluon's."""
    do = _instead.get()
    if do is not None:
        return _Replaced(kernel, do)
    return kernel if common.INTERPRET.value else settled(kernel)


_settled: set[int] = set()


def settled(function: Any) -> Any:
    """The function, its key in Triton's cache the one that it has in any process.

    Triton makes the constants that a function reads a part of its key, but those that functions
    which it calls read only if these have keys already. Here they get theirs first.
    """
    if id(function) not in _settled:
        _settled.add(id(function))
        python = function.fn
        for name in python.__code__.co_names:
            if isinstance(called := python.__globals__.get(name), JITCallable):
                settled(called)
        function.hash = None
        function.cache_key  # noqa: B018  (computes it)
    return function


def target() -> int | str | None:
    """What kernels are compiled for: on NVIDIA ten times the compute capability; None where they
    are interpreted."""
    return None if common.INTERPRET.value else driver.active.get_current_target().arch


@dataclass(frozen=True)
class Specialised:
    """What a launch gives to Triton's compiler, as data: a kernel of a module, what it is
    specialised to, ``key``, under which Triton's cache has it in the process of the launch, and
    what that key is made of. ``ones``: what is 1, though not specialised to that."""

    module: str
    name: str
    signature: Mapping[str, Any]
    constants: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    options: Mapping[str, Any]
    target: GPUTarget
    ones: tuple[str, ...] = ()
    key: str = field(init=False)
    made_of: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        key, made_of = self._key()
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "made_of", made_of)

    def source(self) -> ASTSource:
        kernel = settled(getattr(importlib.import_module(self.module), self.name))
        kind = ASTSource
        if kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource as kind
        return kind(kernel, self.signature, self.constants, self.attributes)

    def _key(self) -> tuple[str, dict[str, str]]:
        source, backend = self.source(), make_backend(self.target)
        options, env = backend.parse_options(dict(self.options)), get_cache_invalidating_env_vars()
        key = cache.get_cache_key(source, backend, options, env)
        made_of = {"source": source.hash(), "compiler": backend.hash(), "options": options.hash(),
                   "environment": str(sorted(env.items()))}  # fmt: skip
        return hashlib.sha256(key.encode()).hexdigest(), made_of

    def on_disk(self) -> bool:
        """Need nobody compile it?"""
        return bool(cache.get_cache_manager(self.key).get_group(f"{self.name[:150]}.json"))

    def compiled(self, folder: str) -> CompiledKernel:
        """Into the cache in that folder. RuntimeError where this process would compile another code
        than that of the launch: with another ptxas or other settings."""
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = folder
            key, made_of = self._key()
            if key != self.key:
                other = [f"{k} {v!r}" for k, v in made_of.items() if v != self.made_of[k]]
                raise RuntimeError(f"a worker has another key: {', '.join(other)}")
            built = triton.compile(self.source(), target=self.target, options=dict(self.options))
            _make_launchers(built, self.ones)
            return built


def _make_launchers(kernel: CompiledKernel, ones: tuple[str, ...]) -> None:
    """The C code of its signature, into the cache: Triton 3.6 compiles it at the first launch. And
    that of Inductor's launch, for which whatever is 1 is a constant."""
    with contextlib.suppress(Exception):  # no C compiler, or no driver of a GPU
        from triton.backends.nvidia import driver as nvidia

        inductor = copy.copy(kernel.src)
        inductor.signature = kernel.src.signature | dict.fromkeys(ones, "constexpr")
        if hasattr(nvidia, "make_launcher"):
            for source in (kernel.src, inductor)[: 2 if ones else 1]:
                nvidia.CudaLauncher(source, kernel.metadata)


class _Described(JITFunction):  # type: ignore[misc, type-arg]
    """A kernel that has what this process has compiled of it, and describes what it has not."""

    def __init__(self, kernel: Any, found: list[Specialised], ones: list[str]) -> None:
        self.__dict__.update(kernel.__dict__, found=found, ones=ones)

    def _do_compile(
        self, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any,
        warmup: bool,
    ) -> None:  # fmt: skip
        target = self.device_caches[device][2]
        ones = tuple(n for n in self.ones if signature.get(n, "constexpr") != "constexpr")
        self.found.append(Specialised(
            self.module, self.__name__, signature, constants, attributes, options.__dict__, target,
            ones,
        ))  # fmt: skip


@contextlib.contextmanager
def described() -> Iterator[list[Specialised]]:
    """Inside, launches do not happen; the list grows by what Triton would have to compile for
    them. Fake tensors will do: of a tensor only the dtype is read, and its address is taken for a
    multiple of 16."""
    found: list[Specialised] = []

    def describe(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        ones = [name for name, value in given.items() if isinstance(value, int) and value == 1]
        ones = [] if kernel.is_gluon() else ones  # which Inductor does not launch
        named = {name: _pointer(value) for name, value in given.items()}
        _Described(kernel, found, ones).run(grid=grid, warmup=True, **named)

    with instead_of_launches(describe):
        yield found


def _pointer(value: Any) -> Any:
    return MockTensor(value.dtype) if isinstance(value, Tensor) else value
