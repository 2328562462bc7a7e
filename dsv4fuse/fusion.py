"""What a fusion is: how its sites are found, what replaces them, and examples of it.

A fusion's file in ``patterns/`` holds a ``FUSION`` whose ``find`` walks a ``Scene`` and yields
candidates: which nodes it would replace, which tensors it needs, and a plain function that computes
the replacement from those tensors through the fused op. That one function is run on random inputs
to verify the site, and traced to rewrite the graph.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, fx

from dsv4fuse.scene import Atom, Hit, Scene


@dataclass(frozen=True)
class Candidate:
    """A place where a fusion applies.

    ``call(*inputs)`` gets one tensor per node of ``inputs`` and returns one tensor per node of
    ``outputs``, equal in shape, dtype and stride; it mutates, in place, each input in ``caches``
    whose new version is the node at the same position in ``updates``. ``places`` says of an
    index input how many places it may name and the axis along which they differ (None: all).
    ``variant`` is the example whose measurements speak for this site, at ``tokens`` tokens.
    """

    fusion: str
    root: fx.Node
    inputs: tuple[fx.Node, ...]
    call: Callable[..., tuple[Tensor, ...]]
    outputs: tuple[fx.Node, ...]
    caches: tuple[fx.Node, ...] = ()
    updates: tuple[fx.Node, ...] = ()
    places: Mapping[fx.Node, tuple[int | torch.SymInt, int | None]] = field(default_factory=dict)
    variant: str = ""
    tokens: int | torch.SymInt = 1
    unsupported: str | None = None
    loose: frozenset[str] = frozenset()
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, as far as fusions depend on them (DeepSeek-V4-Flash by default)."""

    heads: int = 64
    head_dim: int = 512
    rope_dim: int = 64
    groups: int = 8
    inter: int = 2048
    window: int = 128


@dataclass(frozen=True)
class Example:
    """A plain sequence, inputs for it, and the bytes it cannot avoid to move."""

    fn: Callable[..., object]
    inputs: tuple[Tensor, ...]
    moved: int


@dataclass(frozen=True)
class Fusion:
    """A registered fusion; ``name`` is the stem of its files in patterns/ and kernels/.

    ``examples`` are the sequences as people write them, one for each variant of the fusion:
    ``examples[variant](tokens, sizes, device)``, for the benchmark.
    """

    name: str
    find: Callable[[Scene, str], list[Candidate]]
    atoms: tuple[Atom, ...]
    examples: Mapping[str, Callable[[int, Sizes, str], Example]]


def undecided(fusion: str, hit: Hit) -> Candidate:
    """A hit whose leading axes no kernel takes."""
    return Candidate(
        fusion,
        hit.node,
        tuple(b.node for b in hit.env.holes.values()),
        lambda *_: (),
        (hit.node,),
        unsupported="Its leading axes are more than a batch, a sequence and heads.",
    )


def register_ops() -> None:
    """Register every fused op: a graph out of Inductor's cache calls them with no pass run."""
    kernels = importlib.import_module("dsv4fuse.kernels")
    for module in pkgutil.iter_modules(kernels.__path__):
        with contextlib.suppress(ImportError):  # without Triton no graph has them
            importlib.import_module(f"dsv4fuse.kernels.{module.name}")


@cache
def registry() -> Mapping[str, Fusion]:
    """Every fusion in patterns/, by name."""
    import dsv4fuse.patterns as home

    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(home.__path__)):
        if not module.startswith("_"):
            fusion = importlib.import_module(f"dsv4fuse.patterns.{module}").FUSION
            found[fusion.name] = fusion
    return found
