"""What the commands share: how they fail, write files and show that they are at work."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import typer
from rich.console import Console

WIDE = 200  # characters


def fail(message: str, code: int) -> NoReturn:
    """Says why on stderr and leaves with this exit code."""
    typer.echo(f"dsv4fuse: {message}", err=True)
    raise typer.Exit(code)


def write(file: str, text: str) -> None:
    """A report into a file that the user named."""
    try:
        pathlib.Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"The report could not be written to {file!r}: {error.strerror}.", 2)


def table_console() -> Console:
    """For tables of many columns, which the 80 characters of a file or a pipe would cut."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr: called with what is being done and how many steps there may be in all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(text: str, total: int) -> None:
            bar.update(task, description=text, total=total, advance=1)

        yield advance
