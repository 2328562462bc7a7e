"""A benchmark by several processes: of its minutes most are a compiler's, on one core out of many.

First all is compiled, into the caches that Inductor and Triton keep on disk; then the processes
measure, and take turns on the GPU, so that one loads what it will run while another's is timed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from dsv4fuse.bench import fusions
from dsv4fuse.bench.fusions import Row, Site
from dsv4fuse.verify import said

log = logging.getLogger(__name__)
AT_ONCE = 5  # that measure: one is timed, others load what they will run
_turn: Any = None  # in a worker, the lock that the one who times holds
_seat: Any = None  # and one of the seats for those who measure


def measure_all(
    sites: Sequence[Site], workers: int, progress: Callable[[str], None]
) -> Iterator[tuple[Site, Row | Exception]]:
    """Each site's row, in their order, or what went wrong. ``progress``: twice for each."""
    with _pool(workers) as pool:
        _compile_all(pool, _compile, sites, progress)
        running = [pool.submit(_measure, site) for site in sites]
        crowded = []
        for site, job in zip(sites, running, strict=True):
            progress(_said(site))
            found = job.result()
            if isinstance(found, torch.OutOfMemoryError):
                crowded.append(site)
            else:
                yield site, found
    for site in crowded:  # beside others there was not enough memory
        try:
            yield site, fusions.measure(*site)
        except Exception as error:
            yield site, error


def compile_ours(sites: Sequence[Site], workers: int, progress: Callable[[str], None]) -> None:
    """Compiles ours alone, for a process that runs it later. ``progress``: once for each site."""
    with _pool(workers) as pool:
        _compile_all(pool, _compile_ours, sites, progress)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    given = context.Lock(), context.Semaphore(AT_ONCE)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=given)


def _said(site: Site) -> str:
    return f"{site[0]} ({site[1]}), {site[3]} tokens"


def _compile_all(
    pool: ProcessPoolExecutor, compiling: Callable[[Site], Exception | None],
    sites: Sequence[Site], progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Compiles each site and runs it once. What fails here fails again, with its reason, where it
    is timed."""
    running = {pool.submit(compiling, site): site for site in sites}
    for done in as_completed(running):
        progress(f"compiled: {_said(running[done])}")
        if (error := done.result()) is not None:
            log.info("%s: %s", _said(running[done]), error)


def _prepare(turn: Any, seat: Any) -> None:
    global _turn, _seat
    _turn, _seat = turn, seat
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are many already
    os.environ["OMP_NUM_THREADS"] = "1"


def _compile_ours(site: Site) -> Exception | None:
    return _compile(site, ways=1)


def _compile(site: Site, ways: int = 2) -> Exception | None:
    """The first of ours and Inductor's, or both."""

    def run() -> None:
        made = fusions.example(*site)
        with torch.no_grad():
            for fn in fusions.both_ways(site[0], made)[:ways]:
                fn(*made.inputs)

    return _tried(run)


def _measure(site: Site) -> Row | Exception:
    with _seat:
        return _tried(lambda: fusions.measure(*site, turn=_turn))


def _tried(call: Callable[[], Any]) -> Any:
    """What it returns, or the error in a form that any process can read back."""
    try:
        return call()
    except torch.OutOfMemoryError as error:
        return torch.OutOfMemoryError(str(error))
    except Exception as error:
        return RuntimeError(said(error))
    finally:
        torch.cuda.empty_cache()
