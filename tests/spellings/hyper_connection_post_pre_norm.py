"""Hyper-connections between two sublayers: a post, the next one's pre and its norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _hypers as h
from . import hyper_connection_post as behind
from ._case import BF16, FP32, Case, plain

NAME = "hyper_connection_post_pre_norm"
APART = {"hyper_connection_post": 1, "hyper_connection_pre": 1}
new_in_bf16, new_in_fp32 = behind._transformers, behind._ours


def inputs(
    *lead: int, dtype: torch.dtype = BF16, small: torch.dtype = FP32
) -> h.Fn:
    """out, x, post, comb; fn, scale, base, and the norm's weight."""

    def make() -> tuple[Tensor, ...]:
        size = lead or (h.BATCH, h.SEQ)
        first = behind.inputs(*size, dtype=dtype, weights=small)()
        _, w, scale, base = h.inputs(*size, small=small)()
        return *first, w, scale, base, (w[0, : h.DIM] + 1).to(small)

    return make


def norm(y: Tensor, weight: Tensor) -> Tensor:
    """With the weight, rounded once."""
    wide = y.float()
    return (weight * (wide * h.rms(wide))).to(y.dtype)


def norm_weighted_last(y: Tensor, weight: Tensor) -> Tensor:
    wide = y.float()
    return weight.to(y.dtype) * (wide * h.rms(wide)).to(y.dtype)


def between(new: h.Fn, ahead: h.Fn | None = None, after: h.Fn = norm, keep: bool = True) -> h.Fn:
    """``keep``: the new streams are read by what lies behind, as in a model."""
    ahead = ahead or h.connection()

    def fn(
        out: Tensor, x: Tensor, post: Tensor, comb: Tensor, w: Tensor, scale: Tensor, base: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        streams = new(out, x, post, comb)
        y, post, comb = ahead(streams, w, scale, base)
        return after(y, weight), post, comb, *((streams,) if keep else ())

    return fn


def _two_layers(*args: Tensor) -> tuple[Tensor, ...]:
    """The second one on what the first one made: two sites, and a post behind them."""
    out, x, post, comb, w, scale, base, weight = args
    for _ in range(2):
        streams = new_in_bf16(out, x, post, comb)
        y, post, comb = h.connection()(streams, w, scale, base)
        out, x = torch.tanh(norm(y, weight)), streams
    return new_in_bf16(out, x, post, comb), x


def _case(fn: h.Fn, make: h.Fn | None = None, *parts: str, **more: Any) -> Case:
    return Case(plain(fn), make or inputs(), {NAME: 1}, parts or ("→ norm",), **more)


REFERENCE = h.connection(h.mixes_scaled, h.split_by_slices)
USUAL = _case(between(new_in_bf16))
SPELLINGS: dict[str, Case] = {
    "transformers": USUAL,
    "the reference": _case(between(behind._reference, REFERENCE)),
    "ours": _case(between(new_in_fp32), None, "(once)"),
    "einsum": _case(between(behind._einsum, h.connection(y=h.collapse_by_einsum))),
    "bmm and matmul": _case(between(behind._bmm, h.connection(y=h.collapse_by_matmul))),
    "the weight behind the rounding": _case(between(new_in_bf16, after=norm_weighted_last)),
    "nobody else reads the streams": _case(between(new_in_bf16, keep=False)),
    "fp32": _case(between(new_in_fp32), inputs(dtype=FP32)),
    "bf16 parameters": _case(between(new_in_bf16), inputs(small=BF16)),
    "one token": _case(between(new_in_bf16), inputs(1, 1)),
    "two layers": Case(
        plain(_two_layers), inputs(), {NAME: 2, "hyper_connection_post": 1}, ("→ norm",)
    ),
    "dynamic": _case(
        between(new_in_bf16), inputs(3, 5), dynamic={i: (0, 1) for i in range(4)}
    ),
}  # fmt: skip


def _mutant(fn: h.Fn, counts: dict[str, int] | None = None) -> Case:
    """Not exact where the pre is not taken: eager's softmax is one kernel, the graph's is not."""
    exact = "hyper_connection_pre" in (counts or {})
    return Case(plain(fn), inputs(), counts or {}, like=USUAL, exact=exact)


def _mixes_of_old_streams(*args: Tensor) -> tuple[Tensor, ...]:
    out, x, post, comb, *rest, weight = args
    y, *weights = h.connection()(x, *rest)
    return norm(y, weight), *weights, new_in_bf16(out, x, post, comb)


def _scaled_between(*args: Tensor) -> tuple[Tensor, ...]:
    return between(lambda *a: new_in_bf16(*a) * 0.5)(*args)


def _rounded_mix(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.matmul(comb.transpose(-1, -2), x.float()).to(x.dtype)
    return (post.unsqueeze(-1) * out.unsqueeze(-2) + mixed).to(x.dtype)


def _y_read_twice(*args: Tensor) -> tuple[Tensor, ...]:
    """No norm for the fused op: what is normed is read besides."""
    y, *others = between(new_in_bf16, after=lambda y, w: y)(*args)
    return norm(y, args[-1]), y + 1, *others


MUTANTS: dict[str, Case] = {
    "mixes of the old streams": _mutant(_mixes_of_old_streams, APART),
    "streams scaled in between": _mutant(_scaled_between, APART),
    "no norm": _mutant(between(new_in_bf16, after=lambda y, w: y + w.to(y.dtype)), APART),
    "y read twice": _mutant(_y_read_twice, APART),
    "another rounding of the streams": _mutant(
        between(_rounded_mix), {"hyper_connection_pre": 1}
    ),
    "product in bf16": _mutant(
        between(new_in_bf16, h.connection(h.mixes_in_bf16)), {"hyper_connection_post": 1}
    ),
    "each stream over its own RMS": _mutant(
        between(new_in_bf16, h.connection(h.mixes_of_each_stream)), {"hyper_connection_post": 1}
    ),
    "softmax of columns": _mutant(
        between(new_in_bf16, h.connection(
            parts=partial(h.split, comb=partial(h.sinkhorn, soft=-2)))),
        {"hyper_connection_post": 1},
    ),
}  # fmt: skip

KNOWN_MISSES: dict[str, Case] = {
    "streams in rows, weights not": _case(
        between(behind._rows), why="post and comb have two leading axes, the streams one.",
        exact=False,
    ),
}
