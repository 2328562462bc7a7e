"""What ``bench --e2e`` found, as tables: the ways side by side, and the times of single sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv4fuse.bench.machine import described
from dsv4fuse.bench.runs import Profile, Run
from dsv4fuse.select import SLOWER

NAMES = {"eager": "eager", "inductor": "Inductor", "dsv4fuse": "dsv4fuse"}
NOTHING = "–"
NO_GPU = "Without a GPU no kernel of dsv4fuse runs: these times say nothing about its speed."


def show(runs: Sequence[Run], made_on: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints everything that was measured."""
    console = console or Console()
    console.print(described(dict(made_on)), highlight=False)
    for run in runs:
        names = (NAMES.get(p.name, p.name) for p in run.profiles)
        _print(console, run.title, ("", *names), rows(run, bool(made_on.get("gpu"))))
        timed = site_rows(run)
        if timed:
            titles = ("fusion", "sites", "", "Inductor µs", "ours µs", "ratio", "measured")
            _print(console, f"Sites, {run.title}", titles, timed)
            console.print(verdict(run), highlight=False)
    if not made_on.get("gpu"):
        console.print(NO_GPU, highlight=False)


def rows(run: Run, on_gpu: bool) -> list[tuple[str, ...]]:
    """A name, and a cell for each way: first whether they compute the same, then the times."""
    found = run.profiles
    steps = dict.fromkeys(step for p in found for step in p.spent)
    parts = dict.fromkeys(part for p in found for part in p.parts)
    table = [
        ("largest difference", *map(_difference, found)),
        ("median difference", *(_cell(p.median, lambda x: f"{x:.1e}") for p in found)),
        ("same argmax", *(_cell(p.same, lambda x: f"{x:.2%} of rows") for p in found)),
        ("ms", *(p.failed or _number(p.ms, 3) for p in found)),
        ("ms under CUDA graphs", *(p.note or _number(p.graph_ms, 3) for p in found)),
        ("tokens/s", *(_cell(_rate(run, p), lambda x: f"{x:.0f}") for p in found)),
        ("launches" if on_gpu else "operations", *(_cell(p.launches or None, str) for p in found)),
        *_families(found),
        ("peak memory, GB", *(_cell(p.peak, lambda x: f"{x / 1e9:.2f}") for p in found)),
        ("compiling, s", *(_number(p.compile_s, 1) if p.name != "eager" else NOTHING
                           for p in found)),
        *((f"  {part}", *(_number(p.parts.get(part), 1) for p in found)) for part in parts),
        ("  dsv4fuse's own", *(_number(p.pass_s, 1) for p in found)),
        *((f"    {step}", *(_number(p.spent.get(step), 1) for p in found)) for step in steps),
        ("  calls that compiled", *(_cell(p.compilations or None, str) for p in found)),
        ("sites taken", *_of_ours(found, sum(run.taken.values()))),
        *((f"  {name}", *_of_ours(found, n)) for name, n in run.taken.items()),
        *((f"sites {status}", *_of_ours(found, n)) for status, n in _not_taken(run).items()),
    ]  # fmt: skip
    return [row for row in table if any(cell != NOTHING for cell in row[1:])]


def site_rows(run: Run) -> list[tuple[str, ...]]:
    """Of the sites that were timed, equal ones together: both times, the slowest ratio first."""
    keys = ("fusion", "status", "inductor", "ours", "measured")
    timed = Counter(tuple(site[k] for k in keys) for site in run.sites if "ours" in site)
    ordered = sorted(timed.items(), key=lambda item: -item[0][3] / item[0][2])
    return [
        (fusion, str(count), status, f"{inductor:.2f}", f"{ours:.2f}", f"{ours / inductor:.2f}",
         str(measured))
        for (fusion, status, inductor, ours, measured), count in ordered
    ]  # fmt: skip


def verdict(run: Run) -> str:
    """Is a site taken that is slower than Inductor, as far as sites were timed?"""
    taken = [site for site in run.sites if site["status"] == "taken"]
    ratios = [site["ours"] / site["inductor"] for site in taken if "ours" in site]
    untimed = len(taken) - len(ratios)
    rest = f" {untimed} were not timed." if untimed else ""
    if not ratios:
        return f"None of the {len(taken)} sites taken was timed." if taken else "No site was taken."
    slower = sum(ratio > SLOWER for ratio in ratios)
    return (
        f"Of {len(taken)} sites taken, {slower} are slower than Inductor's code by more than "
        f"{100 * (SLOWER - 1):.0f} %; the largest ratio is {max(ratios):.2f}.{rest}"
    )


def _not_taken(run: Run) -> Counter[str]:
    return Counter(site["status"] for site in run.sites if site["status"] != "taken")


def _families(found: Sequence[Profile]) -> Iterable[tuple[str, ...]]:
    """Launches and time of each family, where any way has it."""
    for name in dict.fromkeys(f for p in found for f in p.families):
        cells = (p.families.get(name) for p in found)
        yield (f"  {name}", *(f"{c[0]} in {c[1]:.3f} ms" if c else NOTHING for c in cells))
    yield ("  in all, ms", *(_number(p.busy_ms or None, 3) for p in found))


def _difference(profile: Profile) -> str:
    if profile.error is None:
        return NOTHING
    return f"{profile.error:.1e} against {NAMES.get(profile.against, profile.against)}"


def _rate(run: Run, profile: Profile) -> float | None:
    """Tokens in a second, of the faster way to launch that was measured."""
    ms = profile.graph_ms or profile.ms
    return 1e3 * run.tokens / ms if run.tokens and ms else None


def _of_ours(found: Sequence[Profile], count: int) -> list[str]:
    return [str(count) if p.name == "dsv4fuse" and not p.failed else NOTHING for p in found]


def _number(value: float | None, places: int) -> str:
    return _cell(value, lambda x: f"{x:.{places}f}")


def _cell(value: Any, text: Any) -> str:
    return NOTHING if value is None else text(value)


def _print(
    console: Console, title: str, titles: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left")
    for name in titles:
        table.add_column(name, overflow="fold")  # on a narrow terminal nothing is cut off
    for row in rows:
        table.add_row(*row)
    console.print(table)
