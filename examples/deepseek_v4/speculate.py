"""Greedy generation with drafts of the model's own MTP head: the tokens of plain greedy decoding,
several per step where the drafts are right.

A row's state between steps is its newest token, at ``position``, which no cache has seen yet, and
``next_n − 1`` drafts for the positions behind it. A step runs the model on all of them at once.
Where its own choice is the draft, the choice behind the draft counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .generate import chunks, pad
from .model import Transformer, column

Advance = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def draft(model: Transformer, streams: Tensor, position: Tensor) -> Tensor:
    """``next_n − 1`` drafts ``[B, next_n − 1]`` from the MTP layer's streams ``[B, 1, hc_mult, D]``
    of the last column, whose position is ``position − 1`` ``[B, 1]`` (or any, in a row of padding).
    The head has learnt to look one token ahead; for more it reads its own streams."""
    drafts = [model.mtp_head(streams).argmax(dim=-1)]
    for ahead in range(model.next_n - 2):
        here = torch.where(position >= 0, position + ahead, -1)
        streams = model.mtp_streams(streams, drafts[-1], here, False)
        drafts.append(model.mtp_head(streams).argmax(dim=-1))
    return torch.cat(drafts, dim=1)


def advance(model: Transformer, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step. tokens ``[B, next_n]``: the newest and its drafts; position ``[B, 1]`` of the
    newest, −1 for a row that is done.

    Returns the model's choices ``[B, next_n]``, how many of them count ``[B, 1]``, 1 … next_n,
    and the tokens of the next step.
    """
    every = torch.arange(model.next_n, device=tokens.device)
    streams = model.streams(tokens, torch.where(position >= 0, position + every, -1), False)
    chosen = model.logits(streams).argmax(dim=-1)
    agreed = (chosen[:, :-1] == tokens[:, 1:]).cumprod(dim=1).sum(dim=1, keepdim=True)
    # The MTP layer sees what counts only, with the streams of the model in place of its own.
    counts = (position >= 0) & (every <= agreed)
    known = torch.where(counts, position + every, -1)
    ahead = column(model.mtp_streams(streams, chosen, known, False), agreed)
    newest = chosen.gather(1, agreed)
    drafts = draft(model, ahead, torch.where(position >= 0, position + agreed + 1, -1))
    return chosen, agreed + 1, torch.cat((newest, drafts), dim=1)


def prime(
    model: Transformer, tokens: Tensor, positions: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """The prompts ``[B, S]`` into all caches; the tokens of the first step and their position."""
    last = positions.amax(dim=1, keepdim=True)
    newest, ahead = torch.zeros_like(last), None
    for columns in chunks(tokens.shape[1], chunk):
        here, past = positions[:, columns], columns.start > 0
        streams = model.streams(tokens[:, columns], here, True, past)
        at = here.argmax(dim=1, keepdim=True)
        ends = here.gather(1, at) == last  # rows whose prompt ends in this chunk
        best = model.logits(column(streams, at)).argmax(dim=-1)
        newest = torch.where(ends, best, newest)
        following = tokens.roll(-1, dims=1)[:, columns]
        following = torch.where((here == last) & (here >= 0), newest, following)
        mtp = column(model.mtp_streams(streams, following, here, True, past), at)
        ahead = mtp if ahead is None else torch.where(ends[..., None, None], mtp, ahead)
    return torch.cat((newest, draft(model, ahead, last + 1)), dim=1), last + 1


@torch.no_grad()
def generate_with_drafts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    n: int,
    chunk: int | None = None,
    step: Advance | None = None,
) -> tuple[Tensor, list[int]]:
    """The tokens of ``generate``, ``[B, n]``, and how many tokens each step gave, of all rows.

    The model must be allocated for the longest prompt + n + next_n, with next_n ≥ 2. ``step``
    stands in for ``advance`` on this model, compiled perhaps: its shapes never change.
    """
    if model.mtp is None or model.next_n < 2:
        raise ValueError("drafts need an MTP head and allocate(..., next_n=2) or more")
    tokens, position = prime(model, *pad(prompts, model.lm_head.weight.device, chunk), chunk)
    every = torch.arange(model.next_n, device=tokens.device)
    out = tokens.new_zeros(len(prompts), n + model.next_n)
    out[:, :1] = tokens[:, :1]
    count, gains = torch.ones_like(position), []
    while (count < n).any():
        active = torch.where(count < n, position, -1)
        chosen, gained, tokens = (step or _on(model))(tokens, active)
        gained = torch.where(count < n, gained, 0)
        out.scatter_(1, count.clamp(max=n) + every, chosen)
        count, position = count + gained, position + gained
        gains.append(int(gained.sum()))
    return out[:, :n], gains


def _on(model: Transformer) -> Advance:
    return lambda tokens, position: advance(model, tokens, position)
