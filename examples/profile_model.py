"""Where the time of one step goes: eager, Inductor and dsv4fuse side by side.

    python examples/profile_model.py                                     # tiny, what there is
    python examples/profile_model.py --size flash --layers 4 --experts 32 --batch 1 --length 2048
    python examples/profile_model.py --which ours --size flash --layers 4 --experts 32 --decode

On a GPU: time by family of kernels, launches per step, peak memory, compile time, and ms under
CUDA graphs. On a CPU the same table counts ATen operations, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from dsv4fuse import Report  # noqa: E402
from examples import hf_deepseek_v4  # noqa: E402
from examples.deepseek_v4 import PRESETS, Transformer, randomize  # noqa: E402
from examples.measure import backend, captured, milliseconds, parsed, show  # noqa: E402

# The first family of which a kernel's name holds a word; what Inductor writes is named triton_.
FAMILIES = {
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "grouped_mm", "bmm", "gemv"),
    "Inductor": ("triton_poi", "triton_red", "triton_per", "triton_tem", "triton_for"),
    "sort and top-k": ("sort", "topk", "TopK", "radix", "scan", "cub::", "bitonic"),
    "copies and fills": ("memcpy", "memset", "copy", "fill", "CatArray", "cat_"),
    "dsv4fuse": ("_kernel",),
    "other ATen": ("at::native", "elementwise", "reduce", "index", "aten::"),
}  # fmt: skip


@dataclass
class Profile:
    """One way to run a step. Times in ms, memory in bytes; families: (launches, ms)."""

    name: str
    eager_ms: float = 0.0
    graph_ms: float | None = None
    compile_s: float = 0.0
    peak: int = 0
    families: dict[str, tuple[int, float]] = field(default_factory=dict)
    note: str = ""

    @property
    def launches(self) -> int:
        return sum(n for n, _ in self.families.values())


def family(kernel: str) -> str:
    return next((f for f, words in FAMILIES.items() if any(w in kernel for w in words)), "other")


def measured(name: str, call: Callable[[], Any], device: str) -> Profile:
    """A step's first call is its compilation; then times, peak memory and kernels."""
    found = Profile(name)
    on_gpu = device.startswith("cuda")
    started = time.perf_counter()
    call()
    found.compile_s = time.perf_counter() - started
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found.eager_ms = milliseconds(call, device)
    if on_gpu:
        found.peak = torch.cuda.max_memory_allocated()
    found.families = families(call, on_gpu)
    if on_gpu:
        try:
            found.graph_ms = milliseconds(captured(call), device)
        except RuntimeError as error:  # something in it waits for the GPU
            found.note = f"no CUDA graph: {str(error).splitlines()[0]:.60}"
    return found


def families(call: Callable[[], Any], on_gpu: bool) -> dict[str, tuple[int, float]]:
    """Launches and ms of each family in one call."""
    kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as seen:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in seen.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if on_gpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue
        total = totals[family(event.key)]
        total[0] += event.count
        total[1] += spent / 1e3
    return {k: (int(n), ms) for k, (n, ms) in sorted(totals.items(), key=lambda kv: -kv[1][1])}


def ours(args: argparse.Namespace) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """(the function to compile, the model its report hangs on, args, kwargs)."""
    config = PRESETS[args.size]
    kinds = [config.layers[0], *("hca" if i % 2 else "csa" for i in range(args.layers - 1))]
    config = dataclasses.replace(
        config, layers=tuple(kinds), n_experts=args.experts or config.n_experts
    )
    torch.set_default_dtype(torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    with torch.device(args.device):
        model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    randomize(model)
    model.allocate(args.batch, args.length + args.next_n, args.next_n)
    size = (args.batch, args.next_n if args.decode else args.length)
    tokens = torch.randint(config.vocab_size, size, device=args.device)
    first = args.length if args.decode else 0
    positions = torch.arange(first, first + size[1], device=args.device).expand(size).contiguous()
    return (model.decode if args.decode else model.prefill), model, (tokens, positions), {}


def theirs(args: argparse.Namespace) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    if args.decode:
        raise SystemExit("A decode step of transformers needs a static cache: hf_generate.py.")
    model = hf_deepseek_v4.build(args)
    size = (args.batch, args.length)
    tokens = torch.randint(model.config.vocab_size, size, device=args.device)
    return model, model, (tokens,), {"use_cache": False}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--which", choices=("hf", "ours"), default="hf")
    parser.add_argument("--size", choices=("tiny", "flash"), default="tiny")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="keep only so many experts")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=48, help="tokens of a prompt, or of context")
    parser.add_argument("--decode", action="store_true", help="a decode step of our plain model")
    parser.add_argument("--next-n", type=int, default=1, help="new tokens of a decode step")
    parser.add_argument("--ways", nargs="+", choices=("eager", "inductor", "dsv4fuse"))
    parser.add_argument("--select", default=None, help="as the option of dsv4fuse")
    parser.add_argument("--json", help="also write the figures here")
    args = parsed(parser)
    args.model = None  # hf_deepseek_v4.build: random weights
    every = ["eager", "inductor", "dsv4fuse"]
    args.ways = args.ways or (every if args.inductor else ["eager", "dsv4fuse"])
    return args


def rows(found: list[Profile]) -> list[tuple[str, ...]]:
    names = dict.fromkeys(f for p in found for f in p.families)
    table = [("ms a step", *(f"{p.eager_ms:.2f}" for p in found))]
    graphs = (f"{p.graph_ms:.3f}" if p.graph_ms else p.note or "-" for p in found)
    table.append(("ms under CUDA graphs", *graphs))
    table.append(("first call, s", *(f"{p.compile_s:.1f}" for p in found)))
    table.append(("peak memory, GB", *(f"{p.peak / 1e9:.2f}" for p in found)))
    table.append(("launches", *(str(p.launches) for p in found)))
    for name in names:
        cells = (p.families.get(name, (0, 0.0)) for p in found)
        table.append((f"  {name}", *(f"{ms:.2f} ms in {n}" if n else "-" for n, ms in cells)))
    return table


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore")
    args = arguments()
    fn, model, inputs, kwargs = (ours if args.which == "ours" else theirs)(args)
    options: dict[str, Any] = {} if args.device.startswith("cuda") else {"select": "always"}
    if args.select:
        options["select"] = args.select
    if not args.inductor:
        options["inner"] = "eager"
    ways = {
        "eager": lambda: fn,
        "inductor": lambda: torch.compile(fn, fullgraph=True),
        "dsv4fuse": lambda: torch.compile(fn, backend=backend(), options=options, fullgraph=True),
    }
    found = []
    for name in args.ways:
        torch._dynamo.reset()
        run = ways[name]()
        found.append(measured(name, lambda run=run: run(*inputs, **kwargs), args.device))
    console = Console()
    what = "decode step" if args.decode else "prefill"
    size = f"{args.layers} layers, {args.batch} × {args.length}"
    title = f"A {what} of {args.which} {args.size}, {size}"
    show(console, title, ("", *(p.name for p in found)), rows(found))
    report = Report.of(model)
    if report.sites:
        console.print(report.counts())
    if args.json:
        profiles = [asdict(p) for p in found]
        figures = {"title": title, "torch": torch.__version__, "profiles": profiles}
        if args.device.startswith("cuda"):
            figures["gpu"] = torch.cuda.get_device_name()
        text = json.dumps(figures | {"sites": report.counts()}, indent=1)
        pathlib.Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
