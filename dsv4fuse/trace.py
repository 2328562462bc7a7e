"""References traced by the running torch, through the decompositions that graphs go through.

An upgrade of torch that changes how an operation is spelled in a graph changes the pattern in the
same way. Patterns are kept per (reference, shapes, dtypes, arguments) for the process.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch

from dsv4fuse import compat
from dsv4fuse.lower import Lowering
from dsv4fuse.match import Hole, Pattern
from dsv4fuse.terms import Complex

ROWS = 7  # the extent of a pattern's row axis; it never takes part in a match
Shape = tuple[int, ...]
# Values that stand for a captured scalar in a traced reference.
SENTINELS = (0.8251953125, 0.6435546875, 0.5810546875)


@functools.lru_cache(maxsize=4096)
def pattern(
    name: str,
    reference: Callable[..., torch.Tensor],
    holes: tuple[tuple[Hole, torch.dtype], ...],
    scalars: tuple[str, ...],
    arguments: tuple[tuple[str, object], ...],
) -> Pattern:
    """The normal form of ``reference(*holes, **scalars, **arguments)``.

    Parameters of the reference that are neither hole, scalar nor argument are passed as None.
    """
    names = [h.name for h, _ in holes]
    values = dict(zip(scalars, SENTINELS, strict=False)) | dict(arguments)
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

    graph = compat.trace(call, [(h.shape, dtype) for h, dtype in holes])
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
        {v: k for k, v in zip(scalars, SENTINELS, strict=False)},
        len(output.meta["val"].shape) - 1,
    )
