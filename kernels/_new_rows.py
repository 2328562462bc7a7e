"""A decode step's raw rows, which compress_kv may write to the rings that it pools from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _common as common
from . import _norm_rope as host
from . import norm_rope_cache as rows

MOST = 8  # new tokens of each request


@dataclass(frozen=True)
class NewRows:
    """kv and gate ``[B,S,C]`` go to ``[b, at[b,s]]`` of the caches ``[P,R,C]``, the gate with
    ``bias[place[b,s]]`` added. An entry's D channels lie from ``channel`` on, those of the rows in
    front of its window (``before``) from ``channel_before`` on."""

    kv_cache: Tensor
    gate_cache: Tensor
    kv: Tensor
    gate: Tensor
    at: Tensor
    bias: Tensor | None
    place: Tensor | None
    channel: int
    channel_before: int
    before: bool

    def write(self) -> None:
        """In plain PyTorch."""
        gate = self.gate
        if self.bias is not None and self.place is not None:
            gate = gate.float() + self.bias.float()[self.place.long()]
        for cache, new in ((self.kv_cache, self.kv), (self.gate_cache, gate)):
            rows.write_rows(cache, new.to(cache.dtype), self.at, None, 0, 0, True)


def step_views(new: NewRows, dim: int) -> tuple[Tensor | None, ...]:
    """kv, gate, kv_before, gate_before ``[P,R,D]`` in the caches; raises ValueError."""
    channels = new.kv_cache.shape[-1]
    for name, t, cache in (("kv", new.kv, new.kv_cache), ("gate", new.gate, new.gate_cache)):
        fits = t.dim() == 3 and t.shape[-1] == channels and t.stride(-1) == 1
        common.require(fits, f"new_{name} must be [B, S, {channels}], its last axis dense")
        fits = cache.dim() == 3 and cache.shape == new.kv_cache.shape and cache.stride(-1) == 1
        common.require(fits, f"{name} must be a cache [P, R, C], its last axis dense")
        common.require(t.dtype in common.FLOATS and cache.dtype in common.FLOATS,
                       f"{name} must be bf16, fp16 or fp32")  # fmt: skip
    common.require(new.kv.dtype == new.kv_cache.dtype, "new_kv has another dtype than its cache")
    common.require_static(new_tokens=new.kv.shape[1])
    common.require(new.kv.shape[1] <= MOST, f"at most {MOST} new tokens of each request")
    halves = {new.channel} | ({new.channel_before} if new.before else set())
    common.require(halves == set(range(0, channels, dim)), "the halves are not all of the channels")
    if new.bias is None:
        common.require(new.gate.dtype == new.gate_cache.dtype, "new_gate has another dtype")
    else:
        common.require(new.place is not None and new.gate_cache.dtype == torch.float32,
                       "a bias is added in fp32, at places")  # fmt: skip
    lead = (new.channel, new.channel_before if new.before else None)
    return tuple(
        None if at is None else cache.narrow(-1, at, dim)
        for at in lead for cache in (new.kv_cache, new.gate_cache)
    )  # fmt: skip


def step_arguments(new: NewRows | None, filler: Tensor) -> dict[str, object]:
    """The kernel's arguments: caches whole, so that each is one argument."""
    given = None if new is None else new.bias
    out: dict[str, object] = dict(
        nk_ptr=filler if new is None else new.kv, **host.strides(new and new.kv, "nk", "bs"),
        ng_ptr=filler if new is None else new.gate, **host.strides(new and new.gate, "ng", "bs"),
        nb_ptr=filler if given is None else given, **host.strides(given, "nb", "r"),
        place_ptr=filler if given is None else new.place,  # type: ignore[union-attr]
        **host.strides(None if given is None else new.place, "place", "bs"),  # type: ignore
        at_ptr=filler if new is None else new.at, **host.strides(new and new.at, "at", "bs"),
        rows=0 if new is None else new.kv_cache.shape[1],
        places=0 if given is None else given.shape[0],
        NEW=0 if new is None else new.kv.shape[1], HAS_STEP_BIAS=given is not None,
        NOW_AT=0 if new is None else new.channel,
        OLD_AT=0 if new is None else new.channel_before if new.before else new.channel,
    )  # fmt: skip
    if new is not None:
        for name, t in (("kv", new.kv_cache), ("gate", new.gate_cache)):
            out |= {f"{name}_ptr": t, f"{name}b_ptr": filler}
    return out
