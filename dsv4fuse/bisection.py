"""Which fused site changes a model's result: each half of the sites alone, and its halves again.

What is compared with is the same model through the same backend with every site switched off, so
that nothing but the fusions differs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dsv4fuse import compat, pipeline
from dsv4fuse.backend import collecting, dsv4fuse
from dsv4fuse.report import Report, Site


@dataclass(frozen=True)
class Verdict:
    """The sites that change the result, and how far the result is off with all and with them.

    Distances are the largest difference over the largest magnitude of a tensor, NaN for a NaN at
    another place. More than one site means that only together they go past the tolerance.
    """

    sites: tuple[Site, ...]
    alone: float
    together: float
    tried: int


def bisect(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 0.0,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str, int], None] = lambda text, total: None,
) -> Verdict:
    """Finds the sites by which ``model(*args, **kwargs)`` differs by more than ``tolerance``.

    Each trial compiles a deep copy of the model from scratch; its inputs and state are copies.
    ``progress`` is called with what a trial found and how many trials there may be in all.
    """
    trial = _Trial(model, tuple(args), dict(kwargs or {}), dict(options or {}))
    wanted, _ = trial.run([])
    found, report = trial.run(None)
    taken = [s for s in report.sites if s.status == "taken"]
    together = distance(wanted, found)
    tried, most = 2, 2 + 2 * max(1, len(taken)).bit_length()
    progress(f"{len(taken)} sites: off by {together:.3g}", most)

    def off(sites: list[Site]) -> float:
        nonlocal tried
        tried += 1
        result, _ = trial.run([str(s.detail["site"]) for s in sites])
        apart = distance(wanted, result)
        progress(f"{len(sites)} of {len(taken)} sites: off by {apart:.3g}", most)
        return apart

    if not _beyond(together, tolerance):
        return Verdict((), together, together, tried)
    suspects, alone = taken, together
    while len(suspects) > 1:
        middle = len(suspects) // 2
        for half in (suspects[:middle], suspects[middle:]):
            apart = off(half)
            if _beyond(apart, tolerance):
                suspects, alone = half, apart
                break
        else:
            break  # neither half alone: they act together
    return Verdict(tuple(suspects), alone, together, tried)


class _Trial:
    """The model run from scratch with some of its sites."""

    def __init__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.model, self.inputs = model, (args, kwargs)
        self.options = {"select": "always", "inner": "eager"} | options

    def run(self, sites: list[str] | None) -> tuple[list[Tensor], Report]:
        model = copy.deepcopy(self.model)
        args, kwargs = copy.deepcopy(self.inputs)
        torch._dynamo.reset()
        pipeline.numbers.clear()
        report = Report()
        with _only(sites), collecting(report), compat.without_caches(), torch.no_grad():
            compiled = torch.compile(model, backend=dsv4fuse, options=self.options)
            result = compiled(*args, **kwargs)
        state = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
        left = [t for t in tree_leaves((result, args, kwargs, state)) if isinstance(t, Tensor)]
        return [t.detach().clone() for t in left], report


@contextmanager
def _only(sites: list[str] | None) -> Iterator[None]:
    """DSV4FUSE_ONLY set to these sites; None leaves all on."""
    before = os.environ.pop("DSV4FUSE_ONLY", None)
    if sites is not None:
        os.environ["DSV4FUSE_ONLY"] = ",".join(sites)
    try:
        yield
    finally:
        os.environ.pop("DSV4FUSE_ONLY", None)
        if before is not None:
            os.environ["DSV4FUSE_ONLY"] = before


def distance(wanted: list[Tensor], found: list[Tensor]) -> float:
    """The largest relative distance of two lists of tensors; NaN where NaN is elsewhere."""
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        x, y = a.double(), b.double()
        if not torch.equal(x.isnan(), y.isnan()):
            return float("nan")
        x, y = x.nan_to_num(), y.nan_to_num()
        if x.numel():
            worst = max(worst, ((x - y).abs().max() / (x.abs().max() + 1e-300)).item())
    return worst


def _beyond(apart: float, tolerance: float) -> bool:
    return not apart <= tolerance  # NaN is beyond
