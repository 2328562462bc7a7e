"""What there is: every fusion, where it is taken and how fast it is; every op; as Markdown tables.

The tables in README.md and docs/ are made here, from the registry, the measurements beside the
kernels and the sites found in real models, and stand there between markers:
``<!-- fusions -->`` … ``<!-- /fusions -->``.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsv4fuse.bench import limits, runs
from dsv4fuse.fusion import registry
from dsv4fuse.select import AS_FAST, CLEAR, measured

MODELS = "examples/results/sites.json"  # of a checkout; a wheel has none
STEPS = "examples/results/*_flash_*.json"
LIMITS = "kernels/limits.json"
STEP_LIMITS = "examples/results/*_limits.json"
LONGEST = 10  # kernels of a step in the table of docs/speed.md
SHOWN = (1, 64, 1024, 8192)  # numbers of tokens in the tables of docs/speed.md
VERSIONS = "tests/versions.json"
GENERATED = "tests/generated.json"


class MarkerError(ValueError):
    """A marker that no table belongs to, or that is not closed."""


@dataclass(frozen=True)
class Variant:
    """One measured variant: µs of Inductor's code and ours by number of tokens."""

    name: str
    times: tuple[tuple[int, float, float], ...]
    varied: bool = False  # see Fusion

    @property
    def ratios(self) -> list[float]:
        return [ours / inductor for _, inductor, ours in self.times]

    @property
    def region(self) -> str:
        """The numbers of tokens at which ``select="auto"`` takes it."""
        limit = CLEAR if self.varied else AS_FAST
        won = [t for t, inductor, ours in self.times if ours <= limit * inductor]
        every = [t for t, _, _ in self.times]
        if won == every:
            return f"{every[0]}–{every[-1]}"
        rest = ", else timed on the spot" * self.varied
        return (", ".join(_runs(won, every)) or "nowhere") + rest


def _runs(won: list[int], every: list[int]) -> list[str]:
    """Numbers that follow each other in ``every`` as ranges."""
    runs: list[list[int]] = []
    for t in won:
        if runs and every.index(t) == every.index(runs[-1][-1]) + 1:
            runs[-1].append(t)
        else:
            runs.append([t])
    return [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def variants(fusion: str) -> list[Variant]:
    """What is measured of a fusion beside its kernel, for the sizes of DeepSeek-V4-Flash."""
    rows = [r for r in (measured(fusion) or {"rows": []})["rows"] if r["model"] == "flash"]
    names = dict.fromkeys(r["variant"] for r in rows)
    return [
        Variant(
            name,
            tuple(sorted((r["tokens"], r["inductor"], r["ours"]) for r in rows
                         if r["variant"] == name)),
            registry()[fusion].varied,
        )
        for name in names
    ]  # fmt: skip


def replaces(fusion: str) -> str:
    """The first sentence of its pattern's docstring."""
    doc = importlib.import_module(f"dsv4fuse.patterns.{fusion}").__doc__ or ""
    text = " ".join(doc.split("\n\n")[0].split()).rstrip(".")
    return text[:1].upper() + text[1:]


def found_in(fusion: str, root: pathlib.Path) -> list[str]:
    """The models in which sites of it were taken."""
    models: Mapping[str, Any] = json.loads((root / MODELS).read_text())["models"]
    return [name for name, steps in models.items() if any(s.get(fusion) for s in steps.values())]


def fusions_table(root: pathlib.Path) -> str:
    """Of every fusion: what it replaces, the models, its speed against Inductor's and where."""
    rows = []
    for name in registry():
        timed = variants(name)
        ratios = [r for v in timed for r in v.ratios]
        speed = f"{min(ratios):.2f}–{max(ratios):.2f}" if ratios else "timed on the spot"
        if not registry()[name].kernel:
            speed = "no kernel"
        by_region: dict[str, list[str]] = {}
        for v in timed:
            by_region.setdefault(v.region, []).append(v.name)
        parts = [r if len(by_region) == 1 else f"{', '.join(n)}: {r}" for r, n in by_region.items()]
        models = ", ".join(found_in(name, root)) or "–"
        rows.append((f"`{name}`", replaces(name), models, speed, "; ".join(parts) or "–"))
    titles = ("fusion", "replaces", "taken in", "time / Inductor's", "taken at (tokens)")
    return _table(titles, rows)


def listing() -> str:
    """The fusions as plain text, for a terminal."""
    lines = []
    for name in registry():
        lines += [name, f"  {replaces(name)}."]
        for v in variants(name):
            r = v.ratios
            lines.append(
                f"  {v.name}: {min(r):.2f}–{max(r):.2f} of Inductor's time, "
                f"taken at these numbers of tokens: {v.region}"
            )
    return "\n".join(lines)


def times_table(root: pathlib.Path) -> str:
    """Of every measured variant: µs of Inductor → dsv4fuse (ratio) by number of tokens."""
    rows = []
    for name in registry():
        for v in variants(name):
            known = {t: (inductor, ours) for t, inductor, ours in v.times}
            pairs = (known.get(t) for t in SHOWN)
            cells = (f"{p[0]:.2f} → {p[1]:.2f} ({p[1] / p[0]:.2f})" if p else "" for p in pairs)
            rows.append((f"`{name}`", v.name, *cells))
    return _table(("fusion", "variant", *(f"{t}" for t in SHOWN)), rows)


def limits_table(root: pathlib.Path) -> str:
    """Of profiled calls of ours the kernel that takes longest, and what limits it."""
    file, rows = root / LIMITS, []
    columns = ("µs", "limit", "DRAM %", "L2 %", "L1 %", "tensor %", "waits for")
    found = limits.load(file)[0] if file.exists() else []
    found = [r for r in found if r.model == "flash" and r.tokens in SHOWN]
    for name, fusion in registry().items():
        place = {variant: i for i, variant in enumerate(fusion.examples)}
        own = [row for row in found if row.fusion == name and row.variant in place]
        for row in sorted(own, key=lambda row: (place[row.variant], row.tokens)):
            cells = limits.cells(row.longest)
            if len(row.kernels) > 1:
                cells["µs"] += f" of {sum(kernel.us for kernel in row.kernels):.2f}"
            of = (f"`{name}`", row.variant, str(row.tokens), f"`{row.longest.name}`")
            rows.append((*of, *(cells[title] for title in columns)))
    titles = ("fusion", "variant", "tokens", "longest kernel", *columns)
    return _table(titles, rows) if rows else "No profile is kept yet."


def step_limits_table(root: pathlib.Path) -> str:
    """Of profiled steps of whole models the launches that take the most time, joined by name."""
    columns = ("limit", "DRAM %", "L2 %", "L1 %", "tensor %")
    rows = []
    for file in sorted(root.glob(STEP_LIMITS)):
        for row in limits.load(file)[0]:
            total = sum(k.total for k in row.kernels)
            for k in row.kernels[:LONGEST]:
                cells = limits.cells(k)
                share = f"{100 * k.total / total:.0f}"
                of = (f"{row.variant} of {row.fusion}", f"`{k.name}`", str(k.launches), share)
                rows.append((*of, cells["µs"], *(cells[title] for title in columns)))
    titles = ("", "kernel", "launches", "% of the time", "µs of the longest", *columns)
    return _table(titles, rows) if rows else "No profile is kept yet."


def steps_table(root: pathlib.Path) -> str:
    """Of every step of a whole model that was measured on a GPU: the ways it was run in."""
    titles = ("", "", "ms", "under CUDA graphs", "launches", "compiling, s")
    names = {"eager": "eager", "inductor": "Inductor", "dsv4fuse": "dsv4fuse"}
    rows = []
    for file in sorted(root.glob(STEPS)):
        for run in runs.load(file)[0]:
            for p in sorted(run.profiles, key=lambda p: list(names).index(p.name)):
                times = (f"{x:.2f}" if x else "–" for x in (p.ms, p.graph_ms))
                cells = (*times, *(f"{x:.0f}" if x else "–" for x in (p.launches, p.compile_s)))
                rows.append((run.title, names[p.name], *([p.failed] * 4 if p.failed else cells)))
    return _table(titles, rows)


def ops_table(root: pathlib.Path) -> str:
    """Every op with the file that says its shapes, dtypes and roundings."""
    kernels = importlib.import_module("dsv4fuse.kernels")
    rows = []
    for stem in sorted(m.name for m in pkgutil.iter_modules(kernels.__path__)):
        if stem.startswith("_"):
            continue
        module = importlib.import_module(f"dsv4fuse.kernels.{stem}")
        names = [n for n, v in vars(module).items() if isinstance(v, torch.library.CustomOpDef)]
        for name in names:
            schema = getattr(torch.ops.dsv4fuse, name).default._schema
            given = ", ".join(a.name + "=…" * a.has_default_value() for a in schema.arguments)
            doc = " ".join((module.__doc__ or "").split("\n\n")[0].split())
            rows.append((f"`{name}`", doc, f"`{given}`", f"[{stem}.py](../kernels/{stem}.py)"))
    return _table(("op", "what it computes", "arguments", "shapes, dtypes, rounding"), rows)


def versions_table(root: pathlib.Path) -> str:
    """What ``make versions`` kept of each version of torch."""
    file = root / VERSIONS
    rows = json.loads(file.read_text()) if file.exists() else []
    columns = ("torch", "triton", "python", "device", "date", "passed", "skipped")
    cells = [(*(str(r[c]) for c in columns), ", ".join(r["failed"]) or "none") for r in rows]
    return _table((*columns, "failed"), cells) if cells else "No run is kept yet."


def generated_table(root: pathlib.Path) -> str:
    """What ``make generate`` kept of each run of drawn programs and mutants."""
    file = root / GENERATED
    rows = json.loads(file.read_text()) if file.exists() else []
    columns = ("commit", "torch", "date", "programs", "sites", "taken", "mutants", "forced", "bad")
    cells = []
    for r in rows:
        sites, taken = (sum(r[k].values()) for k in ("sites", "taken"))
        forced = ", ".join(f"{n} {name}" for name, n in r["forced"].items())
        bad = ", ".join(f"{n} {name}" for name, n in r["bad"].items()) or "none"
        numbers = (str(r["programs"]), str(sites), f"{taken} ({100 * taken / max(sites, 1):.2f} %)")
        cells.append((r["commit"], r["torch"], r["date"], *numbers, str(r["mutants"]), forced, bad))
    return _table(columns, cells) if cells else "No run is kept yet."


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


TABLES: Mapping[str, Callable[[pathlib.Path], str]] = {
    "fusions": fusions_table,
    "times": times_table,
    "limits": limits_table,
    "steps": steps_table,
    "step_limits": step_limits_table,
    "ops": ops_table,
    "versions": versions_table,
    "generated": generated_table,
}
_OPEN = re.compile(r"^<!-- (\w+) -->$", re.MULTILINE)


def renewed(text: str, root: pathlib.Path) -> str:
    """A page with every table between its markers as it is now. Raises MarkerError."""
    at = 0
    while (opened := _OPEN.search(text, at)) is not None:
        name = opened[1]
        closing = f"<!-- /{name} -->"
        end = text.find(closing, opened.end())
        if name not in TABLES or end < 0:
            raise MarkerError(
                f"The marker {opened[0]} needs {closing} behind it and a name of "
                f"{', '.join(TABLES)}."
            )
        made = f"\n{TABLES[name](root)}\n"
        text = text[: opened.end()] + made + text[end:]
        at = opened.end() + len(made)
    return text
