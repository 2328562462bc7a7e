"""Compiling by several processes, into the caches that Inductor and Triton keep on disk: of a
benchmark's minutes most are a compiler's, on one core out of many. They have left the GPU when the
first row is timed or profiled, for what runs beside it changes its time.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from dsv4fuse import compat
from dsv4fuse.bench import fusions
from dsv4fuse.bench.fusions import Site
from dsv4fuse.verify import said

log = logging.getLogger(__name__)


def compile_all(
    sites: Sequence[Site], workers: int, progress: Callable[[str], None], ways: int = 2
) -> None:
    """Compiles each site, ours and (``ways`` of 2) Inductor's, and runs it once. What fails here
    fails again, with its reason, where it is measured. ``progress``: once for each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        running = {pool.submit(_compile, site, ways): site for site in sites}
        for done in as_completed(running):
            name, variant, _, tokens = running[done]
            progress(f"compiled: {name} ({variant}), {tokens} tokens")
            if (why := done.result()) is not None:
                log.info("%s (%s), %s tokens: %s", name, variant, tokens, why)


def _prepare() -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are many already
    os.environ["OMP_NUM_THREADS"] = "1"


def _compile(site: Site, ways: int) -> str | None:
    """The first of ours and Inductor's, or both; why it did not work."""
    try:
        made = fusions.example(*site)
        with torch.no_grad(), compat.tuned_anew():
            for fn in fusions.both_ways(site[0], made)[:ways]:
                fn(*made.inputs)
    except Exception as error:
        return said(error)
    finally:
        torch.cuda.empty_cache()
    return None
