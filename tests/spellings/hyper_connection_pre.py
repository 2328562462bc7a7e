"""Hyper-connections in front of a sublayer: mixes, post, comb, the collapsed input [, its norm]."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from examples.deepseek_v4.hyper import HyperConnection

from . import _hypers as h
from ._case import BF16, FP32, Case, plain

NAME = "hyper_connection_pre"


def _case(fn: h.Fn, make: h.Fn | None = None, *parts: str, **more: Any) -> Case:
    return Case(plain(fn), make or h.inputs(), {NAME: 1}, parts, **more)


def _transformers(norm: bool) -> h.Fn:
    """The modules of ``transformers``, the norm behind them as well."""
    home = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = SimpleNamespace(
        hc_mult=4, hc_sinkhorn_iters=20, hc_eps=h.EPS, rms_norm_eps=h.NORM_EPS, hidden_size=h.DIM
    )
    module, after = home.DeepseekV4HyperConnection(config), home.DeepseekV4RMSNorm(h.DIM).to(BF16)

    def fn(x: Tensor, w: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        made = dict(fn=w, scale=scale, base=base)
        post, comb, y = torch.func.functional_call(module, made, (x,))
        return after(y) if norm else y, post, comb

    return fn


def _ours() -> h.Fn:
    config = SimpleNamespace(
        hc_mult=4, hc_sinkhorn_iters=3, hc_eps=h.EPS, norm_eps=h.NORM_EPS, hidden_size=h.DIM
    )
    module = HyperConnection(config)  # type: ignore[arg-type]
    module.forward = module.collapse  # type: ignore[method-assign]

    def fn(x: Tensor, w: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(module, dict(fn=w, scale=scale, base=base), (x,))

    return fn


def _normed(fn: h.Fn, twice: bool = False, order: h.Fn = lambda y: y) -> h.Fn:
    """With an fp32 weight, rounded once; ``twice``: y has another reader."""

    def with_norm(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        y, post, comb = fn(x, *rest)
        wide = order(y).float()
        weight = rest[0][0, : y.shape[-1]] + 1
        normed = (weight * (wide * h.rms(wide))).to(y.dtype)
        return (normed, post, comb, *((y + 1,) if twice else ()))

    return with_norm


def _expanded(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """The first layer: all streams are the embedding."""
    streams = x[:, :, 0].unsqueeze(2).expand(-1, -1, h.STREAMS, -1).contiguous()
    return h.connection()(streams, *rest)


def _flat_comb(mixes: Tensor, scale: Tensor, base: Tensor) -> Any:
    """post and comb of tokens in one axis."""
    return h.split(mixes.flatten(0, 1), scale, base)


def _y_of_rows(pre: Tensor, x: Tensor) -> Tensor:
    return (pre[..., None] * x.flatten(0, 1)).sum(dim=1).to(x.dtype).view(*x.shape[:2], -1)


def _beside_one(axis: int, y: h.Fn = h.collapse) -> h.Fn:
    """The mixes with an axis of size one more; pre, post and comb lose it again."""

    def fn(x: Tensor, w: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        pre, post, comb = h.split(h.mixes_scaled(x, w).unsqueeze(axis), scale, base)
        return y(pre.squeeze(axis), x), post.squeeze(axis), comb.squeeze(axis)

    return fn


def _streams_beside_one(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Tokens in one axis and one of size one behind it, which only comb and post lose."""
    rows = x.flatten(0, 1).unsqueeze(1)
    y, post, comb = h.connection()(rows, *rest)
    return y, post.squeeze(1), comb.squeeze(1)


def _pre_of_the_next(pre: Tensor, x: Tensor) -> Tensor:
    """Not the same: each token takes another one's weights."""
    return h.collapse(pre.roll(1, 1), x)


def _pre_across(pre: Tensor, x: Tensor) -> Tensor:
    """Not the same: an axis of one that is left in broadcasts, and tokens are summed."""
    return (pre.flatten(0, 1)[:, None, :, None] * x.flatten(0, 1)).sum(dim=1).to(x.dtype)


def _more_readers(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """comb transposed and rounded, as a layer uses it."""
    y, post, comb = h.connection(h.mixes_scaled)(x, *rest)
    return y * 2, post.to(BF16).unsqueeze(-1) + 0, comb.to(BF16).transpose(-1, -2) * 1, comb


def _with(**edit: Any) -> h.Fn:
    return h.connection(parts=partial(h.split, **edit))


def _nest(**edit: Any) -> h.Fn:
    return _with(comb=partial(h.sinkhorn, **edit))


USUAL = _case(h.connection())
SPELLINGS: dict[str, Case] = {
    "transformers' words": USUAL,
    "transformers' module": _case(_transformers(False), None, "20 Sinkhorn"),
    "transformers' module and norm": _case(_transformers(True), None, "norm"),
    "the reference": _case(h.connection(h.mixes_scaled, h.split_by_slices)),
    "ours": _case(_ours(), None, "3 Sinkhorn"),
    "norm in fp32": _case(_normed(h.connection(h.mixes_scaled)), None, "norm"),
    "norm, as many sequences as tokens": _case(_normed(h.connection()), h.inputs(3, 3), "norm"),
    "norm, y read twice": _case(_normed(h.connection(), True), absent=("norm",)),
    "rows first": _case(h.connection(h.mixes_of_rows)),
    "post and comb of rows": _case(h.connection(parts=_flat_comb, y=_y_of_rows)),
    "mean over streams and lanes": _case(h.connection(h.mixes_by_mean_of_streams)),
    "over a root": _case(h.connection(h.mixes_over_root), exact=False),
    "in place": _case(_with(comb=h.sinkhorn_in_place)),
    "one iteration": _case(_nest(iters=1), None, "1 Sinkhorn"),
    "collapse by einsum": _case(h.connection(y=h.collapse_by_einsum)),
    "collapse by matmul": _case(h.connection(y=h.collapse_by_matmul)),
    "the first layer": _case(_expanded),
    "readers of comb": _case(_more_readers),
    "without post's two": _case(_with(twice=1)),
    "fp32 streams": _case(h.connection(), h.inputs(dtype=FP32)),
    "bf16 parameters": _case(h.connection(), h.inputs(small=BF16)),
    "one token": _case(h.connection(h.mixes_scaled), h.inputs(1, 1)),
    "dynamic": _case(h.connection(), h.inputs(3, 5), dynamic={0: (0, 1)}),
    "an axis of one behind the tokens": _case(_beside_one(2), None, "3 Sinkhorn"),
    "an axis of one between them": _case(_beside_one(1)),
    "an axis of one in front, dynamic": _case(
        _beside_one(0), h.inputs(3, 5), dynamic={0: (0, 1)}
    ),
    "streams beside one": _case(_streams_beside_one),
}  # fmt: skip


def _mutant(fn: h.Fn, **more: Any) -> Case:
    """Not exact where it is not taken: eager's softmax is one kernel, the graph's is not."""
    return Case(plain(fn), h.inputs(), like=USUAL, exact="counts" in more, **more)


MUTANTS: dict[str, Case] = {
    "each stream over its own RMS": _mutant(h.connection(h.mixes_of_each_stream)),
    "product in bf16": _mutant(h.connection(h.mixes_in_bf16)),
    "pre rounded": _mutant(h.connection(y=h.collapse_rounded)),
    "pre without eps": _mutant(_with(eps=0.0)),
    "no eps in the first sum": _mutant(_nest(first=0.0)),
    "another eps in the first sum": _mutant(_nest(first=0.02)),
    "rows normalised last": _mutant(_nest(row=True), counts={NAME: 1}),  # behind the fused op
    "rows before columns": _mutant(_nest(axes=(-1, -2))),
    "softmax of columns": _mutant(_nest(soft=-2)),
    "base of comb transposed": _mutant(_with(shift=True)),
    "an axis of one, pre of another token": _mutant(_beside_one(2, _pre_of_the_next)),
    "an axis of one that broadcasts": _mutant(_beside_one(2, _pre_across)),
}


def _one_scale(mixes: Tensor, scale: Tensor, base: Tensor) -> Any:
    return h.split(mixes, scale, base, scales=scale[[0, 0, 0]].unbind(0))


_SQUARE = SPELLINGS["norm, as many sequences as tokens"]
MUTANTS["norm of tokens in another order"] = Case(
    plain(_normed(h.connection(), order=lambda y: y.transpose(0, 1))), _SQUARE.inputs,
    {NAME: 1}, absent=("norm",), like=_SQUARE,
)  # fmt: skip
MUTANTS["one scale for all"] = _mutant(h.connection(parts=_one_scale), counts={NAME: 1})


def _by_reciprocal(logits: Tensor) -> Tensor:
    comb = logits.softmax(-1) + h.EPS
    return comb * (comb.sum(-2, keepdim=True) + h.EPS).reciprocal()


def _written_out(pre: Tensor, x: Tensor) -> Tensor:
    return sum(pre[..., i, None] * x[..., i, :] for i in range(h.STREAMS)).to(x.dtype)  # type: ignore


def _tall(x: Tensor, w: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return h.connection()(x, w.t().contiguous().t(), *rest)


KNOWN_MISSES: dict[str, Case] = {
    "sums by their reciprocal": _case(
        _with(comb=_by_reciprocal), exact=False,
        why="A step is x / sum: x · (1 / sum) rounds twice.",
    ),
    "collapse written out": _case(
        h.connection(y=_written_out), exact=False,
        why="The sum over the streams is four additions, no sum.",
    ),
}  # fmt: skip
