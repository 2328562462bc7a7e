"""``python -m tests.generate``: thousands of generated programs and mutants, in numbers."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import _record
from ._draws import Tally, chunk, prepare
from ._record import BAD

SIZE = 10  # programs and mutants a task: a failed task loses no more
console = Console()
app = typer.Typer(add_completion=False)


def _chunks(seed: int, programs: int, only: str, workers: int) -> Iterator[Tally]:
    """Tallies as they are done; a worker that dies costs its task only."""
    tasks = iter(range(seed, seed + -(-programs // SIZE)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=prepare, max_tasks_per_child=100
    ) as pool:
        running: set[Future[Tally]] = set()
        while True:
            for number in tasks:
                running.add(pool.submit(chunk, number, SIZE, only))
                if len(running) > workers:
                    break
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (d.result() for d in done)


@app.command()
def main(
    programs: Annotated[int, typer.Option(help="How many to draw, and as many mutants.")] = 1000,
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    seed: Annotated[int, typer.Option(help="Number of the first task of 10.")] = 0,
    only: Annotated[str, typer.Option(help="Families whose name holds this.")] = "",
    minutes: Annotated[float, typer.Option(help="Stop after this long; 0: never.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write it.")] = None,
    keep: Annotated[bool, typer.Option(help="Add the run to tests/generated.json.")] = False,
) -> None:
    """Draw programs and mutants; exit 1 where one computes something else, or crashes."""
    total, started, tasks = Tally(), time.monotonic(), 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("programs", total=programs)
        for tally in _chunks(seed, programs, only, workers):
            total += tally
            tasks += 1
            bad = sum(total.counts[k] for k in BAD)
            bar.update(task, completed=total.counts["programs"], description=f"programs, {bad} bad")
            if json_file is not None:
                _write(json_file, total, started, seed)
            if minutes and time.monotonic() - started > 60 * minutes:
                break
    if keep:
        _record.keep(_record.row(total, seed, tasks, time.monotonic() - started))
    _show(total)
    raise typer.Exit(int(any(total.counts[k] for k in BAD)))


def _write(path: Path, tally: Tally, started: float, seed: int) -> None:
    data = dict(
        seed=seed,
        seconds=round(time.monotonic() - started),
        counts=dict(sorted(tally.counts.items())),
        edits=dict(sorted(tally.edits.items())), failures=tally.failures,
    )  # fmt: skip
    path.write_text(json.dumps(data, indent=1) + "\n")


def _show(tally: Tally) -> None:
    table = Table("fusion", "sites", "taken", "recall")
    for name in sorted(k[6:] for k in tally.counts if k.startswith("sites ")):
        sites, taken = tally.counts[f"sites {name}"], tally.counts[f"taken {name}"]
        table.add_row(name, str(sites), str(taken), f"{100 * taken / sites:.2f} %")
    console.print(table)
    for name, count in sorted(tally.counts.items()):
        if not name.startswith(("sites ", "taken ")):
            console.print(f"{name}: {count}")
    for failure in tally.failures:
        if failure["what"] in BAD:
            console.print(failure, markup=False)


if __name__ == "__main__":
    app()
