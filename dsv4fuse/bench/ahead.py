"""Compiling what is to be timed, by several processes at once, into the caches that Inductor and
Triton keep on disk: of a benchmark's minutes most are a compiler's, on one core out of many."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

Site = tuple[str, str, str, int]  # fusion, variant, model, tokens
log = logging.getLogger(__name__)


def compile_all(sites: Sequence[Site], workers: int, progress: Callable[[str], None]) -> None:
    """Compiles each site, ours and Inductor's, and runs it once. What fails here fails again,
    with its reason, where it is timed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        running = {pool.submit(_compile, site): site for site in sites}
        for done in as_completed(running):
            name, variant, _, tokens = running[done]
            progress(f"compiled: {name} ({variant}), {tokens} tokens")
            if (error := done.exception()) is not None:
                log.info("%s (%s) at %s tokens", name, variant, tokens, exc_info=error)


def _prepare() -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are many already
    os.environ["OMP_NUM_THREADS"] = "1"


def _compile(site: Site) -> None:
    import torch

    from dsv4fuse.bench import fusions

    name, variant, model, tokens = site
    made = fusions.example(name, variant, model, tokens)
    with torch.no_grad():
        for fn in fusions.both_ways(name, made):
            fn(*made.inputs)
    torch.cuda.empty_cache()
