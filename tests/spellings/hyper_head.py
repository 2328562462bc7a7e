"""Hyper-connections at the end of a model: the streams collapsed into one."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from examples.deepseek_v4.hyper import HyperHead

from . import _hypers as h
from ._case import BF16, FP32, Case, plain

NAME = "hyper_head"


def _config() -> SimpleNamespace:
    return SimpleNamespace(hc_mult=4, hc_eps=h.EPS, rms_norm_eps=h.NORM_EPS, norm_eps=h.NORM_EPS,
                           hidden_size=h.DIM)  # fmt: skip


def _called(module: torch.nn.Module) -> h.Fn:
    def fn(x: Tensor, w: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        made = dict(hc_fn=w, hc_scale=scale, hc_base=base)
        return torch.func.functional_call(module, made, (x,))

    return fn


def _transformers() -> h.Fn:
    home = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")
    return _called(home.DeepseekV4HyperHead(_config()))


def head(mixes: h.Fn = h.mixes_of_normed, y: h.Fn = h.collapse, eps: float = h.EPS) -> h.Fn:
    def fn(x: Tensor, w: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        return y(torch.sigmoid(mixes(x, w) * scale + base) + eps, x)

    return fn


def _softmax(x: Tensor, w: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    pre = torch.softmax(h.mixes_of_normed(x, w) * scale + base, -1) + h.EPS
    return h.collapse(pre, x)


def _base_first(x: Tensor, w: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    return h.collapse(torch.sigmoid((h.mixes_of_normed(x, w) + base) * scale) + h.EPS, x)


def _one_rounding_more(pre: Tensor, x: Tensor) -> Tensor:
    return h.collapse((pre.to(BF16)).float(), x)


def _mean(pre: Tensor, x: Tensor) -> Tensor:
    return (pre.unsqueeze(-1) * x).mean(dim=2).to(x.dtype)


def _case(fn: h.Fn, make: h.Fn | None = None, **more: Any) -> Case:
    return Case(plain(fn), make or h.inputs(outputs=4), {NAME: 1}, **more)


USUAL = _case(head())
SPELLINGS: dict[str, Case] = {
    "transformers": _case(_transformers()),
    "ours": _case(_called(HyperHead(_config()))),  # type: ignore[arg-type]
    "the reference": _case(head(h.mixes_scaled)),
    "rows first": _case(head(h.mixes_of_rows)),
    "over a root": _case(head(h.mixes_over_root), exact=False),
    "einsum": _case(head(y=h.collapse_by_einsum)),
    "fp32 streams": _case(head(), h.inputs(dtype=FP32, outputs=4)),
    "one token": _case(head(h.mixes_scaled), h.inputs(1, 1, outputs=4)),
    "dynamic": _case(head(), h.inputs(3, 5, outputs=4), dynamic={0: (0, 1)}),
}  # fmt: skip
MUTANTS: dict[str, Case] = {
    name: Case(plain(fn), h.inputs(outputs=4), like=USUAL)
    for name, fn in {
        "each stream over its own RMS": head(h.mixes_of_each_stream),
        "product in bf16": head(h.mixes_in_bf16),
        "softmax": _softmax,
        "base in front of the scale": _base_first,
        "pre rounded": head(y=_one_rounding_more),
        "mean of the streams": head(y=_mean),
    }.items()
}
