"""The command line: ``python -m dsv4fuse explain``, ``bisect``, ``bench``, ``kernels``,
``fusions``, ``doctor``.

Exit codes: 0 done, 1 the answer is no (an expectation missed, dsv4fuse cannot work here),
2 the command was given something that it cannot use.
"""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

import dsv4fuse
from dsv4fuse.bench.command import bench
from dsv4fuse.bench.kernels_command import kernels
from dsv4fuse.factory import FactoryError, build, parse_options
from dsv4fuse.options import OptionError
from dsv4fuse.report import FusionError, Report
from dsv4fuse.terminal import fail, progress, write

app = typer.Typer(
    help="""Fused DeepSeek-V4 kernels for plain PyTorch models.

    Start with `doctor`, then `explain examples.tiny:hf` in a checkout, or your own
    `package.module:factory`. Exit codes: 0 done, 1 the answer is no, 2 unusable arguments.""",
    no_args_is_help=True,
    add_completion=False,
    # typer's tables of local variables would print whole tensors.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Factory = Annotated[
    str,
    typer.Argument(
        metavar="PACKAGE.MODULE:FACTORY",
        help="A function that returns (model, args) or (model, args, kwargs).",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dsv4fuse {dsv4fuse.__version__}")
        raise typer.Exit


@app.callback(help=app.info.help)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """What all commands share."""


@app.command()
def explain(
    factory: Factory,
    options: Annotated[
        str, typer.Option(help='Options of dsv4fuse as JSON, such as \'{"select": "always"}\'.')
    ] = "{}",
    json_file: Annotated[
        str, typer.Option("--json", metavar="FILE", help="Also write the report here; - is stdout.")
    ] = "",
    html_file: Annotated[
        str, typer.Option("--html", metavar="FILE", help="Also write the report as one HTML page.")
    ] = "",
    dump_graph: Annotated[
        bool, typer.Option("--dump-graph", help="Also print the ATen graphs, to stderr.")
    ] = False,
) -> None:
    """Say what dsv4fuse fuses in a model, what not, and why."""
    try:
        parsed = parse_options(options)
        model, args, kwargs = build(factory)
        if dump_graph:
            _log_graphs()
        report = dsv4fuse.explain(model, *args, options=parsed, **kwargs)
    except (FactoryError, OptionError) as error:
        fail(str(error), 2)
    except FusionError as error:
        if error.report is not None:
            _show(error.report, json_file, html_file)
        fail(str(error), 1)
    _show(report, json_file, html_file)


app.command()(bench)
app.command()(kernels)


@app.command()
def bisect(
    factory: Factory,
    tolerance: Annotated[
        float, typer.Option(help="How far the result may be off, relative to its largest value.")
    ] = 0.0,
    options: Annotated[str, typer.Option(help="Options of dsv4fuse as JSON.")] = "{}",
) -> None:
    """Find the fused site that changes a model's result."""
    from dsv4fuse import bisection

    try:
        parsed = parse_options(options)
        model, args, kwargs = build(factory)
        with progress() as advance:
            found = bisection.bisect(
                model, args, kwargs, tolerance=tolerance, options=parsed, progress=advance
            )
    except (FactoryError, OptionError) as error:
        fail(str(error), 2)
    if not found.sites:
        typer.echo(f"With all sites fused it is off by {found.together:.3g}: within bounds.")
        return
    what = "This site changes" if len(found.sites) == 1 else "Together, these sites change"
    typer.echo(f"{what} the result by {found.alone:.3g} (all sites: {found.together:.3g}).")
    for site in found.sites:
        name = f"DSV4FUSE_ONLY={site.detail['site']}"
        typer.echo(f"  {name}  {site.module or '-'}  {site.file}:{site.line}  {site.reason}")
    raise typer.Exit(1)


@app.command()
def fusions(
    write: Annotated[
        list[pathlib.Path] | None,
        typer.Option(metavar="FILE.md", help="Renew the tables between <!-- markers --> here."),
    ] = None,
) -> None:
    """List the fusions: what each replaces and how fast it is; or renew a page's tables."""
    from dsv4fuse import catalog

    root = pathlib.Path(dsv4fuse.__file__).parents[1]
    if not write:
        typer.echo(catalog.listing())
    for file in write or ():
        try:
            text = file.read_text(encoding="utf-8")
            file.write_text(catalog.renewed(text, root), encoding="utf-8")
        except (OSError, catalog.MarkerError) as error:
            fail(f"{file}: {error}", 2)


@app.command()
def doctor() -> None:
    """Say what this machine can run, and why not the rest."""
    from dsv4fuse import doctor as checks

    found = checks.examine()
    typer.echo(checks.to_text(found))
    if any(check.required and not check.ok for check in found):
        raise typer.Exit(1)


def _log_graphs() -> None:
    # torch's own logs: the graph that the patterns are matched on, and the one that came out.
    import torch._logging

    torch._logging.set_logs(aot_graphs=True, post_grad_graphs=True)


def _show(report: Report, json_file: str, html_file: str) -> None:
    if json_file == "-":
        typer.echo(report.to_json(indent=2))
    else:
        report.print()
        if json_file:
            write(json_file, report.to_json(indent=2) + "\n")
    if html_file:
        write(html_file, report.to_html())


if __name__ == "__main__":
    app(prog_name="python -m dsv4fuse")
