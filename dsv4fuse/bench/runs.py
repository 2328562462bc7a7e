"""What was found of whole models, and the files that keep it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4fuse.bench import launches


@dataclass(frozen=True)
class Profile:
    """One way to run a step; None is what was not measured, ``failed`` why there is nothing more.

    ``compile_s``: the first call and any later one that compiled, ``compilations`` of them;
    ``parts``: where its seconds went in torch; ``pass_s``: dsv4fuse's own, ``spent`` by its steps.
    ``peak``: bytes, of a compiled step.
    ``error`` and ``median``: the largest and the middle difference from the way ``against``, of its
    largest value, and ``same`` the share of rows with their largest value at the same place: a
    rounding that turns may choose another expert, and few rows differ much. ``kernels``: by name,
    launches and ms; on a CPU operations; ``families``: their sums.
    """

    name: str
    ms: float | None = None
    graph_ms: float | None = None
    compile_s: float | None = None
    pass_s: float | None = None
    spent: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    compilations: int | None = None
    peak: int | None = None
    against: str = ""
    error: float | None = None
    median: float | None = None
    same: float | None = None
    families: Mapping[str, launches.Figures] = field(default_factory=dict)
    kernels: Mapping[str, launches.Figures] = field(default_factory=dict)
    note: str = ""
    failed: str = ""

    @property
    def launches(self) -> int:
        return sum(count for count, _ in self.families.values())

    @property
    def busy_ms(self) -> float:
        return sum(ms for _, ms in self.families.values())


@dataclass(frozen=True)
class Run:
    """A step of a model in several ways. ``sizes``: what its factory was asked for; ``tokens``:
    how many the step takes; ``regional``: each layer was compiled for itself; ``taken``: sites by
    fusion; ``sites``: all, without their source."""

    model: str
    step: str
    sizes: Mapping[str, Any]
    options: Mapping[str, Any]
    profiles: tuple[Profile, ...]
    tokens: int | None = None
    regional: bool = False
    taken: Mapping[str, int] = field(default_factory=dict)
    sites: tuple[Mapping[str, Any], ...] = ()

    @property
    def title(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items())
        how = ", layer by layer" * self.regional
        return f"{self.step or 'a call'} of {self.model}" + f" ({sizes})" * bool(sizes) + how

    def of(self, way: str) -> Profile | None:
        return next((p for p in self.profiles if p.name == way), None)


def save(runs: Sequence[Run], made_on: Mapping[str, Any], path: pathlib.Path) -> None:
    """The runs, and what they were made on, as JSON."""
    data = {**made_on, "runs": [_slim(dataclasses.asdict(r)) for r in runs]}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _slim(plain: dict[str, Any]) -> dict[str, Any]:
    """Without what was not measured."""
    profiles = [{k: v for k, v in p.items() if v not in (None, "", {})} for p in plain["profiles"]]
    return {**plain, "profiles": profiles}


def load(path: pathlib.Path) -> tuple[list[Run], dict[str, Any]]:
    """What ``save`` wrote; ValueError if it is none."""
    data = json.loads(path.read_text(encoding="utf-8"))
    try:
        runs = [Run(**{**r, "profiles": tuple(_profile(p) for p in r["profiles"]),
                       "sites": tuple(r.get("sites", ()))}) for r in data.pop("runs")]  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no whole models ({error!r}).") from error
    return runs, data


def _profile(plain: Mapping[str, Any]) -> Profile:
    figures = {
        column: {name: (int(n), float(ms)) for name, (n, ms) in plain.get(column, {}).items()}
        for column in ("families", "kernels")
    }
    return Profile(**{**plain, **figures})
