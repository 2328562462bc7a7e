"""What was fused, what was not, and why: the record that every compilation leaves behind.

A report is plain data. It is written to disk as JSON beside Inductor's cache, because the pass
does not run when that cache is warm, and read back from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Literal, get_args

from torch.utils.weak import WeakIdKeyDictionary

from dsv4fuse.options import Options

Status = Literal["taken", "declined", "rejected", "near-miss"]

#: taken: replaced by the kernel. declined: matched, but left to Inductor for the reason given.
#: rejected: matched, but the check on random inputs failed. near-miss: almost the pattern.
STATUSES: tuple[Status, ...] = get_args(Status)

# The reports of the graphs that a tensor is an input of; weak, so that models can go.
_by_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()

# Raise when the JSON changes shape; an older file is then read as "no report".
_FORMAT = 1


class FusionError(RuntimeError):
    """The fusions made are not those that ``expect`` or ``strict`` ask for.

    ``report`` is the report that was checked, for whoever catches this and wants to show it.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        """Keep the report beside the message."""
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Site:
    """One place in a graph where a fusion was taken, or was not, with the reason."""

    fusion: str
    status: Status
    module: str = ""
    """Path of the user's module, such as ``model.layers.0.self_attn``."""
    file: str = ""
    line: int = 0
    reason: str = ""
    """A full sentence."""
    graph: int = 0
    """Which graph of the report, from 0."""
    detail: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Anything else worth keeping: dtypes, rules used, wanted and found, times."""

    def __post_init__(self) -> None:
        """Refuse a status that no reader of the report would count."""
        if self.status not in STATUSES:
            raise ValueError(f"A site's status is one of {STATUSES}, not {self.status!r}.")

    @property
    def where(self) -> str:
        """``file:line`` as an editor takes it, the module path, or what there is."""
        return _where(self.file, self.line) or self.module or "an unknown place"


@dataclass(frozen=True)
class Break:
    """One graph break: no fusion can reach across it."""

    reason: str
    file: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """``file:line``, or what there is."""
        return _where(self.file, self.line) or "an unknown place"


@dataclass
class Report:
    """The sites, graph breaks and notes of one or several compiled graphs.

    ``graphs`` counts the graphs seen and ``seconds`` the time dsv4fuse itself took, ``spent`` that
    of its steps: matching, planning, waiting for kernels, checking, timing, tuning. Reports merge
    with ``+=``; ``str(report)`` and :meth:`print` fold equal rows of different layers, ``sites``
    keeps them all.
    """

    sites: list[Site] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    graphs: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    spent: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, model: Any) -> Report:
        """The report of what was compiled of ``model``, a module or what torch.compile made of it.

        It is found by the model's parameters and buffers, so it covers every graph that used one
        of them; it is empty before the first call.
        """
        merged, seen = cls(), set[int]()
        for tensor in (*model.parameters(), *model.buffers()):
            for report in _by_tensor.get(tensor, []):
                if id(report) not in seen:
                    seen.add(id(report))
                    merged += report
        return merged

    def belongs_to(self, tensors: Iterable[Any]) -> None:
        """Make this report one that ``of`` finds for a model with any of these tensors."""
        for tensor in tensors:
            _by_tensor.setdefault(tensor, []).append(self)

    def counts(self) -> dict[str, int]:
        """How many sites of each fusion were taken; only fusions with at least one."""
        return dict(sorted(self._count("taken").items()))

    def with_status(self, *statuses: Status) -> list[Site]:
        """The sites that have one of these statuses, in the order found."""
        return [site for site in self.sites if site.status in statuses]

    def found(self) -> list[Mapping[str, Any]]:
        """What running the sites showed, of those where the choice rests on that (``trial``)."""
        return [site.detail["found"] for site in self.sites if "found" in site.detail]

    def _count(self, status: Status) -> Counter[str]:
        return Counter(site.fusion for site in self.sites if site.status == status)

    def __iadd__(self, other: Report) -> Report:
        """Take over the content of ``other``, whose graphs are numbered after this one's."""
        offset = self.graphs
        self.sites += [dataclasses.replace(s, graph=s.graph + offset) for s in other.sites]
        # Each graph of one function reports the same breaks and notes: say them once.
        self.breaks += [b for b in dict.fromkeys(other.breaks) if b not in self.breaks]
        self.notes += [n for n in dict.fromkeys(other.notes) if n not in self.notes]
        self.graphs += other.graphs
        self.seconds += other.seconds
        self.spent += other.spent
        return self

    def __add__(self, other: Report) -> Report:
        """A new report with the content of both."""
        merged = Report()
        merged += self
        merged += other
        return merged

    def to_json(self, indent: int | None = None) -> str:
        """The whole report as JSON text. Values in ``detail`` that JSON lacks become strings."""
        data = {
            "format": _FORMAT,
            "sites": [_plain(site) for site in self.sites],
            "breaks": [_plain(brk) for brk in self.breaks],
            "graphs": self.graphs,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "spent": dict(self.spent),
        }
        return json.dumps(data, indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """A report read back from :meth:`to_json`; ``ValueError`` when the text is not one."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"This text is not a dsv4fuse report of format {_FORMAT}.")
        try:
            return cls(
                sites=[Site(**site) for site in data["sites"]],
                breaks=[Break(**brk) for brk in data["breaks"]],
                graphs=int(data["graphs"]),
                notes=[str(note) for note in data["notes"]],
                seconds=float(data["seconds"]),
                spent=Counter({str(k): float(s) for k, s in data.get("spent", {}).items()}),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"This dsv4fuse report is damaged: {error}.") from error

    def check(self, options: Options) -> None:
        """Raise :class:`FusionError` when ``options.expect`` or ``options.strict`` is not met."""
        complaints = list(self._unexpected(options.expect or {}))
        if options.strict:
            complaints += self._not_strict()
        if complaints:
            raise FusionError("\n".join(complaints), self)

    def _unexpected(self, expect: Mapping[str, int]) -> Iterable[str]:
        taken = self._count("taken")
        for fusion, wanted in sorted(expect.items()):
            if taken[fusion] == wanted:
                continue
            yield (
                f"Expected {_sites(wanted)} of {fusion!r} to be fused, but "
                f"{taken[fusion]} {'was' if taken[fusion] == 1 else 'were'}."
                f"{self._why_not(fusion)}"
            )

    def _why_not(self, fusion: str) -> str:
        """The reasons of the sites of ``fusion`` that were not taken, most frequent first."""
        reasons: dict[tuple[str, str], list[Site]] = {}
        for site in self.sites:
            if site.fusion == fusion and site.status != "taken":
                reasons.setdefault((site.status, site.reason), []).append(site)
        if not reasons:
            near = "No other place in the graph resembles it."
            return f" {near} See dsv4fuse.explain for what the graph holds."
        ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
        return "".join(
            f"\n  {len(sites)} {status}, first at {sites[0].where}: {reason}"
            for (status, reason), sites in ordered
        )

    def _not_strict(self) -> list[str]:
        """One sentence for each different near-miss or rejected site."""
        found: dict[tuple[str, str, str, str], int] = {}
        for site in self.with_status("near-miss", "rejected"):
            key = (site.fusion, site.status, site.where, site.reason)
            found[key] = found.get(key, 0) + 1
        verbs = {"near-miss": "nearly matches", "rejected": "matches but fails the check of"}
        lines = [
            f"strict=True: {where} {verbs[status]} {fusion!r}"
            f"{f' ({_sites(n)})' if n > 1 else ''}: {reason}"
            for (fusion, status, where, reason), n in found.items()
        ]
        if lines:
            lines.append(
                "Change the module as the reasons say, exclude the fusion, or drop strict=True."
            )
        return lines

    def __str__(self) -> str:
        """The report as plain text, one row a line: no colour, nothing wrapped or cut."""
        from dsv4fuse import render

        return render.to_text(self)

    def to_html(self, file: str | os.PathLike[str] | None = None) -> str:
        """The report as one self-contained HTML page, also written to ``file`` where one is given.

        It quotes the lines of the user's modules as they are on this machine now.
        """
        from dsv4fuse import html

        text = html.page(self)
        if file is not None:
            pathlib.Path(file).write_text(text, encoding="utf-8")
        return text

    def print(self, file: IO[str] | None = None) -> None:
        """Print the report: a table for a terminal, :meth:`__str__` for a file or a pipe."""
        from dsv4fuse import render

        render.print_report(self, file)


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"


def _where(file: str, line: int) -> str:
    return f"{file}:{line}" if file and line else file


def _plain(record: Site | Break) -> dict[str, Any]:
    return {f.name: _jsonable(getattr(record, f.name)) for f in dataclasses.fields(record)}


def _jsonable(value: object) -> Any:
    """``value`` in JSON's own types; dtypes, symbolic sizes and the like become their text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_jsonable(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return str(value)
