"""``python -m dsv4fuse kernels``: what they compile to, for a GPU that need not be here."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from dsv4fuse.bench.command import Fusions, token_counts
from dsv4fuse.terminal import fail, progress, table_console


def kernels(
    fusions: Fusions = None,
    model: Annotated[str, typer.Option(help="flash, pro or pro-tp8.")] = "flash",
    tokens: Annotated[str, typer.Option(help="Token counts, comma-separated.")] = "1,64,1024,8192",
    capability: Annotated[int, typer.Option(help="10 × the GPU's compute capability.")] = 90,
    json_file: Annotated[str, typer.Option("--json", metavar="FILE", help="Also write it.")] = "",
) -> None:
    """Compile the kernels for a GPU that need not be here: registers, spills, shared memory."""
    try:
        from dsv4fuse.bench import fusions as timing
        from dsv4fuse.bench import kernels as built
    except ImportError as error:
        fail(f"This needs Triton: {error}.", 2)
    counts = token_counts(fusions or [], [model], tokens, timing.MODELS)
    try:
        with progress() as advance:
            found = built.launches(
                fusions or [], timing.MODELS[model], counts, capability, advance
            )
    except RuntimeError as error:
        fail(str(error), 2)
    table_console().print(built.table(found, capability))
    if json_file:
        built.save(found, pathlib.Path(json_file), capability)
    said = built.wrong(found, capability)
    if said:
        fail("\n".join(said), 1)
