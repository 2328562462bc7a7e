"""The attention kernels' tensors and numbers as the kernels take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._common import cdiv, is_one, named_strides

MASKS = {"add": 1, "allowed": 2, "hidden": 3}


@dataclass(frozen=True)
class Mask:
    """Who sees which key ``[B or 1, S or 1, T]``; fill: the logit of a hidden key (bool masks)."""

    tensor: Tensor
    kind: str
    fill: float = -math.inf


@dataclass(frozen=True)
class Keys:
    """kv ``[B,G,T,D]`` in a row, then far ``[P,N,D]`` by index ``[B,S,K]`` and page ``[B,S]``; any
    may be None, any axis of B or S may be 1. wrap: a negative index counts from the end."""

    kv: Tensor | None
    far: Tensor | None = None
    index: Tensor | None = None
    page: Tensor | None = None
    wrap: bool = False

    @property
    def own(self) -> bool:
        """Has each query keys of its own?"""
        return self.index is not None or (self.kv is not None and not is_one(self.kv.shape[1]))

    @property
    def near(self) -> int:
        return 0 if self.kv is None else self.kv.shape[2]

    def arguments(self, q: Tensor) -> dict[str, Any]:
        """As the kernel takes them; q stands for a tensor that is absent."""
        kv, far, index, page = self.kv, self.far, self.index, self.page
        return dict(
            kv_ptr=some(kv, q), far_ptr=some(far, q), index_ptr=some(index, q),
            page_ptr=some(page, q),
            near=self.near, far=0 if index is None else index.shape[2],
            rows=0 if far is None else far.shape[1],
            pages=q.shape[0] if far is None or page is None else far.shape[0],
            **named_strides(kv, "kv", "bst"), **named_strides(far, "far", "bt"),
            **named_strides(index, "i", "bsk"), **named_strides(page, "p", "bs"),
            NEAR=kv is not None, FAR=index is not None, PAGED=page is not None, WRAP=self.wrap,
        )  # fmt: skip


def arguments(
    q: Tensor, keys: Keys, mask: Mask | None, sinks: Tensor, out: Tensor | None, *, scale: float,
    rounded: str, wide: bool, nan_empty: bool, tokens: int, width: int,
) -> dict[str, Any]:  # fmt: skip
    """What both attention kernels take."""
    m = mask.tensor if mask else None
    return dict(
        q_ptr=q, sink_ptr=sinks, out_ptr=some(out, q), mask_ptr=some(m, q),
        **named_strides(q, "q", "bsh"), **keys.arguments(q), **named_strides(out, "o", "bsh"),
        **named_strides(m, "m", "bst"),
        sink_sh=sinks.stride(0), length=q.shape[1], blocks=cdiv(q.shape[1], tokens),
        HEADS=q.shape[2], TOKENS=tokens, WIDTH=width, SCALE=scale,
        MASK=MASKS[mask.kind] if mask else 0,
        FILL=0.0 if mask is None or mask.fill == -math.inf else mask.fill,
        P="p" in rounded, C="s" in rounded, M="m" in rounded, WIDE=wide, NAN_EMPTY=nan_empty,
    )  # fmt: skip


def live_tiles(numbers: tuple[Tensor | None, Tensor | None] | None, q: Tensor) -> dict[str, Any]:
    """The list of live tiles, if there is one, as the kernels take it."""
    tiles, counts = numbers or (None, None)
    return dict(tiles_ptr=some(tiles, q), count_ptr=some(counts, q), LIST=tiles is not None)


def some(t: Tensor | None, other: Tensor) -> Tensor:
    """A pointer must be one of something."""
    return other if t is None else t
