"""Greedy generation. ``python -m examples.deepseek_v4.generate --help`` runs it by itself."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .config import PRESETS
from .load import randomize
from .model import Transformer

Forward = Callable[[Tensor, Tensor], Tensor]


def pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths → tokens and positions ``[B, S]``, padded on the right with
    token 0 at position −1."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = [list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    positions = [list(range(len(p))) + [-1] * (longest - len(p)) for p in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(positions, device=device)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    n: int,
    prefill: Forward | None = None,
    decode: Forward | None = None,
) -> Tensor:
    """The ``n`` most likely next tokens of each prompt, ``[B, n]``.

    The model must be allocated for the batch and for the longest prompt + n. ``prefill`` and
    ``decode`` stand in for the model's own, compiled perhaps.
    """
    prefill, decode = prefill or model.prefill, decode or model.decode
    tokens, positions = pad(prompts, model.lm_head.weight.device)
    position = positions.amax(dim=1, keepdim=True)
    token = prefill(tokens, positions).argmax(dim=-1, keepdim=True)
    out = [token]
    for _ in range(n - 1):
        position = position + 1
        token = decode(token, position)[:, -1].argmax(dim=-1, keepdim=True)
        out.append(token)
    return torch.cat(out, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy generation from random weights.")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int, help="keep only the first layers")
    parser.add_argument("--experts", type=int, help="keep only so many experts")
    parser.add_argument("--prompts", type=int, nargs="+", default=[5, 12], help="their lengths")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    config = PRESETS[args.preset]
    config = dataclasses.replace(
        config,
        layers=config.layers[: args.layers],
        n_experts=args.experts or config.n_experts,
    )
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(args.device):
        model = Transformer(config)
    randomize(model)
    model.allocate(len(args.prompts), max(args.prompts) + args.tokens)
    prefill, decode = model.prefill, model.decode
    if args.compile:
        prefill = torch.compile(prefill, fullgraph=True)
        decode = torch.compile(decode, fullgraph=True, mode="reduce-overhead")
    prompts = [torch.randint(config.vocab_size, (length,)).tolist() for length in args.prompts]
    for prompt, answer in zip(
        prompts, generate(model, prompts, args.tokens, prefill, decode).tolist(), strict=True
    ):
        print(prompt, "→", answer)


if __name__ == "__main__":
    main()
