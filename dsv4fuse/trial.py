"""What running a site shows: does it fit, is it right, which is faster. The same on every rank.

What is found here decides whether the site is taken, so the ranks of a distributed job share one
finding per site (``ranks``). A rank on which the fused op computes something else than the module
leaves the site alone whatever the others found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from dsv4fuse import cache, clock, measure, ranks, select, verify
from dsv4fuse.fusion import Candidate
from dsv4fuse.options import Options


@dataclass(frozen=True)
class Finding:
    """``large``: the unfused region does not fit into free memory, so nothing was run.
    ``wrong``: a sentence why the site is not to be taken. ``times``: (Inductor's µs, ours), a
    sentence why there are none, or None where nobody asked."""

    large: bool = False
    wrong: str | None = None
    times: measure.Times | str | None = None

    def same_choice(self, other: Finding) -> bool:
        """Would both take the site, or both leave it?"""
        return self._choice() == other._choice()

    def _choice(self) -> object:
        times = self.times
        taken = select.compare(times).take if isinstance(times, tuple) else times is None
        return self.wrong is None, taken

    @staticmethod
    def read(plain: Mapping[str, Any]) -> Finding:
        """A finding back from JSON."""
        times = plain["times"]
        return Finding(
            plain["large"], plain["wrong"], tuple(times) if isinstance(times, list) else times
        )


def run(
    candidate: Candidate, region: list[fx.Node], front: list[fx.Node], options: Options,
    timed: bool,
) -> tuple[Finding, dict[str, object]]:  # fmt: skip
    """The job's finding on a site, timed with what is in ``front`` of it, and the record by which a
    later process can ask whether that is still what the job it is part of found (``stale``)."""
    site = repr((candidate.fusion, timed, verify.signature(candidate, [*front, *region])))
    key = hashlib.sha256((site + cache.pass_uuid(options, "finding")).encode()).hexdigest()
    own = _found(candidate, region, front, options, timed and not ranks.known(key))
    found = Finding.read(ranks.agreed(key, asdict(own)))
    if own.wrong not in (None, verify.NO_MEMORY):
        found = own
    return found, {"key": key, **asdict(found)}


def _found(
    candidate: Candidate, region: list[fx.Node], front: list[fx.Node], options: Options,
    timed: bool,
) -> Finding:  # fmt: skip
    wrong = times = None
    with clock.step("checking"):
        if verify.too_large(candidate, region):
            return Finding(large=True)
        if options.verify:
            wrong = verify.check(candidate, region, options.numerics)
    if timed and wrong is None:
        with clock.step("timing"):
            times = measure.times(candidate, region, front, options)
    return Finding(wrong=wrong, times=times)


def stale(records: list[Mapping[str, Any]]) -> bool:
    """Did this job find anything else than these records, which a graph out of a cache rests on?
    What the job has not looked at yet is settled by them: all are asked."""
    pairs = [(Finding.read(r), Finding.read(ranks.agreed(r["key"], r))) for r in records]
    return not all(there.same_choice(now) for there, now in pairs)
