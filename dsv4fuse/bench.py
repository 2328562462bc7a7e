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
    model: str
    tokens: int
    inductor: float
    ours: float
    floor: float | None
    agrees: bool

    @property
    def ratio(self) -> float:
        return self.ours / self.inductor


def measure(fusion: Fusion, model: str, tokens: int) -> Row:
    """One fusion at one number of tokens. Raises FusionError if the site is not taken."""
    made = fusion.example(tokens, MODELS[model], "cuda")
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
    return Row(fusion.name, model, tokens, *times, floor, agrees)


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
    """Measures, prints a table row as each is done, and writes JSON with GPU, versions, date."""
    console, rows = Console(), list[Row]()
    fusions = [registry()[n] for n in names or registry()]
    for model in models:
        table = Table("fusion", "tokens", "Inductor µs", "ours µs", "ratio", "floor µs", title=model)
        for fusion in fusions:
            for t in tokens:
                row = measure(fusion, model, t)
                rows.append(row)
                floor = f"{row.floor:.1f}" if row.floor else "?"
                note = "" if row.agrees else " WRONG"
                table.add_row(row.fusion + note, str(t), f"{row.inductor:.2f}",
                              f"{row.ours:.2f}", f"{row.ratio:.2f}", floor)  # fmt: skip
        console.print(table)
    if path is not None:
        path.write_text(json.dumps({**environment(), "rows": [asdict(r) for r in rows]}, indent=1))
    return rows


def environment() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }
