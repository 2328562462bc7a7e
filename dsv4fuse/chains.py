"""What several fusions end in: a value quantised to fp8 in groups, its codes and its scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from dsv4fuse import maps
from dsv4fuse.match import Bound
from dsv4fuse.scene import Atom, Hit, Scene, once
from dsv4fuse.specs import CODES, SCALES


@dataclass(frozen=True)
class Quantised:
    """Codes and scales of one value; ``x`` is that value with its axes named by the codes'."""

    codes: Hit
    scales: tuple[Hit, ...]  # those that somebody reads
    # As each fp8 linear quantises an input that several share: nodes that hold the codes (0) or
    # one of the scales (from 1 on) once more.
    again: tuple[tuple[fx.Node, int], ...] = ()

    @property
    def x(self) -> Bound:
        return self.codes.x

    @property
    def loose(self) -> frozenset[str]:
        return self.codes.env.loose

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        own = (self.codes.node, *(s.node for s in self.scales))
        return (*own, *(twin for twin, _ in self.again))

    @property
    def distances(self) -> dict[fx.Node, float]:
        """How far each scale moves, as a part of itself, where the value's roundings turn."""
        dtype = self.x.node.meta["val"].dtype
        scales = (*(s.node for s in self.scales), *(n for n, i in self.again if i))
        return dict.fromkeys(scales, torch.finfo(dtype).eps)

    @property
    def shape(self) -> list[int | SymInt]:
        """Of the value, with the codes' own leading axes."""
        shape = [*self.codes.node.meta["val"].shape]
        return [*shape[:-2], shape[-2] * shape[-1]] if self.codes.arguments["blocked"] else shape

    def is_reshape(self, scene: Scene, node: fx.Node) -> bool:
        """Is the value a reshape of node's?"""
        shape = tuple(map(maps.as_size, self.shape))
        own = maps.identity(shape)
        rows = (maps.ZERO if axis is None else own[axis] for axis in self.x.rows)
        whole = maps.reshape(own, shape, maps.sizes_of(node.meta["val"]))
        if whole is None or not self.x.laned:
            return False
        return scene.low.read(self.x.node, (*rows, own[-1])) is scene.low.read(node, whole)

    def made_by(self, scene: Scene, atom: Atom) -> Hit | None:
        """The atom that made the value, in the codes' own leading axes or before they were one."""
        x, lead = self.x, len(self.shape) - 1
        if not x.laned or not x.straight:
            return None
        found = (scene.hit(atom, n) for n in scene.reshapes(x.node) if _lanes(n) == _lanes(x.node))
        fitting = (h for h in found if h and (h.node is x.node or lead == 1))
        return next(fitting, None)

    def lead(self, lead: Sequence[int]) -> list[int]:
        """The leading axes of the codes, of a value that has these."""
        return list(lead) if len(lead) == len(self.shape) - 1 else [math.prod(lead)]

    def shaped(self, codes: Tensor, scales: Tensor, shape: list[int]) -> tuple[Tensor, ...]:
        """A kernel's codes and scales as ``outputs`` hold them; ``shape`` is the value's own."""
        *lead, width = shape
        group = self.arguments["group"]
        blocks = [*lead, width // group]
        layout = [*blocks, group] if self.codes.arguments["blocked"] else shape
        # By the node's rank: of one block a row, a scale is also what one without a kept axis is.
        kept = ([*blocks, 1][: s.node.meta["val"].dim()] for s in self.scales)
        made = (codes.view(layout), *(scales.view(k) for k in kept))
        return (*made, *(made[i] for _, i in self.again))

    @property
    def arguments(self) -> dict[str, Any]:
        """group, floor, scale and via, as the fused ops take them."""
        a = self.codes.arguments
        floor = self.codes.env.scalars.get("floor", 0.0)
        return {"group": a["group"], "floor": floor, "scale": a["scale"], "via": a["via"]}

    @property
    def by(self) -> str:
        """How the codes come of the scale, for the ops that know both ways: "div" or "mul"."""
        return str(self.codes.arguments["by"])

    @property
    def unsupported(self) -> str | None:
        return divides_by_product(self.codes.arguments)


def _lanes(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def divides_by_product(arguments: Mapping[str, object]) -> str | None:
    """The one spelling of a quantiser that few kernels here compute."""
    if arguments["by"] == "mul" and arguments["scale"] != "pow2":
        return "The kernel divides by the scale; this multiplies by its rounded reciprocal."
    return None


@once
def quantised(scene: Scene) -> list[Quantised]:
    """Every value that a graph quantises in groups."""
    return [_quantised(scene, codes) for codes in scene.outermost(CODES)]


def _quantised(scene: Scene, codes: Hit) -> Quantised:
    twins, leaves = scene.twins(codes.node), [codes.x.node]
    region = set().union(*(scene.region(n, leaves) for n in (codes.node, *twins)))
    scales = _scales(scene, codes, region)
    again = [(twin, 0) for twin in twins]
    for i, hit in enumerate(scales, 1):
        again += [(t, i) for t in scene.twins(hit.node) if not region.issuperset(t.users)]
    return Quantised(codes, tuple(scales), tuple(again))


def _scales(scene: Scene, codes: Hit, region: set[fx.Node]) -> list[Hit]:
    alike = ("group", "scale", "via")
    found = []
    for node in scene.nodes:
        outside = [u for u in node.users if u not in region]
        hit = scene.hit(SCALES, node) if outside and scene.first(node) else None
        if hit is None or hit.env.scalars != codes.env.scalars:
            continue
        same = all(hit.arguments[k] == codes.arguments[k] for k in alike)
        if same and hit.x == codes.x:
            found.append(hit)
    return found
