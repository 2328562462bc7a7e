"""``python -m dsv4fuse bench``: single fusions on a GPU or, with ``--e2e``, whole models."""

from __future__ import annotations

import functools
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer

from dsv4fuse.bench.steps import SHORT, steps
from dsv4fuse.factory import FactoryError, build, parse_options
from dsv4fuse.options import OptionError
from dsv4fuse.terminal import fail, progress

_MODEL = (
    "flash, pro, pro-tp8: the sizes of single fusions (flash if none; with --from all). With "
    "--e2e: hf, plain (both if none), or package.module:factory as for explain, which is given "
    "those of --size to --vocab and device that it has parameters for. May be repeated."
)
Fusions = Annotated[
    list[str] | None,
    typer.Argument(help="Which fusions, or FUSION:VARIANT for one of its variants; all if none."),
]
Models = Annotated[list[str] | None, typer.Option("--model", help=_MODEL)]
Tokens = Annotated[str, typer.Option(help="Token counts, comma-separated.")]
Json = Annotated[
    str,
    typer.Option("--json", metavar="FILE", help="Write all here, or FUSION.json to a folder."),
]
Plot = Annotated[
    str, typer.Option(metavar="FILE.svg", help="Draw time against tokens, or launches and time.")
]
Limits = Annotated[
    str,
    typer.Option(metavar="FILE.json", help="Time nothing: Nsight Compute profiles ours, to here."),
]
From = Annotated[
    list[str] | None,
    typer.Option("--from", metavar="FILE", help="Measure nothing: show what --json wrote."),
]
Against = Annotated[
    str,
    typer.Option(metavar="FILE", help="Also say how far the times are from those that --json "
                 "wrote to this file or folder."),
]  # fmt: skip
E2E = Annotated[
    bool,
    typer.Option("--e2e", help="Whole models: eager, Inductor and dsv4fuse side by side."),
]
Decode = Annotated[
    bool | None, typer.Option("--decode/--prefill", help="With --e2e: one step only, not both.")
]
Size = Annotated[str | None, typer.Option(help="With --e2e: tiny, flash; flash on a GPU.")]
Layers = Annotated[int | None, typer.Option(min=1, help="With --e2e: how many layers.")]
Experts = Annotated[int | None, typer.Option(min=1, help="With --e2e: how many experts.")]
Batch = Annotated[int | None, typer.Option(min=1, help="With --e2e: how many sequences.")]
Length = Annotated[
    int | None, typer.Option(min=1, help="With --e2e: tokens of a prompt, or behind a decode step.")
]
Vocab = Annotated[
    int | None, typer.Option(min=1, help="With --e2e: how many tokens the model knows.")
]
New = Annotated[int | None, typer.Option(min=1, help="With --e2e: tokens of a decode step.")]
Regional = Annotated[
    bool, typer.Option("--regional", help="With --e2e: compile each layer for itself.")
]
Ways = Annotated[
    str, typer.Option(help="With --e2e: of eager,inductor,dsv4fuse; no inductor without a GPU.")
]
Options = Annotated[str, typer.Option(help="With --e2e: options of dsv4fuse as JSON.")]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes that compile all, before the first is timed.")
]


def bench(
    fusions: Fusions = None,
    model: Models = None,
    tokens: Tokens = "",
    json_path: Json = "",
    plot: Plot = "",
    limits: Limits = "",
    measured: From = None,
    against: Against = "",
    e2e: E2E = False,
    decode: Decode = None,
    size: Size = None,
    layers: Layers = None,
    experts: Experts = None,
    batch: Batch = None,
    length: Length = None,
    new: New = None,
    vocab: Vocab = None,
    regional: Regional = False,
    ways: Ways = "",
    options: Options = "",
    workers: Workers = 1,
) -> None:
    """Time each fusion, or (--e2e) whole models, against eager and Inductor on this machine."""
    sizes = {"size": size, "layers": layers, "experts": experts, "batch": batch, "length": length,
             "new": new, "vocab": vocab, "decode": decode}  # fmt: skip
    asked = {name: value for name, value in sizes.items() if value is not None}
    if not e2e:
        others = {"regional": regional, "ways": ways, "options": options}
        if given := [*asked, *(name for name, value in others.items() if value)]:
            fail(f"Only --e2e knows --{', --'.join(given)}.", 2)
        beside = json_path or plot or measured or against
        if limits and (beside or not limits.endswith(".json")):
            fail("--limits takes a FILE.json, and no --json, --plot, --from or --against.", 2)
        _fusions(fusions or [], model or [], tokens, json_path, plot, measured, workers, limits,
                 against)  # fmt: skip
    elif fusions or tokens or against:
        fail("--e2e measures whole models: it takes no fusions, --tokens or --against.", 2)
    elif limits:
        if regional or ways or json_path or plot or measured or not limits.endswith(".json"):
            fail("--limits takes a FILE.json, and no --regional, --ways, --json, --plot or "
                 "--from.", 2)  # fmt: skip
        _step_limits(model or list(SHORT), asked, options, pathlib.Path(limits))
    else:
        measuring = functools.partial(_measured, asked=asked, regional=regional, ways=ways,
                                      options=options)  # fmt: skip
        _models(model or list(SHORT), measuring, json_path, plot, measured)


def _fusions(
    fusions: list[str], models: list[str], tokens: str, json_path: str, plot: str,
    measured: list[str] | None, workers: int, limits: str, against: str,
) -> None:  # fmt: skip
    import torch

    if not measured and not torch.cuda.is_available():
        fail("There is no GPU here: the benchmark times Triton kernels.", 2)
    try:
        from dsv4fuse.bench import fusions as timing
        from dsv4fuse.bench import fusions_against, fusions_table
    except ImportError as error:
        fail(f"The benchmark needs Triton: {error}.", 2)
    counts = token_counts(fusions, models, tokens or "1,64,1024,8192", timing.MODELS)
    try:  # before --json writes there
        older = fusions_against.load(pathlib.Path(against)) if against else {}
    except (OSError, ValueError) as error:
        fail(f"--against {against!r}: {error}", 2)
    wrong: list[str] = []
    if limits:
        from dsv4fuse.bench import ncu

        try:
            with progress() as advance:
                file = pathlib.Path(limits)
                wrong = ncu.run(fusions, models or ["flash"], counts, file, advance, workers)
        except (ncu.NcuError, OSError, ValueError) as error:
            fail(f"--limits {limits!r}: {error}", 2)
    elif measured:
        rows, made_on = _loaded(timing.load, measured)
        rows = [r for r in rows if r.model in (models or [r.model])]
        fusions_table.show(rows)
    else:
        models = models or ["flash"]
        path = pathlib.Path(json_path) if json_path else None
        with progress() as advance:
            rows, wrong = fusions_table.run(fusions, models, counts, path, advance, workers)
        made_on = fusions_table.environment()
    if plot:
        from dsv4fuse.bench import fusions_plot as pictures

        _draw(pictures.draw, rows, made_on, plot)
    if against:
        fusions_against.show(rows, older)
    if wrong:
        fail("\n".join(wrong), 1)


def _step_limits(
    names: list[str], asked: dict[str, Any], options: str, file: pathlib.Path
) -> None:
    import torch

    from dsv4fuse.bench import ncu, ncu_steps

    if not torch.cuda.is_available():
        fail("There is no GPU here whose counters could be read.", 2)
    try:
        found, given = steps(names, asked, True), parse_options(options or "{}")
        with progress() as advance:
            wrong = ncu_steps.run(found, given, file, advance)
    except (FactoryError, OptionError) as error:
        fail(str(error), 2)
    except (ncu.NcuError, OSError, ValueError) as error:
        fail(f"--limits {str(file)!r}: {error}", 2)
    if wrong:
        fail("\n".join(wrong), 1)


def token_counts(
    fusions: list[str], models: list[str], tokens: str, known_models: Any
) -> list[int]:
    """The token counts; exits with 2 for what there is none of."""
    from dsv4fuse.bench.fusions import variants
    from dsv4fuse.fusion import registry

    named = {f"{name}:{variant}" for name, variant in variants()}
    for names, known in ((fusions, registry()), (models, known_models)):
        for name in names:
            if name not in known and name not in named:
                fail(f"There is no {name!r} here, only {', '.join(known)}.", 2)
    try:
        counts = [int(t) for t in tokens.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        fail(f"--tokens takes positive numbers such as 1,64,1024, not {tokens!r}.", 2)
    return counts


def _loaded(load: Any, files: list[str]) -> tuple[list[Any], dict[str, Any]]:
    found, made_on = list[Any](), dict[str, Any]()
    for file in files:
        try:
            more, made_on = load(pathlib.Path(file))
        except (OSError, ValueError) as error:
            fail(f"--from {file!r}: {error}", 2)
        found += more
    return found, made_on


def _draw(draw: Any, found: list[Any], made_on: dict[str, Any], file: str) -> None:
    if not found:
        fail("There is nothing to plot.", 2)
    try:
        draw(found, made_on, pathlib.Path(file))
    except ImportError as error:
        fail(f"--plot needs matplotlib (pip install 'dsv4fuse[bench]'): {error}.", 2)


def _models(
    names: list[str], measuring: Callable[[list[str]], Iterator[Any]], json_path: str, plot: str,
    measured: list[str] | None,
) -> None:  # fmt: skip
    from dsv4fuse.bench import machine, models_plot, models_table, runs

    made_on: Mapping[str, Any]
    if measured:
        found, made_on = _loaded(runs.load, measured)
        for file in measured:
            models_table.show(*_loaded(runs.load, [file]))
    else:
        found, made_on = [], machine.environment()
        try:
            for run in measuring(names):
                found.append(run)
                if json_path:  # after each: the next one may take the machine down
                    runs.save(found, made_on, pathlib.Path(json_path))
            models_table.show(found, made_on)
        except (FactoryError, OptionError) as error:
            fail(str(error), 2)
        except OSError as error:
            fail(f"--json {json_path!r}: {error.strerror}.", 2)
    if plot:
        _draw(models_plot.draw, found, dict(made_on), plot)
    ours = (profile for run in found for profile in run.profiles if profile.name == "dsv4fuse")
    if not measured and any(profile.failed for profile in ours):
        fail("dsv4fuse could not run everything; the table says why.", 1)


def _measured(
    names: list[str], asked: dict[str, Any], regional: bool, ways: str, options: str
) -> Iterator[Any]:
    """Each step of each model, measured when it is asked for."""
    import torch

    from dsv4fuse.bench import models

    gpu = torch.cuda.is_available()
    chosen = ways.split(",") if ways else [w for w in models.WAYS if gpu or w != "inductor"]
    if wrong := set(chosen) - set(models.WAYS):
        fail(f"--ways takes {','.join(models.WAYS)}, not {', '.join(sorted(wrong))}.", 2)
    # Without a GPU the references of the ops, node by node: Inductor's C++ takes minutes.
    given: dict[str, Any] = {} if gpu else {"select": "always"}
    if not gpu and "inductor" not in chosen:
        given["inner"] = "eager"
    given |= parse_options(options or "{}")
    plans = steps(names, asked, gpu)
    with warnings.catch_warnings(), progress() as advance:
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_")
        for step in plans:
            def show(way: str, what: str = f"{step.model} {step.name}") -> None:
                advance(f"{what}, {way}", len(plans) * len(chosen))

            make = functools.partial(build, step.factory, **step.given)
            yield models.run(make, chosen, given, show, regional, model=step.model, step=step.name,
                             sizes=step.sizes)  # fmt: skip
