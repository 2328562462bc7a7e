"""Greedy generation. ``python -m examples.deepseek_v4.generate --help`` runs it by itself."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .config import PRESETS
from .load import randomize
from .model import Transformer

Forward = Callable[..., Tensor]  # of tokens, positions, and for prefill whether there is a past


def pad(
    prompts: Sequence[Sequence[int]], device: torch.device, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths → tokens and positions ``[B, S]``, padded on the right with
    token 0 at position −1; S a multiple of ``chunk``."""
    longest = max(len(prompt) for prompt in prompts)
    longest += -longest % (chunk or 1)
    tokens = [list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    positions = [list(range(len(p))) + [-1] * (longest - len(p)) for p in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(positions, device=device)


def chunks(length: int, chunk: int | None) -> list[slice]:
    """The columns of a prompt, at most ``chunk`` at a time; None: all at once."""
    chunk = chunk or length
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def read(tokens: Tensor, positions: Tensor, chunk: int | None, prefill: Forward) -> Tensor:
    """Prefill chunk after chunk; the logits of each row's last token, ``[B, vocab]``."""
    logits = None
    for columns in chunks(tokens.shape[1], chunk):
        here = positions[:, columns]
        if logits is None:
            logits = prefill(tokens[:, columns], here)
        else:
            goes_on = (here >= 0).any(dim=1, keepdim=True)
            logits = torch.where(goes_on, prefill(tokens[:, columns], here, True), logits)
    return logits


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    n: int,
    prefill: Forward | None = None,
    decode: Forward | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The ``n`` most likely next tokens of each prompt, ``[B, n]``.

    The model must be allocated for the batch and for the longest prompt + n. ``prefill`` and
    ``decode`` stand in for the model's own, compiled perhaps. ``chunk``: how many columns of the
    prompts a prefill takes; all of them if None.
    """
    prefill, decode = prefill or model.prefill, decode or model.decode
    tokens, positions = pad(prompts, model.lm_head.weight.device, chunk)
    position = positions.amax(dim=1, keepdim=True)
    token = read(tokens, positions, chunk, prefill).argmax(dim=-1, keepdim=True)
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
    parser.add_argument("--chunk", type=int, help="prefill so many columns at a time")
    parser.add_argument("--drafts", type=int, default=0, help="of the MTP head, for each step")
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
    next_n = args.drafts + 1
    longest = max(args.prompts) + -max(args.prompts) % (args.chunk or 1)
    model.allocate(len(args.prompts), longest + args.tokens + next_n, next_n)
    prompts = [torch.randint(config.vocab_size, (length,)).tolist() for length in args.prompts]

    def compiled(fn: Forward, **how: str) -> Forward:
        return torch.compile(fn, fullgraph=True, **how) if args.compile else fn

    if args.drafts:
        from .speculate import advance, generate_with_drafts

        step = compiled(functools.partial(advance, model), mode="reduce-overhead")
        answers, gains = generate_with_drafts(model, prompts, args.tokens, args.chunk, step)
        print(f"{sum(gains)} tokens of {len(prompts)} prompts in {len(gains)} steps")
    else:
        prefill, decode = compiled(model.prefill), compiled(model.decode, mode="reduce-overhead")
        answers = generate(model, prompts, args.tokens, prefill, decode, args.chunk)
    for prompt, answer in zip(prompts, answers.tolist(), strict=True):
        print(prompt, "→", answer)


if __name__ == "__main__":
    main()
