"""Random inputs of one site, like its own: shapes, dtypes, strides; indices that are in range."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from dsv4fuse import compat, exact
from dsv4fuse.fusion import Candidate
from dsv4fuse.views import VIEWS

COPIES = (*exact.CASTS, torch.ops.aten.clone.default)
SMALL = 1e-3
DRAWS = 20  # of random inputs, until the result of one is determined (no choice among equals)


def draw(
    candidate: Candidate, outer: list[fx.Node], first: int = 0
) -> dict[fx.Node, Any] | None:
    """A sample of each leaf, such that some row of the outputs has only one right result.

    ``first`` is the number of the first one tried: another one gives other values.
    """
    for number in range(first, first + DRAWS):
        drawn = {candidate.like.get(n, n) for n in outer}
        shown = {n: base for n in drawn if (base := shows(n, drawn)) is not None}
        made = {n: sample(n, candidate, number) for n in drawn if n not in shown}
        made |= {n: _view(n, made) for n in shown}
        made |= {n: made[candidate.like[n]] for n in outer if n in candidate.like}
        settled = candidate.settled
        if settled is None or settled(*(made[n] for n in candidate.inputs)).any():
            return made
    return None


def shows(node: fx.Node, others: Collection[fx.Node]) -> fx.Node | None:
    """That of the other nodes which node is a view, a copy or a cast of: it holds those values."""
    while node.target in VIEWS or _copies(node):
        node = node.all_input_nodes[0]
        if node in others:
            return node
    return None


def _copies(node: fx.Node) -> bool:
    """Indices are drawn for whoever reads them, which need not be their cast."""
    value = node.meta.get("val")
    return node.target in COPIES and isinstance(value, Tensor) and value.is_floating_point()


def _view(node: fx.Node, made: dict[fx.Node, Any]) -> Any:
    if node in made:
        return made[node]
    if not isinstance(node.meta["val"], Tensor | tuple | list):
        return hint(node.meta["val"])
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _view(n, made))
    return node.target(*args, **kwargs)


def leaves(candidate: Candidate, region: list[fx.Node]) -> list[fx.Node]:
    inside = set(region)
    outer = (a for n in region for a in n.all_input_nodes if a not in inside)
    return list(dict.fromkeys((*candidate.inputs, *outer)))


def hint(value: Any) -> Any:
    """The number that a symbol had when the graph was traced."""
    return compat.hint(value) if isinstance(value, torch.SymInt) else value


def sample(node: fx.Node, candidate: Candidate, draw: int = 0) -> Any:
    """A random value like the node's: real strides; indices in range and distinct.

    Where there are more rows than places, the surplus goes to the last one, which is then not
    compared: the order of writes to one place is not defined.
    """
    fake = node.meta["val"]
    if node.op == "get_attr":
        return compat.constant(node)
    if not isinstance(fake, Tensor):
        return hint(fake)
    shape = [hint(s) for s in fake.shape]
    strides = [hint(s) for s in fake.stride()]
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    extent = 1 if 0 in shape else extent
    # Where they will be used: a CPU takes seconds for the numbers of a long prompt.
    generator = torch.Generator(fake.device).manual_seed(len(node.name) + 1000 * draw)
    drawn: dict[str, Any] = {"generator": generator, "device": fake.device}
    if fake.dtype.is_complex:
        angle = torch.rand(extent, **drawn) * 6.3
        flat = torch.polar(torch.ones_like(angle), angle).to(fake.dtype)
    elif fake.dtype.is_floating_point:
        size = candidate.spread.get(node, 2.0)
        flat = torch.randn(extent, **drawn).mul_(size)
        _diminish(flat, shape, strides)
        flat = flat.to(fake.dtype)
    elif fake.dtype == torch.bool:
        flat = torch.rand(extent, **drawn) < 0.5
    elif node in candidate.reads:
        bound = hint(candidate.reads[node])
        flat = torch.randint(bound, (extent,), **drawn).to(fake.dtype)
    else:
        values = _indices(shape, *candidate.places.get(node, (1, None)))
        if node in candidate.signed:
            values = values.where(torch.arange(values.numel()).view(shape) % 3 > 0, -1)
        return values.to(fake.dtype).to(fake.device)
    return flat.as_strided(shape, strides)


def _diminish(flat: Tensor, shape: list[int], strides: list[int]) -> None:
    """Makes the first row of several so small that an eps or a least scale decides there."""
    if len(shape) > 1 and shape[-2] > 1 and strides[-2]:
        size = [1 if s == 0 else n for n, s in zip(shape, strides, strict=True)]
        flat.as_strided(size, strides).select(-2, 0).mul_(SMALL)


def _indices(shape: list[int], places: Any, axis: int | None) -> Tensor:
    """Place numbers counted along an axis, or through the whole tensor for None."""
    count = math.prod(shape) if axis is None else shape[axis]
    numbers = torch.arange(count).clamp(max=hint(places) - 1)
    if axis is not None:
        numbers = numbers.view([-1 if i == axis else 1 for i in range(len(shape))])
        return numbers.expand(shape)
    return numbers.view(shape)
