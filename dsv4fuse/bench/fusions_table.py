"""The rows of ``bench``: which are measured, and the table."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from rich.table import Table

from dsv4fuse.bench import fusions, workers
from dsv4fuse.bench.fusions import Row, Site
from dsv4fuse.bench.machine import environment
from dsv4fuse.terminal import table_console
from dsv4fuse.verify import said


def run(
    names: Sequence[str], models: Sequence[str], tokens: Iterable[int], path: pathlib.Path | None,
    progress: Callable[[str, int], None] = lambda text, total: None, processes: int = 1,
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """Measures and prints; (rows, what went wrong in words). Writes JSON to ``path`` (``save``),
    after each row, so that a run that is cut short has what it has measured.

    ``progress`` is called before each row with its name and the number of all steps. More than one
    of ``processes``: so many compile all rows before the first is timed, a step each.
    """
    rows, wrong = list[Row](), list[str]()
    made_on, sites = environment(), list(every(names, models, tokens))
    steps = len(sites) * (2 if processes > 1 else 1)
    shown = lambda text: progress(text, steps)  # noqa: E731
    if processes > 1:
        workers.compile_all(sites, processes, shown)
    for (name, variant, model, t), row in _one_by_one(sites, shown):
        if isinstance(row, Exception):  # one that cannot run does not hold up the others
            wrong.append(f"{name} ({variant}) of {model} at {t} tokens: {said(row)}.")
            continue
        rows.append(row)
        if path is not None:
            fusions.save(rows, path, made_on)
        if not row.agrees:
            wrong.append(f"{name} ({variant}) of {model} at {t} tokens differs from eager.")
    show(rows)
    return rows, wrong


def show(rows: Sequence[Row]) -> None:
    """A table for each model."""
    console = table_console()
    for model in dict.fromkeys(row.model for row in rows):
        table = Table(*TITLES, title=model)
        for row in rows:
            if row.model == model:
                table.add_row(*_cells(row))
        console.print(table)


def _one_by_one(
    sites: Iterable[Site], progress: Callable[[str], None]
) -> Iterator[tuple[Site, Row | Exception]]:
    for site in sites:
        progress(f"{site[0]} ({site[1]}), {site[3]} tokens")
        try:
            yield site, fusions.measure(*site)
        except Exception as error:
            yield site, error
        torch.cuda.empty_cache()


def every(names: Sequence[str], models: Iterable[str], tokens: Iterable[int]) -> Iterator[Site]:
    """Each chosen variant at each number."""
    counts = list(tokens)
    for model in models:
        yield from ((*named, model, t) for named in fusions.variants(names) for t in counts)


TITLES = ("fusion", "variant", "tokens", "eager µs", "Inductor µs", "ours µs", "± %", "ratio",
          "floor µs", "TB/s", "TFLOP/s", "cold: Inductor µs", "ours µs",
          "kernels ×warps: registers")  # fmt: skip


def _cells(row: Row) -> list[str]:
    def number(x: float | None) -> str:
        return "?" if x is None else f"{x:.2f}"

    return [
        row.fusion + " WRONG" * (not row.agrees), row.variant, str(row.tokens), number(row.eager),
        number(row.inductor), number(row.ours), f"{100 * row.spread:.0f}", number(row.ratio),
        number(row.floor), number(row.tb_s), number(row.tflops) if row.tflops else "",
        number(row.inductor_cold), number(row.ours_cold), "\n".join(map(str, row.kernels)),
    ]  # fmt: skip
