"""A site of the grouped projection, and which ways to compute it are open to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from dsv4fuse.kernels._strategies import LANES, choose
from dsv4fuse.patterns._grouped import Rows, Weight
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsv4fuse import compat, maps
from dsv4fuse.chains import Quantised
from dsv4fuse.layout import Order, token_count
from dsv4fuse.scene import Hit

NAME = "inv_rope_grouped_bmm"
DEQUANTISE = "dequantise"  # e4m3 weights made wide by the graph itself, once a call


@dataclass(frozen=True)
class Site:
    """One product of turned heads with weights; ``quant`` where the heads pass through fp8."""

    hit: Hit
    order: Order
    rows: Rows
    weight: Weight
    quant: Quantised | None = None
    rounded: bool = False  # the dequantised heads are rounded to the activation's dtype

    @property
    def output(self) -> fx.Node:
        return self.rows.output


def tokens_of(hit: Hit, order: Order) -> tuple[int, int]:
    """(batch, sequence) of the turned heads."""
    shape = hit.node.meta["val"].shape
    batch, sequence = (1 if a is None else shape[a] for a in order[:2])
    return batch, sequence


def strategy_of(
    site: Site, dequantised: bool = False
) -> tuple[str, dict[str, float]]:
    """The fastest way that the site allows, by what was measured."""
    allowed = ["prologue"]
    half = site.hit.node.meta["val"].shape[-1] - 2 * site.hit.cos.node.meta["val"].shape[-1]
    if half % 16 == 0:
        allowed.append("tail")
    kind = "wide"
    if site.weight.scales is not None:
        kind = "e4m3"
        allowed += [DEQUANTISE] * dequantised
    elif site.output.meta["val"].dtype == site.hit.node.meta["val"].dtype:
        # Not in place: Inductor copies o twice around the kernel that turns it (1625 µs against
        # 1215 for the copy at 8192 tokens, 861 for the op alone).
        allowed.append("copy")
    if site.quant is not None:
        kind, allowed = "fp8", ["batched"] + ["groups"] * _by_groups(site)
    return choose(NAME, kind, site.rows.groups, token_count(site.hit.node, site.order), allowed)


def _by_groups(site: Site) -> bool:
    """Does torch's block-scaled product take each group?"""
    batch, length = tokens_of(site.hit, site.order)
    rows, scales = site.rows, site.weight.scales
    blocks = scales is not None and maps.sizes_of(scales.node.meta["val"])
    known = statically_known_true(batch * length % 4 == 0) and rows.token_major(batch, length)
    val = site.output.meta["val"]
    square = blocks and math.prod(blocks) * 128 * 128 == rows.groups * rows.columns * rows.size
    fits = square and rows.size % LANES == 0 and site.quant.arguments["group"] == 128  # type: ignore
    usable = not compat.packaging() and _hopper(val.device)  # no op of ours goes into a package
    return bool(known and val.dtype == torch.bfloat16 and fits and usable)


def _hopper(device: torch.device) -> bool:
    """The only GPUs on which cuBLAS scales by such blocks; without one nothing is run there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device)[0] == 9
