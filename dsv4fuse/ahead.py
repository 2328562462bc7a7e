"""The kernels that the check of a graph's sites will launch, compiled at once in torch's compile
workers: the launches then find them in Triton's cache on disk.

In processes, for in threads it fails now and then (kernels/NOTES.md). Nothing depends on it: what
no worker compiles, in time and under the launch's own key, is compiled where it is launched.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import torch
import triton
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4fuse import clock, compat, compile_workers
from dsv4fuse.fusion import Candidate
from dsv4fuse.kernels._launch import Specialised, described

log = logging.getLogger("dsv4fuse")
HERE = 0.5  # seconds that a kernel takes at least; so long, for each, workers may need to start
PATIENCE = 60.0  # seconds for all of them, of which one was seen to take four


class Jobs:
    """Kernels on their way, for that GPU: those of the calls which no cache holds yet.

    ``calls``: candidates and, equal for those whose calls do the same, something to ask for them
    by. Whatever goes wrong is logged and no more.
    """

    def __init__(self, calls: Iterable[tuple[object, Candidate]], device: torch.device) -> None:
        self._missing, self._told = set[str](), set[str]()  # keys
        self._until = dict[object, int]()  # of a call, how many were missing by then
        self._started = list[tuple[Specialised, Future[None]]]()  # in that order
        self._late = time.monotonic() + PATIENCE
        try:
            if compile_workers.start():
                self._start(self._new(calls, device))
        except Exception:
            log.debug("not every kernel is compiled ahead", exc_info=True)

    def _start(self, missing: Iterator[Specialised]) -> None:
        first = list(itertools.islice(missing, 2))
        if len(first) < 2:
            return  # one is compiled as fast where it is launched
        workers = compile_workers.pool(0)
        if workers is None:  # yet: meanwhile all are found
            first += missing
            workers = compile_workers.pool(HERE * len(first))
        for kernel in itertools.chain(first, missing) if workers else ():
            job = compile_workers.compiled, kernel, triton.knobs.cache.dir
            self._started.append((kernel, workers.submit(*job)))

    def _new(
        self, calls: Iterable[tuple[object, Candidate]], device: torch.device
    ) -> Iterator[Specialised]:
        for call, candidate in calls:
            for kernel in kernels(candidate, device):
                if kernel.key not in self._missing and not kernel.on_disk():
                    self._missing.add(kernel.key)
                    yield kernel
            self._until[call] = len(self._missing)

    def wait(self, call: object) -> None:
        """Until the kernels of that call are compiled, or will not be."""
        started = self._started[: self._until.get(call, 0)]
        with clock.step("waiting for kernels"):
            left = max(0.0, self._late - time.monotonic())
            done, _ = futures.wait([future for _, future in started], left)
        for kernel, future in started:
            ended = future in done and not future.cancelled()
            error = future.exception() if ended else "no worker was free"
            if error is not None and kernel.key not in self._told:
                self._told.add(kernel.key)
                log.debug("%s was not compiled ahead: %s", kernel.name, error)


def kernels(candidate: Candidate, device: torch.device) -> list[Specialised]:
    """What the candidate launches on that GPU and this process has not compiled."""
    with compat.outside_compilation(), described() as found:
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                inputs = [_fake(n, device) for n in candidate.inputs]
            with compat.bodies_of_ops():
                candidate.call(*inputs)
        except Exception:  # the check runs into it too, and says so
            log.debug("the launches of %s", candidate.fusion, exc_info=True)
    return found


def _fake(node: fx.Node, device: torch.device) -> Any:
    """Sizes are those that the check draws inputs of."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return compat.hint(value)
    sizes, strides = ([compat.hint(n) for n in ns] for ns in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=device)
