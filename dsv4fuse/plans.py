"""A site's fused op as a small graph over the site's inputs.

It is traced. A model has each of its sites in every layer, so what was traced once is copied for
the sites whose calls do the same, operation by operation: a trace takes tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsv4fuse import calls, compat
from dsv4fuse.fusion import Candidate, has_kernel
from dsv4fuse.terms import short
from dsv4fuse.views import base_of

if TYPE_CHECKING:
    from dsv4fuse.ahead import Jobs


class Declined(Exception):
    """A candidate that cannot be taken; the message is the sentence for the report."""


class Plans:
    """The plans of one graph's sites. ``shared``: what a call does, operation by operation, is all
    that its launches depend on."""

    def __init__(self, shared: bool = True) -> None:
        self._shared = shared
        self._known: dict[object, fx.Graph] = {}
        self._steps: dict[str, object] = {}
        self._ahead: dict[str, fx.Graph] = {}
        self._jobs: Jobs | None = None

    def ahead(self, candidates: Sequence[Candidate], device: torch.device) -> None:
        """The plans are made now, and found when their turns come. Meanwhile the kernels that they
        launch on that GPU are compiled."""
        with contextlib.suppress(ImportError):  # of Triton: for that every site is declined
            from dsv4fuse.ahead import Jobs

            self._jobs = Jobs(self._different(candidates), device)
        for candidate in candidates:
            with contextlib.suppress(Declined):  # once more, and said, when its turn comes
                self._ahead[candidate.site] = self._new(candidate)

    def wait(self, candidate: Candidate) -> None:
        """Until the kernels are compiled that it launches, if they are on their way."""
        if self._jobs is not None:
            self._jobs.wait(self._steps.get(candidate.site))

    def of(self, candidate: Candidate) -> fx.Graph:
        """The fused op as a small graph over the candidate's inputs; raises Declined.

        Its outputs are the candidate's outputs, then the new version of each of its caches.
        """
        return self._ahead.pop(candidate.site, None) or self._new(candidate)

    def _new(self, candidate: Candidate) -> fx.Graph:
        _loaded(candidate)
        with _checking():
            traced = self._traced(candidate)
        large = compat.large_number(traced)
        if large is not None:
            version = torch.__version__
            raise Declined(f"torch {version} cannot compile its launch, which takes {large}.")
        results = next(n for n in traced.nodes if n.op == "output").args[0]
        for old, new in zip((*candidate.outputs, *candidate.updates), results, strict=True):
            _same(old, new)
        return traced

    def _traced(self, candidate: Candidate) -> fx.Graph:
        fused, fakes, like = _call(candidate)
        on_gpu = any(isinstance(f, Tensor) and f.is_cuda for f in fakes)
        # On a CPU an op is its reference, and in a package no op but that.
        kept = not on_gpu and not compat.packaging()
        if not self._shared:
            return calls.graph(fused, fakes, like, keep_ops=kept)
        key = self._done(candidate)
        if key in self._known:
            return calls.again(self._known[key], fakes, like)
        self._known[key] = calls.graph(fused, fakes, like, keep_ops=kept)
        return self._known[key]

    def _different(self, candidates: Iterable[Candidate]) -> Iterator[tuple[object, Candidate]]:
        """One of all whose calls launch the same, and what they do."""
        met = set[object]()
        for candidate in filter(lambda c: has_kernel(c.fusion), candidates):
            with contextlib.suppress(Declined):
                if (steps := self._done(candidate)) not in met:
                    met.add(steps)
                    yield steps, candidate

    def _done(self, candidate: Candidate) -> object:
        """Equal for candidates whose calls do the same; raises Declined."""
        if candidate.site not in self._steps:
            _loaded(candidate)
            with _checking():
                self._steps[candidate.site] = calls.steps(*_call(candidate))
        return self._steps[candidate.site]


def _call(candidate: Candidate) -> tuple[calls.Call, list[Any], list[Any]]:
    """A function of the inputs, for outputs and caches; the fakes of inputs and of outputs."""
    caches = [candidate.inputs.index(c) for c in candidate.caches]

    def fused(*tensors: Any) -> tuple[Any, ...]:
        return (*candidate.call(*tensors), *(tensors[i] for i in caches))

    fakes, like = ([n.meta["val"] for n in ns] for ns in (candidate.inputs, candidate.outputs))
    return fused, fakes, like


@contextlib.contextmanager
def _checking() -> Iterator[None]:
    """Declines what a kernel's own checks raise."""
    try:
        yield
    except ValueError as error:
        raise Declined(str(error).strip()) from error


def _loaded(candidate: Candidate) -> None:
    """Declines what is not supported, and what cannot be loaded."""
    if candidate.unsupported:
        raise Declined(candidate.unsupported)
    for node in candidate.inputs:
        if node not in candidate.caches and base_of(node) in candidate.caches:
            raise Declined(f"{node.name} is a part of the cache that the fused op would write.")
    try:
        if has_kernel(candidate.fusion):
            importlib.import_module(f"dsv4fuse.kernels.{candidate.fusion}")
    except ImportError as error:
        raise Declined(f"The kernel cannot be loaded on this machine: {error}.") from error


def _same(old: fx.Node, new: fx.Node) -> None:
    """Declines unless the new value stands for the old one in every respect."""
    a, b = old.meta["val"], new.meta["val"]
    if a.dtype != b.dtype:
        raise Declined(f"The module keeps {short(a.dtype)} here, the kernel {short(b.dtype)}.")
    for what, x, y in (("shape", a.shape, b.shape), ("strides", a.stride(), b.stride())):
        if len(x) != len(y) or not all(
            statically_known_true(m == n) or (what == "strides" and a.shape[i] == 1)
            for i, (m, n) in enumerate(zip(x, y, strict=True))
        ):
            raise Declined(
                f"The module's result has {what} {list(x)}, the kernel's would have {list(y)}."
            )
