"""The ways in which people reach the backend: a function, a module, ``fuse``; sizes as symbols."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config

import dsv4fuse
from dsv4fuse import Report
from dsv4fuse.backend import dsv4fuse as backend

from . import _check
from ._check import OPTIONS, Outcome
from ._hand import Site

SETTINGS: Mapping[str, Any] = dict(backend=backend, options=OPTIONS, fullgraph=True)


class Program(nn.Module):
    """A function whose first tensor is given, and all others held: parameters what may be trained,
    buffers the rest."""

    def __init__(self, fn: Callable[..., Any], args: Sequence[Any]) -> None:
        super().__init__()
        self.fn, self.rest, self.names = fn, list(args), list[str | None]()
        for i, a in enumerate(args):
            held = i > 0 and isinstance(a, Tensor)
            self.names.append(f"held_{i}" if held else None)
            if held and a.is_floating_point():
                self.register_parameter(f"held_{i}", nn.Parameter(a, requires_grad=False))
            elif held:
                self.register_buffer(f"held_{i}", a)
            if isinstance(a, Tensor):
                self.rest[i] = None

    def forward(self, x: Tensor) -> Any:
        held = [
            getattr(self, name) if name else value
            for name, value in zip(self.names, self.rest, strict=True)
        ]
        return self.fn(x, *held[1:])


def _run(compiled: Any, args: Sequence[Any], owner: Any) -> tuple[Report, Any]:
    with torch.no_grad():
        found = compiled(*args)
    return Report.of(owner), found


class _Holder:
    """What a report is found by, of a function or of a module whose graph has none of its own."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.parameters = lambda: _check.tensors(list(args))
        self.buffers = lambda: ()


def function(fn: Any, args: Sequence[Any]) -> tuple[Report, Any]:
    torch._dynamo.reset()
    return _run(torch.compile(fn, **SETTINGS), args, _Holder(args))


def fused_function(fn: Any, args: Sequence[Any]) -> tuple[Report, Any]:
    torch._dynamo.reset()

    @dsv4fuse.fuse(fullgraph=True, **OPTIONS)
    def decorated(*given: Any) -> Any:
        return fn(*given)

    return _run(decorated, args, _Holder(args))


def module(fn: Any, args: Sequence[Any]) -> tuple[Report, Any]:
    torch._dynamo.reset()
    made = Program(fn, args)
    return _run(torch.compile(made, **SETTINGS), args[:1], _Holder(args))


def fused_module(fn: Any, args: Sequence[Any]) -> tuple[Report, Any]:
    torch._dynamo.reset()
    made = Program(fn, args)
    return _run(dsv4fuse.fuse(made, fullgraph=True, **OPTIONS), args[:1], _Holder(args))


def fused_class(fn: Any, args: Sequence[Any]) -> tuple[Report, Any]:
    torch._dynamo.reset()

    @dsv4fuse.fuse(fullgraph=True, **OPTIONS)
    class Decorated(Program):
        pass

    made = Decorated(fn, args)
    return _run(made, args[:1], _Holder(args))


WAYS = {f.__name__: f for f in (function, fused_function, module, fused_module, fused_class)}


def two_sizes(first: Site, second: Site) -> Outcome:
    """One graph for both sizes of a sequence: fused as stated, and equal to eager at either.

    ``invalid`` where the function itself makes a number of the size.
    """
    compiled: list[Any] = []

    def way(fn: Any, args: Sequence[Any]) -> tuple[Report, Any]:
        torch._dynamo.reset()
        for a, b in zip(args, second.inputs, strict=True):
            if isinstance(a, Tensor):
                for axis in (i for i in range(a.dim()) if a.shape[i] != b.shape[i]):
                    torch._dynamo.mark_dynamic(a, axis)
        compiled.append(torch.compile(fn, **SETTINGS))
        return _run(compiled[0], args, _Holder(args))

    outcome = _check.check(dataclasses.replace(first, words={**first.words, "sizes": "two"}), way)
    if "ConstraintViolationError" in outcome.crash:
        outcome.crash, outcome.invalid = "", FIXED
    if outcome.crash or outcome.invalid:
        return outcome

    def again(fn: Any, args: Sequence[Any]) -> tuple[Report, Any]:
        with config.patch(error_on_recompile=True), torch.no_grad():
            return Report(), compiled[0](*args)

    other = _check.check(second, again)
    outcome.wrong = outcome.wrong or other.wrong and f"at the other size: {other.wrong}"
    outcome.crash = other.crash
    return outcome


FIXED = "the size is a number of the program"
