"""The kernels that the check of a graph's sites will launch, compiled at once in torch's compile
workers: the launches then find them in Triton's cache on disk.

In processes, for in threads it fails now and then (kernels/NOTES.md). Nothing depends on it: what
no worker compiles, in time and under the launch's own key, is compiled where it is launched.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
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


@contextlib.contextmanager
def compiling(candidates: Iterable[Candidate], device: torch.device) -> Iterator[None]:
    """Inside, workers compile, for that GPU, what the candidates launch and no cache holds yet;
    at the end it is there, or will not be. Whatever goes wrong is logged and no more."""
    started: list[tuple[Specialised, Future[None]]] = []
    try:
        started.extend(_started(candidates, device))
    except Exception:
        log.debug("not every kernel is compiled ahead", exc_info=True)
    yield
    with clock.step("waiting for kernels"):
        done, _ = futures.wait([future for _, future in started], PATIENCE)
    for kernel, future in started:
        ended = future in done and not future.cancelled()
        error = future.exception() if ended else "no worker was free"
        if error is not None:
            log.debug("%s was not compiled ahead: %s", kernel.name, error)


def _started(
    candidates: Iterable[Candidate], device: torch.device
) -> Iterator[tuple[Specialised, Future[None]]]:
    """Each kernel and the job that compiles it, unless it is but one."""
    if not compile_workers.start():
        return
    missing = _missing(candidates, device)
    first = list(itertools.islice(missing, 2))
    if len(first) < 2:
        return
    workers = compile_workers.pool(0)
    if workers is None:  # yet: meanwhile all are found
        first += missing
        workers = compile_workers.pool(HERE * len(first))
    for kernel in itertools.chain(first, missing) if workers else ():
        job = compile_workers.compiled, kernel, triton.knobs.cache.dir
        yield kernel, workers.submit(*job)


def _missing(candidates: Iterable[Candidate], device: torch.device) -> Iterator[Specialised]:
    met = set[str]()
    for kernel in kernels(candidates, device):
        if kernel.key not in met and not kernel.on_disk():
            yield kernel
        met.add(kernel.key)


def kernels(candidates: Iterable[Candidate], device: torch.device) -> Iterator[Specialised]:
    """What the candidates launch on that GPU and this process has not compiled."""
    for candidate in candidates:
        with compat.outside_compilation(), described() as found:
            try:
                with FakeTensorMode(allow_non_fake_inputs=True):
                    inputs = [_fake(n, device) for n in candidate.inputs]
                with compat.bodies_of_ops():
                    candidate.call(*inputs)
            except Exception:  # the check runs into it too, and says so
                log.debug("the launches of %s", candidate.fusion, exc_info=True)
        yield from found


def _fake(node: fx.Node, device: torch.device) -> Any:
    """Sizes are those that the check draws inputs of."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return compat.hint(value)
    sizes, strides = ([compat.hint(n) for n in ns] for ns in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=device)
