"""``generate`` of transformers' DeepSeek-V4 on a static cache, its decode one graph.

    python examples/hf_generate.py                                      # tiny, random weights
    python examples/hf_generate.py --size flash --layers 4 --experts 32             # on a GPU

A batch of prompts of different lengths, padded on the left. The tokens are those of eager
transformers on its own cache, and the second run compiles nothing. On a GPU the decode runs
under CUDA graphs. Tiny models are fp32 everywhere, so that no rounding can turn a token.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import CompileConfig  # noqa: E402

from dsv4fuse.models.hf import StaticV4Cache  # noqa: E402
from examples.hf_deepseek_v4 import build  # noqa: E402
from examples.measure import backend, parsed, show  # noqa: E402

console = Console()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint to load instead of random weights")
    parser.add_argument("--size", choices=("tiny", "flash"), default="tiny")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="keep only so many experts")
    parser.add_argument("--prompts", type=int, nargs="+", default=[5, 12, 37], help="lengths")
    parser.add_argument("--tokens", type=int, default=256, help="how many to generate")
    return parsed(parser)


def left_padded(prompts: Sequence[Sequence[int]], device: Any) -> dict[str, Tensor]:
    """input_ids and attention_mask ``[B, longest]``, as a tokenizer of transformers pads."""
    longest = max(len(prompt) for prompt in prompts)
    gaps = [longest - len(prompt) for prompt in prompts]
    tokens = [[0] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return {
        "input_ids": torch.tensor(tokens, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def compiled(inductor: bool, cuda: bool) -> CompileConfig:
    """How ``generate`` is to compile decode steps; on a CPU it only does so when it is told to."""
    given: dict[str, Any] = {"mode": "reduce-overhead"}
    if not cuda or not inductor:
        given = {"mode": None, "options": {"select": "auto" if cuda else "always"}}
    if not inductor:
        given["options"]["inner"] = "eager"
    config = CompileConfig(backend=backend(), fullgraph=True, **given)
    config._compile_all_devices = True
    return config


def greedy(model: Any, inputs: dict[str, Tensor], n: int, **others: Any) -> tuple[Tensor, float]:
    """The ``n`` tokens behind the prompts ``[B, n]``, and the seconds it took."""
    started = time.perf_counter()
    out = model.generate(
        **inputs, max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None, **others
    )
    tokens = out[:, inputs["input_ids"].shape[1] :].cpu()
    return tokens, time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    args = arguments()
    args.dtype = torch.float32 if args.size == "tiny" and not args.model else None
    model = build(args)
    cuda, n = args.device.startswith("cuda"), args.tokens
    draw = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(1, model.config.vocab_size, (length,), generator=draw).tolist()
        for length in args.prompts
    ]
    inputs = left_padded(prompts, args.device)
    cache = StaticV4Cache(model, len(prompts), max(args.prompts) + n)
    config = compiled(args.inductor, cuda)

    rows = []
    wanted, seconds = greedy(model, inputs, n)
    rows.append(("eager, transformers' own cache", f"{seconds:.2f}", f"{1e3 * seconds / n:.2f}"))
    found, seconds = greedy(model, inputs, n, past_key_values=cache, compile_config=config)
    rows.append(("compiled, static cache: first", f"{seconds:.2f}", ""))
    cache.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        again, seconds = greedy(model, inputs, n, past_key_values=cache, compile_config=config)
    rows.append(("compiled, static cache: second", f"{seconds:.2f}", f"{1e3 * seconds / n:.2f}"))
    header = (f"generate, {len(prompts)} × {n} tokens", "s", "ms per token")
    show(console, f"{len(model.config.layer_types)} layers on {args.device}", header, rows)
    equal = int((found == wanted).sum())
    repeats = "repeats" if torch.equal(found, again) else "DOES NOT repeat"
    print(f"{equal} of {wanted.numel()} tokens are those of eager; the second run, which compiled "
          f"nothing, {repeats} the first.")  # fmt: skip


if __name__ == "__main__":
    main()
