"""Each fusion against Inductor's code for the same plain sequence, on this machine's GPU.

Both are what ``torch.compile`` makes of ``Fusion.example``; times are medians under CUDA-graph
replay of the same inputs (so inputs that fit stay in L2), floors are bytes over the bandwidth of
a plain copy.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import triton
import triton.testing
from rich.console import Console
from rich.table import Table

from dsv4fuse.backend import dsv4fuse
from dsv4fuse.fusion import Fusion, Sizes, registry

MODELS = {
    "flash": Sizes(),
    "pro": Sizes(heads=128, groups=16, inter=3072),
    "pro-tp8": Sizes(heads=16, groups=2, inter=3072),
}
BANDWIDTH = {"NVIDIA H200": 4.26e12}  # bytes/s of a Triton copy of 8 GiB, measured


@dataclass(frozen=True)
class Row:
    """Medians in µs; ``agrees`` says whether the fused result equals eager up to rounding."""

    fusion: str
    variant: str
    model: str
    tokens: int
    inductor: float
    ours: float
    floor: float | None
    agrees: bool

    @property
    def ratio(self) -> float:
        return self.ours / self.inductor


def measure(fusion: Fusion, variant: str, model: str, tokens: int) -> Row:
    """One variant at one number of tokens. Raises FusionError if the site is not taken."""
    made = fusion.examples[variant](tokens, MODELS[model], "cuda")
    with torch.no_grad():
        wanted = _tensors(made.fn(*made.inputs))
        torch._dynamo.reset()
        plain = torch.compile(made.fn, dynamic=False)
        options = {"select": "always", "expect": {fusion.name: 1}}
        fused = torch.compile(made.fn, backend=dsv4fuse, options=options, dynamic=False)
        found = _tensors(fused(*made.inputs))
        plain(*made.inputs)
        agrees = all(_close(a, b) for a, b in zip(wanted, found, strict=True))
        times = [_time(lambda f=f: f(*made.inputs)) for f in (plain, fused)]
    rate = BANDWIDTH.get(torch.cuda.get_device_name())
    floor = made.moved / rate * 1e6 if rate else None
    return Row(fusion.name, variant, model, tokens, *times, floor, agrees)


def _time(call) -> float:  # noqa: ANN001
    return 1e3 * triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median")


def _tensors(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within two rounding steps of the dtype at the row's largest value."""
    x, y = a.double(), b.double()
    return bool(
        ((x - y).abs() <= 2 * torch.finfo(a.dtype).eps * x.abs().amax(-1, keepdim=True)).all()
    )


def run(
    names: Sequence[str], models: Iterable[str], tokens: Iterable[int], path: pathlib.Path | None
) -> list[Row]:
    """Measures and prints; writes ``<fusion>.json`` with GPU, versions and date into ``path``."""
    console, rows = Console(), list[Row]()
    fusions = [registry()[n] for n in names or registry()]
    titles = ("fusion", "variant", "tokens", "Inductor µs", "ours µs", "ratio", "floor µs")
    for model in models:
        table = Table(*titles, title=model)
        for fusion, variant in ((f, v) for f in fusions for v in f.examples):
            for t in tokens:
                row = measure(fusion, variant, model, t)
                rows.append(row)
                floor = f"{row.floor:.1f}" if row.floor else "?"
                note = "" if row.agrees else " WRONG"
                table.add_row(row.fusion + note, variant, str(t), f"{row.inductor:.2f}",
                              f"{row.ours:.2f}", f"{row.ratio:.2f}", floor)  # fmt: skip
        console.print(table)
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        for fusion in fusions:
            own = [asdict(r) for r in rows if r.fusion == fusion.name]
            text = json.dumps({**environment(), "rows": own}, indent=1)
            (path / f"{fusion.name}.json").write_text(text + "\n")
    return rows


def environment() -> dict[str, object]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }
