"""References traced by the running torch, through the decompositions that graphs go through.

An upgrade of torch that changes how an operation is spelled in a graph changes the pattern in the
same way. Patterns are kept per (reference, shapes, dtypes, arguments) for the process.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch

from dsv4fuse import compat, maps, recorded
from dsv4fuse.lower import Lowering
from dsv4fuse.match import Hole, Pattern
from dsv4fuse.terms import Complex

ROWS = 7  # the extent of a pattern's row axis; it never takes part in a match
ANY = 1009  # what a reference's size that is not known to be a number is traced with
# Values that stand for a captured scalar in a traced reference: bf16 holds the first three, so that
# rules which ask whether a bound is representable answer as they do for most bounds that people
# write; it does not hold the others.
SENTINELS = {True: (0.8203125, 0.6328125, 0.578125), False: (0.82519543, 0.64355543, 0.58105543)}


@functools.lru_cache(maxsize=4096)
def pattern(
    name: str,
    reference: Callable[..., torch.Tensor],
    holes: tuple[tuple[Hole, torch.dtype], ...],
    scalars: tuple[str, ...],
    arguments: tuple[tuple[str, object], ...],
    round_scalars: bool = True,
) -> Pattern:
    """The normal form of ``reference(*holes, **scalars, **arguments)``.

    ``round_scalars``: the captured scalars are numbers that bf16 holds.

    Parameters of the reference that are neither hole, scalar nor argument are passed as None.
    """
    names = [h.name for h, _ in holes]
    captured = dict(zip(scalars, SENTINELS[round_scalars], strict=False))
    values = captured | dict(arguments)
    absent = {
        p.name: None
        for p in inspect.signature(reference).parameters.values()
        if p.default is p.empty
        and p.kind is not p.VAR_KEYWORD
        and p.name not in names
        and p.name not in values
    }

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return reference(**dict(zip(names, tensors, strict=True)), **values, **absent)

    unknown = {n for h, _ in holes for n in h.shape if not isinstance(n, int)}
    if len(unknown) > 1:
        raise TypeError(f"{name}: a reference has one size that is no number, not {unknown}")
    given = {n: compat.any_size(ANY) for n in unknown}
    shapes = [tuple(given.get(n, n) for n in h.shape) for h, _ in holes]
    graph = recorded.graph(call, [(s, dtype) for s, (_, dtype) in zip(shapes, holes, strict=True)])
    low = Lowering()
    output = next(n for n in graph.nodes if n.op == "output").args[0]
    root = low.term(output)
    if isinstance(root, Complex):
        raise TypeError(f"{name}: a reference returns a real tensor")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    return Pattern(
        name,
        root,
        low,
        {n: h for n, (h, _) in zip(inputs, holes, strict=True)},
        {v: k for k, v in captured.items()},
        len(output.meta["val"].shape) - 1,
        tuple((maps.as_size(size), n) for n, size in given.items()),
    )
