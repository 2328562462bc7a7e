"""Hyper-connections behind a sublayer: post · out + combᵀ · streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _hypers as h
from ._case import BF16, FP32, Case, Draw, plain

NAME = "hyper_connection_post"


def inputs(
    *lead: int, dtype: torch.dtype = BF16, weights: torch.dtype = FP32
) -> h.Fn:
    def make() -> tuple[Tensor, ...]:
        draw, size = Draw(), lead or (h.BATCH, h.SEQ)
        out, x = draw(*size, h.DIM, dtype=dtype), draw(*size, h.STREAMS, h.DIM, dtype=dtype)
        return out, x, draw(*size, 4, dtype=weights), draw(*size, 4, 4, dtype=weights)

    return make


def _transformers(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    kind = x.dtype
    return post.to(kind).unsqueeze(-1) * out.unsqueeze(-2) + torch.matmul(
        comb.to(kind).transpose(-1, -2), x
    )


def _reference(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    y = post.unsqueeze(-1) * out.unsqueeze(-2)
    y = y + torch.sum(comb.unsqueeze(-1) * x.unsqueeze(-2), dim=2)
    return y.type_as(out)


def _ours(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.matmul(comb.transpose(-1, -2), x.float())
    return (post.unsqueeze(-1) * out.unsqueeze(-2) + mixed).to(x.dtype)


def _einsum(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.einsum("bsjk,bsjd->bskd", comb, x.float())
    return (mixed + torch.einsum("bsk,bsd->bskd", post, out.float())).to(x.dtype)


def _einsum_in_bf16(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.einsum("bsjk,bsjd->bskd", comb.to(x.dtype), x)
    return mixed + out[:, :, None] * post[..., None].to(x.dtype)


def _rows(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Tokens in one axis."""
    new = _transformers(*(t.flatten(0, 1) for t in (out, x, post, comb)))
    return new.view_as(x)


def _bmm(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.bmm(comb.flatten(0, 1).mT, x.flatten(0, 1).float()).view(x.shape)
    return (mixed + post[..., None] * out[..., None, :]).to(x.dtype)


def _expanded(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The first layer: all streams are the embedding."""
    return _transformers(out, x[:, :, :1].expand(-1, -1, 4, -1).contiguous(), post, comb)


def _case(fn: h.Fn, make: h.Fn | None = None, *parts: str, **more: Any) -> Case:
    return Case(plain(fn), make or inputs(), {NAME: 1}, parts, **more)


def _in_fp32(fn: h.Fn, make: h.Fn | None = None, **more: Any) -> Case:
    """The kernel's reference is one matmul: other products may differ in fp32's last bit."""
    return _case(fn, make, "(once)", **more)


SPELLINGS: dict[str, Case] = {
    "transformers": _case(_transformers, None, "(every)"),
    "the reference": _in_fp32(_reference),
    "ours": _in_fp32(_ours),
    "einsum": _in_fp32(_einsum),
    "einsum in bf16": _case(_einsum_in_bf16, None, "(every)"),
    "rows": _case(_rows, None, "(every)"),
    "bmm": _in_fp32(_bmm),
    "the first layer": _case(_expanded, None, "(every)"),
    "all in fp32": _in_fp32(_transformers, inputs(dtype=FP32)),
    "all in fp32, weights in bf16": _in_fp32(_transformers, inputs(dtype=FP32, weights=BF16)),
    "weights in bf16": _case(_transformers, inputs(weights=BF16), "(every)"),
    "one token": _case(_transformers, inputs(1, 1), "(every)"),
    "dynamic": _case(
        _transformers, inputs(3, 5), "(every)", dynamic={i: (0, 1) for i in range(4)}
    ),
}  # fmt: skip


def _not_transposed(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return _transformers(out, x, post, comb.transpose(-1, -2))


def _post_of_source(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return _transformers(out, post.to(x.dtype).unsqueeze(-1) * x, post, comb)


def _rounded_products(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = (comb.to(x.dtype).unsqueeze(-1) * x.unsqueeze(-2)).sum(2)
    return post.to(x.dtype).unsqueeze(-1) * out.unsqueeze(-2) + mixed


def _minus(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return _transformers(-out, x, post, comb)


def _shared_post(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return _transformers(out, x, post[..., :1], comb)


def _once_rounded_mix(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.matmul(comb.transpose(-1, -2), x.float()).to(x.dtype)
    return (post.unsqueeze(-1) * out.unsqueeze(-2) + mixed).to(x.dtype)


def _other_token(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return _transformers(out, x, post, comb[:1])


def _mutant(fn: h.Fn, like: str, **more: Any) -> Case:
    return Case(plain(fn), inputs(), like=SPELLINGS[like], **more)


MUTANTS: dict[str, Case] = {
    "comb not transposed": _mutant(_not_transposed, "transformers", counts={NAME: 1}),
    "products rounded in bf16": _mutant(_rounded_products, "transformers"),
    "one post for all streams": _mutant(_shared_post, "transformers"),
    "the mix rounded, the sum not": _mutant(_once_rounded_mix, "ours"),
    "one batch's comb for all": _mutant(_other_token, "transformers"),
    "out negated": _mutant(_minus, "transformers"),
    "streams weighted first": _mutant(_post_of_source, "transformers", counts={NAME: 1}),
}


def _stacked(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    new = [
        post[..., k, None] * out + (comb[..., k, None] * x).sum(2) for k in range(h.STREAMS)
    ]
    return torch.stack(new, 2).to(x.dtype)


KNOWN_MISSES: dict[str, Case] = {
    "stream by stream": _case(_stacked, why="Each stream is a sum of its own, joined behind it."),
}
