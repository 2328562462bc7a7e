"""A place where a compressor's entries are made: what the fused op is given of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from dsv4fuse.scene import Hit
from dsv4fuse.writes import Write

from ._legs import Leg
from ._step_rows import StepRows
from ._windows import Gathered, Windows


@dataclass(frozen=True)
class Site:
    """A pooled value, what follows it, and where its rows lie."""

    pool: Hit
    leg: Leg
    windows: Windows
    spare: bool  # entries that go to the cache's last row are not wanted
    step: StepRows | None = None  # raw rows that are written in front of the pool

    def nodes(self) -> dict[str, fx.Node]:
        """The op's tensors by name."""
        leg = self.leg
        out = {"cos": leg.cos.node, "sin": leg.sin.node}
        if leg.norm and "weight" in leg.norm.env.holes:
            out["weight"] = leg.norm.weight.node
        if leg.turn:
            out["matrix"] = leg.turn.matrix.node
        for suffix, half in (("", self.windows.now), ("_before", self.windows.before)):
            if half is not None:
                out |= {f"kv{suffix}": half.kv.node, f"gate{suffix}": half.gate.node}
                out |= {f"bias{suffix}": half.bias.node} if half.bias else {}
        rows = self.windows.now.kv
        if isinstance(rows, Gathered):
            out |= {"ends": rows.ends.node}
            out |= {"page": rows.page.node} if rows.page and not self.step else {}
        if self.step:
            out = {n: t for n, t in out.items() if not n.endswith("_before")} | self.step.nodes()
        if leg.slots:
            out |= {"cache": leg.slots.write.cache} | leg.slots.nodes()
        return out

    def places(self) -> Mapping[fx.Node, tuple[int | torch.SymInt, int | None]]:
        """For each index tensor how many places it may name, for the check on random inputs."""
        out = dict(self.leg.slots.extents()) if self.leg.slots else {}
        rows = self.windows.now.kv
        if isinstance(rows, Gathered):
            pages, length = rows.node.meta["val"].shape[:2]
            out.setdefault(rows.ends.node, (rows.ring or length, None))
            if rows.page is not None and not self.step:
                out.setdefault(rows.page.node, (pages, None))
        return out | (self.step.places() if self.step else {})

    @property
    def written(self) -> list[Write]:
        """The entries' write, then those of raw rows."""
        own = [self.leg.slots.write] if self.leg.slots else []
        return own + ([self.step.kv, self.step.gate] if self.step else [])
