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
    index input how many places it may name and the axis along which they differ (None: all), and
    ``signed`` that its negative numbers name none; ``reads`` of one that is only read by how many
    numbers there are to draw from.
    ``pieces`` says of a cache of bytes which values lie in it, for the check on random inputs.
    ``settled(*inputs)`` says of each row of the outputs whether it has only one right result.
    ``variant`` is the example whose measurements speak for this site, at ``tokens`` tokens.
    ``judged`` says what the outputs promise, see ``verify``: to be the module's ("eager"), or to
    be as near to exact arithmetic as the module's ("exact"). ``code`` says of outputs and updates
    that are rounded to fewer bits, behind a sum whose order is another than the module's, how far
    apart they may lie, as a part of a row's largest: such a sum turns few of them, but by so much.
    """

    fusion: str
    root: fx.Node
    inputs: tuple[fx.Node, ...]
    call: Callable[..., tuple[Tensor, ...]]
    outputs: tuple[fx.Node, ...]
    caches: tuple[fx.Node, ...] = ()
    updates: tuple[fx.Node, ...] = ()
    places: Mapping[fx.Node, tuple[int | torch.SymInt, int | None]] = field(default_factory=dict)
    signed: frozenset[fx.Node] = frozenset()
    pieces: Mapping[fx.Node, Callable[[Tensor], tuple[Tensor, ...]]] = field(default_factory=dict)
    reads: Mapping[fx.Node, int | torch.SymInt] = field(default_factory=dict)
    settled: Callable[..., Tensor] | None = None
    variant: str = ""
    tokens: int | torch.SymInt = 1
    unsupported: str | None = None
    loose: frozenset[str] = frozenset()
    detail: Mapping[str, object] = field(default_factory=dict)
    judged: str = "eager"
    code: Mapping[fx.Node, float] = field(default_factory=dict)
    # The size of an input's random values in the check, where 2 would not do.
    spread: Mapping[fx.Node, float] = field(default_factory=dict)
    # Nodes that hold the same value as an input, and that input; the pass finds them.
    like: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    site: str = ""  # its name in the process, such as "norm_rope_cache#3"; the pass gives it


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, as far as fusions depend on them (DeepSeek-V4-Flash by default)."""

    heads: int = 64
    head_dim: int = 512
    rope_dim: int = 64
    groups: int = 8
    inter: int = 2048
    window: int = 128
    experts: int = 256
    top_k: int = 6


@dataclass(frozen=True)
class Example:
    """A plain sequence, inputs for it, the bytes it cannot avoid to move and its operations.

    ``slack`` is what the benchmark lets results differ by beside their rounding, relative to a
    row's largest value (long sums in two orders): 0 where the interpreted kernel has eager's bits.
    ``flops`` counts at the rate of bf16 (one in fp8 is half), for what a matrix product bounds.
    """

    fn: Callable[..., object]
    inputs: tuple[Tensor, ...]
    moved: int
    slack: float = 0.0
    flops: int = 0


@dataclass(frozen=True)
class Fusion:
    """A registered fusion; ``name`` is the stem of its files in patterns/ and kernels/.

    ``examples`` are the sequences as people write them, one for each variant of the fusion:
    ``examples[variant](tokens, sizes, device)``, for the benchmark. One without a ``kernel`` puts
    plain operations in, which are never slower. ``varied``: its time hangs on more than the variant
    and the number of tokens, so that what was measured settles only what it shows clearly.
    ``broken`` has a sentence for a graph break that is of its kind, by Dynamo's reason.
    """

    name: str
    find: Callable[[Scene, str], list[Candidate]]
    atoms: tuple[Atom, ...]
    examples: Mapping[str, Callable[[int, Sizes, str], Example]]
    kernel: bool = True
    varied: bool = False
    broken: Callable[[str], str | None] | None = None


def has_kernel(name: str) -> bool:
    """False for a fusion that only puts plain operations in."""
    fusion = registry().get(name)
    return fusion is None or fusion.kernel


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
