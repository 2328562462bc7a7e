"""Rows that a graph packs into bytes before it writes them: fp8 codes, bf16 tail, scale bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dsv4fuse import maps
from dsv4fuse.chains import Quantised
from dsv4fuse.layout import Order
from dsv4fuse.maps import Digit, Index
from dsv4fuse.scene import Scene
from dsv4fuse.slots import Slots, seated
from dsv4fuse.specs import SCALES
from dsv4fuse.terms import straight
from dsv4fuse.views import argument
from dsv4fuse.writes import Write

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class Packing:
    """The quantiser of a packed row, and the write that takes it."""

    quant: Quantised
    slots: Slots
    width: int  # lanes of a row

    @property
    def arguments(self) -> dict[str, object]:
        """group, floor and via, as norm_rope_cache_fp8 takes them."""
        return {k: self.quant.arguments[k] for k in ("group", "floor", "via")}


    def pieces(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Codes, tail and scale bytes of packed rows, each as what it is."""
        nope = self.quant.x.node.meta["val"].shape[-1]
        codes, tail, scales = rows.tensor_split((nope, 2 * self.width - nope), dim=-1)
        return codes.view(torch.float8_e4m3fn), tail.contiguous().view(torch.bfloat16), scales


def packing(
    scene: Scene, root: fx.Node, order: Order, write: Write, quants: list[Quantised]
) -> Packing | None:
    """How root's rows become the bytes that a write puts into a cache ``[N, bytes]``."""
    places, row = write.places, write.value
    value = root.meta["val"]
    if write.cache.meta["val"].dtype != torch.uint8 or value.dtype != torch.bfloat16:
        return None
    if len(places) != 1 or places[0].index is None or write.cache.meta["val"].dim() != 2:
        return None
    lead = maps.sizes_of(value)[:-1]
    joined = row.target is aten.cat.default and argument(row, 1, "dim", 0) in (-1, len(lead))
    own = seated(order, places) if joined and maps.sizes_of(row.meta["val"])[:-1] == lead else None
    if own is None:
        return None
    quant = next((q for q in quants if _packs(scene, root, q, row.args[0])), None)
    return quant and Packing(quant, Slots(write, places, own), value.shape[-1])


def _packs(scene: Scene, root: fx.Node, quant: Quantised, pieces: list[fx.Node]) -> bool:
    """Are the pieces root's codes, the lanes behind them, their scales and zeros?"""
    if len(pieces) not in (3, 4) or quant.arguments["scale"] != "pow2" or not quant.x.straight:
        return False
    width, group = root.meta["val"].shape[-1], quant.arguments["group"]
    nope = quant.x.node.meta["val"].shape[-1]
    codes, tail = _retyped(pieces[0]), _retyped(pieces[1])
    pad = width // group - nope // group
    return (
        width % group == 0
        and codes is not None
        and tail is not None
        and _shows(scene, quant.x.node, root, 0, nope)
        and scene.reshaped(codes, quant.codes.node)
        and _shows(scene, tail, root, nope, width - nope)
        and _scale_bytes(scene, pieces[2], quant)
        and (not pad if len(pieces) == 3 else _zeros(pieces[3], pad))
    )


def _bare(node: fx.Node) -> fx.Node:
    """The node without the names and copies that stand for it."""
    while node.target in (aten.alias.default, aten.detach.default, aten.clone.default):
        node = node.args[0]
    return node


def _retyped(node: fx.Node) -> fx.Node | None:
    """What a view as bytes shows."""
    node = _bare(node)
    return node.args[0] if node.target is aten.view.dtype else None


def _shows(scene: Scene, node: fx.Node, root: fx.Node, start: int, size: int) -> bool:
    """Is node root's lanes from start on?"""
    rank, found = root.meta["val"].dim(), node.meta["val"]
    if found.dim() != rank or found.shape[-1] != size:
        return False
    lanes = Index(start, ((1, Digit(rank - 1, 1, size, size)),))
    term = scene.low.read(root, (*straight(node)[:-1], lanes))
    return term is scene.low.term(node)


def _scale_bytes(scene: Scene, node: fx.Node, quant: Quantised) -> bool:
    """The e8m0 bytes of the codes' scales."""
    narrow = _retyped(node)
    narrow = narrow and _bare(narrow)
    if narrow is None or narrow.target is not prims.convert_element_type.default:
        return False
    scales = scene.hit(SCALES, narrow.args[0])
    codes = quant.codes
    return (
        narrow.meta["val"].dtype == torch.float8_e8m0fnu
        and scales is not None
        and not scales.arguments["keepdim"]
        and scales.x == codes.x
        and scales.env.scalars == codes.env.scalars
        and all(scales.arguments[k] == codes.arguments[k] for k in ("group", "scale", "via"))
    )


def _zeros(node: fx.Node, width: int) -> bool:
    node = _bare(node)
    full = node.target in (aten.full.default, aten.zeros.default)
    value = argument(node, 1, "fill_value", 1) if node.target is aten.full.default else 0
    return full and value == 0 and width > 0 and node.meta["val"].shape[-1] == width
