"""A mask of −inf read as a range of keys, for each row its first and its last.

``where(arange(S) >= n[t], -inf, scores)`` in any of its spellings: a comparison either way round,
masked_fill, a negated mask, two bounds joined by and (or by or, of what is hidden).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from dsv4fuse import maps, rules
from dsv4fuse.contract import Operand, Space
from dsv4fuse.lower import broadcast
from dsv4fuse.maps import Map
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex, Term, straight

from ._seats import Seat, seats

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class Bound:
    """One side of a range: the keys below ``seat + plus``, or those from there on."""

    seat: Seat
    plus: int
    end: bool


def ranges(scene: Scene, where: fx.Node, scores: fx.Node) -> list[Bound] | None:
    """The ranges of keys, the last axis of ``where``, outside which it puts −inf for scores."""
    if where.target is not aten.where.self:
        return None
    term, own = scene.low.term(where), scene.low.term(scores)
    if isinstance(term, Complex) or term.op != "where":
        return None
    if where.meta["val"].dtype != scores.meta["val"].dtype:
        return None
    _, yes, no = term.args
    hides = rules.number(yes) == -math.inf and no is own
    if not hides and not (rules.number(no) == -math.inf and yes is own):
        return None
    space = maps.sizes_of(where.meta["val"])
    bounds = _bounds(scene, where.args[0], straight(where), hides, space)  # type: ignore[arg-type]
    sides = [b.end for b in bounds or ()]
    return bounds if len(sides) == len(set(sides)) else None


# key OP n, where it shows the key: (it is the end, what to add to n)
SHOWN = {"lt": (True, 0), "le": (True, 1), "ge": (False, 0), "gt": (False, 1)}
NOT = {"lt": "ge", "le": "gt", "ge": "lt", "gt": "le"}
TURNED = {"lt": "gt", "le": "ge", "ge": "le", "gt": "lt"}
BOTH = (aten.bitwise_and.Tensor, aten.logical_and.default)
EITHER = (aten.bitwise_or.Tensor, aten.logical_or.default)


def _bounds(
    scene: Scene, test: fx.Node, m: Map, hides: bool, space: Space
) -> list[Bound] | None:
    """What a test says of the keys, read through m: that each of these shows a key."""
    m = broadcast(m, maps.sizes_of(test.meta["val"]))
    if test.target in (aten.bitwise_not.default, aten.logical_not.default):
        return _bounds(scene, test.args[0], m, not hides, space)  # type: ignore[arg-type]
    if test.target in (EITHER if hides else BOTH):
        parts = [_bounds(scene, t, m, hides, space) for t in test.args]  # type: ignore[arg-type]
        return None if None in parts else [b for p in parts for b in p]  # type: ignore[union-attr]
    term = scene.low.read(test, m)
    bound = None if isinstance(term, Complex) else _bound(scene, term, hides, space)
    return None if bound is None else [bound]


def _bound(scene: Scene, test: Term, hides: bool, space: Space) -> Bound | None:
    if test.op not in SHOWN:
        return None
    key = len(space) - 1
    for (place, n), op in ((test.args, test.op), (test.args[::-1], TURNED[test.op])):
        if not _counts(place, key) or n.dtype not in (torch.int64, torch.int32):
            continue
        if n.op == "cast" and n.args[0].dtype == torch.int32:
            n = n.args[0]  # widened to be compared
        held = seats(Operand(n, scene.places(n, space)))
        seat = next((s for s in held if key not in s.axes), None)
        if seat is not None:
            end, plus = SHOWN[NOT[op] if hides else op]
            return Bound(seat, plus, end)
    return None


def _counts(t: Term, key: int) -> bool:
    """Is this 0, 1, 2, … along the keys?"""
    if t.op == "cast":
        t = t.args[0]
    return t.op == "coord" and t.args[0].whole() == key
