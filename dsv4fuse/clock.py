"""Where the pass's seconds go: each step's own, without those of the steps inside of it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar

_spent: ContextVar[Counter[str] | None] = ContextVar("spent", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[Counter[str]]:
    """The seconds of each step that is taken inside, by name."""
    spent: Counter[str] = Counter()
    token = _spent.set(spent)
    try:
        yield spent
    finally:
        _spent.reset(token)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Inside, the time is that step's."""
    spent = _spent.get()
    started, before = time.perf_counter(), 0.0 if spent is None else spent.total()
    try:
        yield
    finally:
        if spent is not None:
            own = time.perf_counter() - started - (spent.total() - before)
            spent[name] += own  # type: ignore[assignment]  # a Counter of seconds
