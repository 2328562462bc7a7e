"""Many draws of programs and mutants, by hypothesis, and what came of them in numbers."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import torch
from dsv4fuse.kernels import _common as common
from hypothesis import strategies as st

from dsv4fuse import ops

from . import _check, _mutants, _programs, _ways, host_sync
from ._check import Outcome
from ._hand import Hand
from ._mutants import Mutant

COMPILED = 20  # one program of this many goes through torch.compile, in one of these ways
WAYS = (*_ways.WAYS.items(), ("two sizes", None))
KEPT = 100  # failures of a kind whose programs are written out


@dataclass
class Tally:
    """``counts``: numbers by name, those of a fusion as ``<what> <fusion>``; ``edits``: what the
    check on random inputs said of each kind; ``failures``: what went wrong, and where."""

    counts: Counter[str] = field(default_factory=Counter)
    edits: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)

    def __iadd__(self, other: Tally) -> Tally:
        self.counts += other.counts
        self.edits += other.edits
        for failure in other.failures:
            if sum(f["what"] == failure["what"] for f in self.failures) < KEPT:
                self.failures.append(failure)
        return self

    def failed(self, what: str, said: str, program: str, seed: int) -> None:
        self.counts[what] += 1
        self.failures.append(dict(what=what, said=said[-4000:], program=program, seed=str(seed)))


def prepare() -> None:
    """A process of its own: references instead of interpreted kernels, errors instead of graphs
    left alone, one thread, and no word of the sites that are rejected."""
    assert ops
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    common.INTERPRETED = False
    os.environ["DSV4FUSE_DEBUG"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    # bf16 products of oneDNN are an illegal instruction on some CPUs
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def drawn(draw: Callable[[Callable[..., Any]], None], seed: int, examples: int) -> None:
    """Calls ``draw(choose)`` for that many different draws."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, database=None, deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(st.data())
    def each(data: st.DataObject) -> None:
        draw(data.draw)

    each()


def programs(seed: int, examples: int, only: str = "") -> Tally:
    """Programs that keep their meaning: each must be fused as stated and equal eager."""
    tally = Tally()

    def one(choose: Callable[..., Any]) -> None:
        # Drawn: hypothesis draws again, and may not meet another program for what was counted.
        kind = choose(st.integers(0, COMPILED - 1))
        if kind == 0 and only in host_sync.NAME:
            _add(tally, _valid(choose), seed)
            return
        name, way = choose(st.sampled_from(WAYS)) if kind == 1 else ("", _check.fused)
        two = _programs.two_sizes(choose, only) if way is None else None
        if two is not None:
            outcome = _ways.two_sizes(*two)
        else:
            way = way or _ways.function
            outcome = _check.check(_programs.program(choose, only), way)
        tally.counts[f"way {name}"] += bool(name)
        _add(tally, outcome, seed)

    drawn(one, seed, examples)
    return tally


def _valid(choose: Callable[..., Any]) -> Outcome:
    """Constants of the host, until their shapes fit."""
    while True:
        outcome = host_sync.check(host_sync.constants(Hand(choose)))
        if not outcome.invalid:
            return outcome


def _add(tally: Tally, o: Outcome, seed: int) -> None:
    tally.counts["programs"] += 1
    if o.invalid == _ways.FIXED:
        tally.counts[o.invalid] += 1
        return
    if o.invalid:
        tally.failed("invalid", o.invalid, o.program, seed)
        return
    for fusion, count in o.sites.items():
        tally.counts[f"sites {fusion}"] += count
        tally.counts[f"taken {fusion}"] += min(count, o.taken[fusion])
    if o.wrong:
        tally.failed("wrong", o.wrong, o.program, seed)
    if o.crash:
        tally.failed("crash", o.crash, o.program, seed)
    tally.counts["in the last bits"] += bool(o.inexact and not o.wrong)
    for fusion, reason in o.missed:
        tally.failed(f"missed {fusion}", reason, o.program, seed)


def mutants(seed: int, examples: int, only: str = "") -> Tally:
    """Programs with one wrong edit, half of them in the source and half of them in the graph."""
    tally = Tally()

    def one(choose: Callable[..., Any]) -> None:
        if only in host_sync.NAME and choose(st.integers(0, COMPILED - 1)) == 0:
            found = host_sync.mutant(choose)
        elif choose(st.booleans()):
            two = _programs.mutant(choose, only)
            found = None if two is None else _mutants.of_pieces(*two)
        else:
            found = _mutants.of_graph(_programs.site(choose, only), choose)
        if found is not None:
            _add_mutant(tally, found, seed)

    drawn(one, seed, examples)
    return tally


def _add_mutant(tally: Tally, m: Mutant, seed: int) -> None:
    if m.void:
        tally.counts["edits without effect"] += 1
        return
    tally.counts["mutants"] += 1
    tally.counts["mutants taken as what they are"] += bool(m.taken and not m.wrong)
    if m.forced:
        tally.counts[f"forced, {m.forced}"] += 1
        tally.edits[f"{m.edit.partition(' at ')[0]}: {m.forced}"] += 1
    if m.wrong:
        tally.failed("mutant taken for another", f"{m.edit}: {m.wrong}", m.program, seed)
    if m.crash:
        tally.failed("mutant crash", f"{m.edit}: {m.crash}", m.program, seed)
    if m.forced == "close":
        tally.failed("not refused", m.edit, f"{m.fusion} in {m.program}", seed)


def chunk(seed: int, size: int, only: str = "") -> Tally:
    """A share of the work: ``size`` programs and as many mutants."""
    tally = Tally()
    for draw in (programs, mutants):
        try:
            tally += draw(seed, size, only)
        except Exception:  # of the generator itself: it must not end the run
            tally.failed("generator", traceback.format_exc(), draw.__name__, seed)
    return tally
