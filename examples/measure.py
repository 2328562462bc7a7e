"""What the examples share: naming the backend, errors, times, and a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4fuse.bench.stopwatch import captured, milliseconds


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of an example, with where it runs and how it is compiled."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--inductor",
        action=argparse.BooleanOptionalAction,
        help="compile with Inductor (the default on a GPU); otherwise the rewritten graph runs "
        "node by node",
    )
    args = parser.parse_args()
    if args.inductor is None:
        args.inductor = args.device.startswith("cuda")
    return args


def backend() -> Any:
    """``"dsv4fuse"``, which torch finds where the package is installed, or the function that
    this name stands for, in a bare checkout."""
    if "dsv4fuse" in torch.compiler.list_backends(exclude_tags=()):
        return "dsv4fuse"
    from dsv4fuse.backend import dsv4fuse

    return dsv4fuse


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, of the largest value."""
    return ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


def times(
    calls: dict[str, Callable[[], Any]], device: str, patience: float = 5.0
) -> list[tuple[str, ...]]:
    """Rows (name, ms) or, on a GPU, (name, ms, ms under CUDA graphs)."""
    rows = []
    for name, call in calls.items():
        on_gpu = device.startswith("cuda")
        row = [name, f"{milliseconds(call, on_gpu, patience):.3f}"]
        if on_gpu:
            try:
                row.append(f"{milliseconds(captured(call), on_gpu, patience):.3f}")
            except RuntimeError as error:  # something in it waits for the GPU
                row.append(f"cannot be captured: {str(error).splitlines()[0]:.60}")
        rows.append(tuple(row))
    return rows


def show(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]):
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
