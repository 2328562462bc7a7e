"""Each fusion against eager and against Inductor's code for the same plain sequence, on a GPU.

All run ``Fusion.examples``. Times are medians under CUDA-graph replay: warm, of the same inputs
again and again (what fits stays in L2), and cold, with a buffer of 256 MiB written in between.
The floor is the larger of bytes over the bandwidth of a plain copy and operations over the peak.
"""

from __future__ import annotations

import copy
import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dsv4fuse import compat, garbage, replay
from dsv4fuse.backend import collecting, dsv4fuse
from dsv4fuse.bench import machine, registers
from dsv4fuse.fusion import Example, Sizes, registry
from dsv4fuse.options import Options
from dsv4fuse.report import Report

Inputs = tuple[Tensor, ...]
Site = tuple[str, str, str, int]  # fusion, variant, model, tokens
MODELS = {
    "flash": Sizes(),
    "pro": Sizes(heads=128, groups=16, inter=3072, experts=384),
    "pro-tp8": Sizes(heads=16, groups=2, inter=3072, experts=384),
}
BANDWIDTH = {"NVIDIA H200": 4.26e12}  # bytes/s of a Triton copy of 8 GiB, measured
PEAK = {"NVIDIA H200": 989e12}  # bf16 operations/s, from the data sheet
FLUSH = 256 << 20  # bytes, five times the L2 of an H200
COLD = 20  # calls, each behind a flush
GRAPHS = 15  # each on inputs and results of its own; a short row's time is their median
WARM = 0.4e6  # µs of calls before a long row's time


@dataclass(frozen=True)
class Row:
    """Medians in µs; ``agrees`` says whether the fused result equals eager up to rounding.

    ``spread`` is (largest - smallest) / median of our warm times. ``tb_s`` and ``tflops`` are
    reached by our warm time. ``eager`` is None for what cannot be captured in a CUDA graph.
    ``result_bytes``: of the results for each token, by which sites know rows of their own sizes.
    ``kernels`` are ours as they were launched, with registers and spills; of older files, none.
    ``date``: of a row that an earlier run left in its file, else empty.
    """

    fusion: str
    variant: str
    model: str
    tokens: int
    inductor: float
    ours: float
    floor: float | None
    agrees: bool
    eager: float | None = None
    inductor_cold: float | None = None
    ours_cold: float | None = None
    spread: float = 0.0
    tb_s: float = 0.0
    tflops: float = 0.0
    kernels: tuple[registers.Kernel, ...] = ()
    result_bytes: float | None = None
    date: str = ""

    @property
    def site(self) -> Site:
        return self.fusion, self.variant, self.model, self.tokens

    @property
    def ratio(self) -> float:
        return self.ours / self.inductor


def variants(names: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """(fusion, variant): all of each fusion, or of ``FUSION:VARIANT`` that one; of all if none. A
    fusion without examples has none."""
    for name, _, variant in (n.partition(":") for n in names or registry()):
        yield from ((name, v) for v in ([variant] if variant else registry()[name].examples))


def example(name: str, variant: str, model: str, tokens: int) -> Example:
    """The same inputs each time."""
    torch.manual_seed(0)
    return registry()[name].examples[variant](tokens, MODELS[model], "cuda")


def both_ways(name: str, made: Example) -> tuple[Callable[..., object], Callable[..., object]]:
    """(ours, Inductor's), compiled at their first calls; ours raises FusionError if not taken."""
    torch._dynamo.reset()
    options = {"select": "always", "expect": {name: 1}}
    fused = torch.compile(made.fn, backend=dsv4fuse, options=options, dynamic=False)
    return fused, torch.compile(made.fn, dynamic=False)


def measure(name: str, variant: str, model: str, tokens: int) -> Row:
    """One variant at one number of tokens. Raises FusionError if the site is not taken."""
    made = example(name, variant, model, tokens)
    with torch.no_grad(), compat.tuned_anew():
        fused, plain = both_ways(name, made)
        with registers.collected() as kernels, collecting(report := Report()):
            # Cloned: a cache that is returned will be eager's.
            found = [t.clone() for t in _tensors(fused(*made.inputs))]
        report.check(Options(expect={name: 1}))
        (site,) = report.with_status("taken")
        plain(*made.inputs)
        eager, inductor, ours = ((lambda f=f: f(*made.inputs)) for f in (made.fn, plain, fused))
        wanted = _tensors(eager())
        agrees = all(_close(a, b, made.slack) for a, b in zip(wanted, found, strict=True))
        with garbage.passed_by():  # torch collects before each capture
            copies = functools.cache(lambda: _copies(made.inputs))
            times = _warm(fused, made.inputs, copies)
            theirs = statistics.median(_warm(plain, made.inputs, copies))
            unfused, colds = _captured(eager), (cold(inductor), cold(ours))
    middle = statistics.median(times)
    return Row(
        name, variant, model, tokens, theirs, middle, floor(made, torch.cuda.get_device_name()),
        agrees, unfused, *colds, (max(times) - min(times)) / middle, made.moved / middle / 1e6,
        made.flops / middle / 1e6, tuple(kernels), site.detail["result_bytes"],
    )  # fmt: skip


def floor(made: Example, gpu: str) -> float | None:
    """µs that the bytes and the operations of an example take at least; None if not known."""
    if gpu not in BANDWIDTH:
        return None
    return 1e6 * max(made.moved / BANDWIDTH[gpu], made.flops / PEAK[gpu])


def _copies(inputs: Inputs) -> list[Inputs]:
    return [copy.deepcopy(inputs) for _ in range(GRAPHS - 1)]


def _warm(
    fn: Callable[..., object], inputs: Inputs, copies: Callable[[], list[Inputs]]
) -> list[float]:
    """µs of fn, of inputs or, where that is short, of the copies as well."""
    def others() -> list[replay.Call]:
        return [functools.partial(fn, *given) for given in copies()]

    call = functools.partial(fn, *inputs)
    return replay.times(call, span=10e3, most=400, others=others, warm=WARM)


def _captured(call: Callable[[], object]) -> float | None:
    try:
        with compat.capturing():
            return statistics.median(replay.times(call, span=2e3, most=50))
    except RuntimeError:  # it waits for the host or allocates in a way that no graph holds
        torch.cuda.synchronize()
        return None


def cold(call: Callable[[], object]) -> float:
    """µs of a call that finds nothing of its inputs in L2: flushes and calls, less the flushes."""
    buffer = torch.empty(FLUSH, dtype=torch.int8, device="cuda")

    def both() -> None:
        buffer.zero_()
        call()

    with_calls, without = (statistics.median(replay.of([f], COLD)) for f in (both, buffer.zero_))
    return max(0.0, with_calls - without)


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore


def _close(a: Tensor, b: Tensor, slack: float) -> bool:
    """Equal integers and infinities; other floats within two rounding steps, and the slack, at the
    row's largest."""
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    x, y = a.double(), b.double()
    error = 2 * torch.finfo(a.dtype).eps + slack
    largest = x.abs().where(x.isfinite(), 0).amax(-1, keepdim=True)
    return bool(((x == y) | ((x - y).abs() <= error * largest)).all())


def save(rows: Sequence[Row], path: pathlib.Path, made_on: dict[str, object]) -> None:
    """All rows into ``path`` where it ends in .json, else ``<fusion>.json`` into that folder,
    beside what such a GPU with these versions has measured before and not again."""
    files = {path: list(rows)} if path.suffix == ".json" else {}
    if not files:
        for row in rows:
            files.setdefault(path / f"{row.fusion}.json", []).append(row)
        files = {file: _with_older(own, file, made_on) for file, own in files.items()}
    for file, own in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**made_on, "rows": [asdict(r) for r in own]}, indent=1)
        file.write_text(text + "\n", encoding="utf-8")


def _with_older(
    rows: Sequence[Row], file: pathlib.Path, made_on: Mapping[str, object]
) -> list[Row]:
    """The rows and those of the file that they do not replace, by model, variant and tokens."""
    older, before = load(file) if file.exists() else ([], {})
    if machine.alike(before, made_on):
        new = {row.site for row in rows}
        kept = (replace(r, date=r.date or str(before["date"])) for r in older if r.site not in new)
        rows = [*rows, *kept]
    variants = registry()[rows[0].fusion].examples
    place = {name: i for i, name in enumerate((*MODELS, *variants))}
    return sorted(rows, key=lambda r: (place[r.model], place.get(r.variant, -1), r.tokens))


def load(path: pathlib.Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows and the machine of a file that ``save`` wrote; ValueError if it is none."""
    data = json.loads(path.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Row)}
    try:
        rows = [_row({k: v for k, v in r.items() if k in known}) for r in data.pop("rows")]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no measurements ({error!r}).") from error
    return rows, data


def _row(plain: dict[str, Any]) -> Row:
    kernels = tuple(registers.Kernel(**k) for k in plain.get("kernels", ()))
    return Row(**{**plain, "kernels": kernels})
