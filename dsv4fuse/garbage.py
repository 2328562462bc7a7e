"""Python's collector of cycles while a graph is compiled, which makes many objects that stay alive.

Each full collection visits every object alive: those of Dynamo and of the model's own program, and
the terms of a graph. Of a model of four layers that took a quarter of a pass. What is frozen is
not visited; cycles made inside are collected all the same, which may hold memory of a GPU.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextvars import ContextVar

FEW = 1000  # objects: Python 3.12 starts with some 375 frozen ones
_own: ContextVar[bool] = ContextVar("own", default=False)  # is what is frozen ours to thaw?


@contextlib.contextmanager
def passed_by() -> Iterator[None]:
    """Inside, collections pass by what was alive before. Where somebody else has frozen something,
    nothing is done: to thaw one's own objects thaws all."""
    first = gc.get_freeze_count() < FEW
    token = _own.set(first or _own.get())
    if first:
        gc.freeze()
    try:
        yield
    finally:
        _own.reset(token)
        if first:
            gc.unfreeze()


@contextlib.contextmanager
def growing() -> Iterator[None]:
    """Inside ``passed_by``, for steps whose objects stay: none is collected, then they are passed
    by as well."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _own.get():
            gc.freeze()
        if enabled:
            gc.enable()
