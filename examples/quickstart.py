"""A plain DeepSeek-V4 compiled with dsv4fuse: the report, the error against eager, the times.

    python examples/quickstart.py                                      # tiny, on whatever is here
    python examples/quickstart.py --preset flash --layers 4 --experts 8            # on a GPU
    python examples/quickstart.py --inductor                           # on a CPU: takes minutes

Random weights: the tokens mean nothing, that they are the same with and without dsv4fuse does.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from dsv4fuse import Report  # noqa: E402
from examples.deepseek_v4 import PRESETS, Transformer, randomize  # noqa: E402
from examples.deepseek_v4.generate import generate, pad  # noqa: E402
from examples.measure import backend, parsed, relative_error, show, times  # noqa: E402

console = Console()
say = console.print


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int, help="keep only the first layers")
    parser.add_argument("--experts", type=int, help="keep only so many experts")
    parser.add_argument("--prompts", type=int, nargs="+", default=[5, 12, 37], help="lengths")
    parser.add_argument("--tokens", type=int, default=12, help="how many to generate")
    return parsed(parser)


def build(args: argparse.Namespace) -> Transformer:
    """bf16 on a GPU; fp32 on a CPU, where not every machine can do bf16 matrix products."""
    config = PRESETS[args.preset]
    config = dataclasses.replace(
        config, layers=config.layers[: args.layers], n_experts=args.experts or config.n_experts
    )
    torch.set_default_dtype(torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    with torch.device(args.device):
        model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    randomize(model)
    model.allocate(len(args.prompts), max(args.prompts) + args.tokens)
    return model


def options(args: argparse.Namespace) -> dict[str, Any]:
    """On a GPU the defaults. On a CPU, where "auto" takes no site (there is no kernel to be
    faster), all sites with the plain PyTorch reference of each op."""
    chosen: dict[str, Any] = {} if args.device.startswith("cuda") else {"select": "always"}
    return chosen if args.inductor else chosen | {"inner": "eager"}


@torch.no_grad()
def main() -> None:
    args = arguments()
    model = build(args)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    given = options(args)
    say(f"[bold]DeepSeek-V4 {args.preset}[/], {len(model.config.layers)} layers "
        f"{'/'.join(model.config.layers)}, {size:.0f} MiB, {dtype} on {args.device}")  # fmt: skip
    say(f'torch.compile(model.prefill, backend="dsv4fuse", fullgraph=True, options={given}), '
        "and model.decode\n", highlight=False)  # fmt: skip
    fused = {
        way: torch.compile(getattr(model, way), backend=backend(), options=given, fullgraph=True)
        for way in ("prefill", "decode")
    }
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.config.vocab_size, (length,), generator=draw).tolist()
               for length in args.prompts]  # fmt: skip

    started = time.perf_counter()
    tokens = generate(model, prompts, args.tokens, **fused)
    spent = time.perf_counter() - started
    Report.of(model).print()
    say(f"\nCompiled, and {args.tokens} tokens for each of {len(prompts)} prompts, "
        f"in {spent:.1f} s: {tokens[0].tolist()} …", highlight=False)  # fmt: skip

    wanted = generate(model, prompts, args.tokens)
    equal = int((tokens == wanted).sum())
    prompt = pad(prompts, args.device)
    error = relative_error(fused["prefill"](*prompt), model.prefill(*prompt))
    say(f"Against eager: logits of the prefill differ by {error:.1e} of the largest; "
        f"{equal} of {wanted.numel()} tokens are equal.\n", highlight=False)  # fmt: skip

    token = wanted[:, -1:].contiguous()
    position = prompt[1].amax(dim=1, keepdim=True) + args.tokens - 1
    ways = {"eager": model.decode}
    if args.inductor:
        ways["torch.compile (Inductor)"] = torch.compile(model.decode, fullgraph=True)
    inner = "Inductor" if args.inductor else "node by node"
    ways[f"dsv4fuse ({inner})"] = fused["decode"]
    header = ("a decode step of", "ms", "ms under CUDA graphs")
    rows = times({n: lambda w=w: w(token, position) for n, w in ways.items()}, args.device)
    show(console, f"Medians, {len(prompts)} sequences", header[: len(rows[0])], rows)
    if not args.device.startswith("cuda"):
        say("Without a GPU no kernel of dsv4fuse runs: these times say nothing about its speed.")


if __name__ == "__main__":
    main()
