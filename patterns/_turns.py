"""Rotations by a matrix: DeepSeek's Hadamard transform of rows that a rope has turned.

One is ``(x @ matrix) * factor`` over the last axis, as ``x @ m``, a linear layer or an einsum, the
factor in the matrix, behind it or nowhere. The same transform by additions (a butterfly) is no
product, and is not found. ``rotated`` shows what stands behind a rope or such a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dsv4fuse import maps, rules
from dsv4fuse.contract import Operand, product
from dsv4fuse.scene import Scene, once
from dsv4fuse.specs import INVERSE_ROPE, ROPE
from dsv4fuse.terms import Complex

from ._seats import Seat, placed, seats


@dataclass(frozen=True)
class Turn:
    """``(x @ matrix) * factor`` at ``node``; the matrix's axes are its columns and the summed."""

    node: fx.Node
    x: fx.Node
    matrix: Seat
    factor: float

    def shown(self, matrix: Tensor) -> Tensor:
        """The matrix's tensor as ``[summed, columns]``."""
        rank = self.node.meta["val"].dim()
        return placed(matrix, self.matrix.axes, (rank, rank - 1))


@once
def turns(scene: Scene) -> dict[fx.Node, Turn]:
    """Every product of a value with a square matrix over its last axis, by that value: of several
    (the product, and the product times a factor) the last."""
    return {t.x: t for t in _turns(scene)}


@once
def rotated(scene: Scene) -> Scene:
    """The graph with each rotated row as one tensor: a row is made of pieces, and what quantises it
    is looked for behind the whole of it."""
    turned = turns(scene)
    rows = [h.node for atom in (ROPE, INVERSE_ROPE) for h in scene.outermost(atom)]
    return Scene(scene.graph, [*rows, *(turned[n].node for n in rows if n in turned)])


def _turns(scene: Scene) -> Iterator[Turn]:
    for node in scene.nodes:
        term, space = scene.low.term(node), maps.sizes_of(node.meta["val"])
        rank = len(space)
        if isinstance(term, Complex) or rank < 3:
            continue
        dtype = term.dtype
        inner = term.args[0] if term.op == "cast" else term
        base, factor = rules.scaled(inner)
        c = product(scene, base, space, node)
        if c is None or (term.op == "cast" and base.dtype != torch.float32):
            continue
        for x, m in ((c.left, c.right), (c.right, c.left)):
            source, matrix = _lanes(x, rank), _square(m, rank)
            if source is None or matrix is None or source.meta["val"].dtype != dtype:
                continue
            if matrix.node.meta["val"].dtype in (dtype, torch.float32):
                yield Turn(node, source, matrix, factor)


def _lanes(operand: Operand, rank: int) -> fx.Node | None:
    """The node whose rows are the product's and whose lanes are summed."""
    wanted = (*range(rank - 1), rank)
    found = (s.node for s in seats(operand) if tuple(
        i if a is None else a for i, a in enumerate(s.axes)) == wanted)  # fmt: skip
    return next(found, None)


def _square(operand: Operand, rank: int) -> Seat | None:
    found = (s for s in seats(operand) if sorted(map(str, s.axes)) == [str(rank - 1), str(rank)])
    return next((s for s in found if len(set(s.node.meta["val"].shape)) == 1), None)
