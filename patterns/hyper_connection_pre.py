"""Hyper-connections in front of a sublayer: streams → mixes → pre, post, comb → collapsed input.

Scope: streams ``[.., n, D]`` normalised over n · D (before the product with fn, or the product
after it), three scales and a base, sigmoids, any number of Sinkhorn iterations, the weighted sum of
the streams rounded to their dtype, [the RMSNorm of it where nobody else reads it]. fn and its
product are fp32. Source: DeepSeek-V4's hc_pre and hc_split_sinkhorn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from dsv4fuse import atoms, maps
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.maps import ZERO, Digit
from dsv4fuse.readers import is_tensor, readers
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.specs import RMS_NORM
from dsv4fuse.terms import Complex, Term

from . import _hyper as hyper
from . import _hyper_built as built
from ._hyper import F32, SLACK, Mixes, Shape


@dataclass(frozen=True)
class Sinkhorn:
    """A nest of normalisations: its logits, how often columns were normalised, one eps."""

    logits: Term
    iters: int
    eps: float


@dataclass(frozen=True)
class Site:
    """Mixes, what is made of them, and the nodes of it; ``norm`` alone reads y."""

    mixes: Mixes
    nest: Sinkhorn
    norm: Hit | None
    y: fx.Node
    post: fx.Node | None
    comb: fx.Node

    @property
    def outputs(self) -> tuple[fx.Node | None, ...]:
        """The nodes of y (or its norm), post and comb."""
        return (self.y if self.norm is None else self.norm.node, self.post, self.comb)

    @property
    def weight(self) -> fx.Node | None:
        bound = self.norm.env.holes.get("weight") if self.norm is not None else None
        return bound.node if bound is not None else None

    @property
    def steps(self) -> str:
        steps = f"mixes → pre, post, {self.nest.iters} Sinkhorn iterations → collapse"
        return steps + " → norm" * (self.norm is not None)

    def arguments(self) -> dict[str, object]:
        """The numbers of the op."""
        return dict(norm_eps=self.mixes.eps, eps=self.nest.eps, iters=self.nest.iters,
                    before=self.mixes.before)  # fmt: skip


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    return [_candidate(scene, s, numerics) for s in sites(scene)]


def sites(scene: Scene) -> list[Site]:
    """Every set of mixes in a graph with all that is made of them, in the graph's order."""
    return [s for node in _outermost(scene) if (s := _site(scene, *node))][::-1]


def _outermost(scene: Scene) -> Iterator[tuple[fx.Node, Sinkhorn]]:
    """The nests that no later one contains, the last first."""
    inside: set[Term] = set()
    for node in reversed(scene.nodes):
        size, term = hyper.shape(node), scene.low.term(node)
        square = len(size) > 2 and size[-1] == size[-2] and isinstance(size[-1], int)
        if not square or isinstance(term, Complex) or term in inside or not scene.first(node):
            continue
        steps, logits = _nest(term, size)
        inside.update(steps)
        nest = _sinkhorn(steps, logits, size)
        if nest is not None:
            yield node, nest


def _nest(term: Term, size: Shape) -> tuple[list[Term], Term]:
    """(the normalisations of columns and rows in turn from the outside in, what is inside)."""
    steps: list[Term] = []
    axis = len(size) - 2
    while (x := _over_sum(term, size, axis)) is not None and _eps(term) is not None:
        steps.append(term)
        term, axis = x, 2 * len(size) - 3 - axis
    return steps, term


def _over_sum(t: Term, size: Shape, axis: int) -> Term | None:
    """x of ``x / (x.sum(axis) [+ eps])``."""
    if t.op != "div" or t.dtype != F32:
        return None
    x, total = t.args
    if total.op == "add":
        total = next((a for a in total.args if a.op == "fold"), total)
    kept = tuple(ZERO if a == axis else i for a, i in enumerate(maps.identity(size)))
    return x if total.op == "fold" and total.args == ("sum", x, (axis,), size, kept) else None


def _eps(t: Term) -> float | None:
    """The constant beside a step's sum."""
    beside = t.args[1].args if t.args[1].op == "add" else ()
    return next((a.args[0] for a in beside if a.op == "const"), None)


def _sinkhorn(steps: list[Term], inner: Term, size: Shape) -> Sinkhorn | None:
    """An odd number of steps around softmax plus eps, all with one eps."""
    if len(steps) % 2 == 0 or inner.op != "add":
        return None
    soft, eps = sorted(inner.args, key=lambda t: t.op == "const")
    if eps.op != "const" or any(_eps(s) != eps.args[0] for s in steps):
        return None
    e = _over_sum(soft, size, len(size) - 1)
    if e is None or _eps(soft) is not None or e.op != "exp" or e.args[0].op != "add":
        return None
    kept = (*maps.identity(size)[:-1], ZERO)
    for logits, negated in (e.args[0].args, e.args[0].args[::-1]):
        top = negated.args[0] if negated.op == "neg" else None
        if top is not None and top.op == "fold":
            if top.args == ("amax", logits, (len(size) - 1,), size, kept):
                return Sinkhorn(logits, (len(steps) + 1) // 2, eps.args[0])
    return None


def _site(scene: Scene, comb: fx.Node, nest: Sinkhorn) -> Site | None:
    *lead_list, n, _ = hyper.shape(comb)
    lead = tuple(lead_list)
    row, lane = (Digit(len(lead) + i, 1, n, n) for i in (0, 1))
    place = maps.index(2 * n, [(n, row), (1, lane)])
    mixes = hyper.affine(scene, nest.logits, lead, place, 3, 2)
    if mixes is None or mixes.count != n or hyper.shape(mixes.base) != (n * (2 + n),):
        return None
    y = built.collapsed(scene, mixes, lead, nest.eps)
    if y is None or not all(mixes.fits(*p) for p in ((comb, 2), (y, 1))):
        return None
    post = _post(scene, mixes, lead)
    return Site(mixes, nest, _norm(scene, y), y, post, comb)


def _post(scene: Scene, mixes: Mixes, lead: Shape) -> fx.Node | None:
    """The first node that holds the second n columns as ``2 · sigmoid``."""
    low, n = scene.low, mixes.count
    for rows in mixes.leads(lead):
        lane = Digit(len(rows), 1, n, n)
        z = built.column(scene, mixes, rows, maps.index(n, [(1, lane)]), 1)
        half = low.make("sigmoid", (z,), F32)
        twice = low.make("mul", (half, low.interner.const(2)), F32)
        post = built.held_at(scene, twice, (*rows, n))
        if post is not None and mixes.fits(post, 1):
            return post
    return None


def _norm(scene: Scene, y: fx.Node) -> Hit | None:
    """The RMSNorm that alone reads y; the last node of it, with its weight and its rounding."""
    found = None
    for user in _onward(y, 10):
        hit = scene.hit(RMS_NORM, user)
        own = hit is not None and hit.x.node is y and hit.x.straight
        same = own and hyper.shape(user) == hyper.shape(y)
        if same and readers(y)[0] <= scene.region(user, [y]):
            found = hit
    return found


def _onward(node: fx.Node, depth: int) -> Iterator[fx.Node]:
    """What reads a value within so many steps, nearer ones first."""
    near = {node}
    for _ in range(depth):
        near = {u for n in near for u in n.users if is_tensor(u)}
        yield from sorted(near)


def _candidate(scene: Scene, site: Site, numerics: str) -> Candidate:
    mixes, norm, weight = site.mixes, site.norm, site.weight
    outputs = tuple(n for n in site.outputs if n is not None)
    inputs = tuple(dict.fromkeys((*mixes.inputs, *([weight] if weight else []))))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        plain = mixes.tensors([given[i] for i in mixes.inputs])
        if norm is None:
            made = torch.ops.dsv4fuse.hyper_connection_pre(*plain, **site.arguments())
        else:
            made = torch.ops.dsv4fuse.hyper_connection_pre_norm(
                *plain, given[weight] if weight else None, **site.arguments(),
                y_eps=norm.scalar("eps"), rounding=norm.arguments["rounding"],
                precise=numerics == "precise",
            )  # fmt: skip
        pairs = zip(made, site.outputs, strict=True)
        return tuple(mixes.shaped(t, given[mixes.streams], o) for t, o in pairs if o is not None)

    return Candidate(
        "hyper_connection_pre", outputs[0], inputs, call, outputs,
        variant="norm" if norm else "plain", tokens=mixes.tokens,
        loose=loosened(scene, site, outputs, inputs), detail={"parts": site.steps},
        spread=mixes.spread(), judged="exact",
    )  # fmt: skip


def loosened(
    scene: Scene, site: Site, outputs: tuple[fx.Node, ...], inputs: tuple[fx.Node, ...]
) -> frozenset[str]:
    """The rules up to rounding that reading a site took."""
    return built.loosened(scene, outputs, inputs) | (
        site.norm.env.loose if site.norm else frozenset()
    )


def example(tokens: int, sizes: Sizes, device: str, norm: bool) -> Example:
    """Streams ``[T, 4, D]`` bf16, fn fp32, 20 iterations; the norm's weight bf16."""
    d = built.hidden(sizes)

    def fn(x: Tensor, w: Tensor, scale: Tensor, base: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        mixes = atoms.hyper_mixes(x, w, eps=1e-6, before=True)
        pre, post, comb = atoms.hyper_weights(mixes, scale, base, eps=1e-6, iters=20)
        y = atoms.hyper_collapse(x, pre)
        y = atoms.rms_norm(y, weight, eps=1e-6, rounding="weight") if norm else y
        return y, post, comb

    x = torch.randn(tokens, 4, d, device=device, dtype=torch.bfloat16)
    w = torch.randn(24, 4 * d, device=device) / (4 * d) ** 0.5
    small = torch.rand(3, device=device), torch.randn(24, device=device)
    weight = torch.randn(d, device=device, dtype=torch.bfloat16)
    moved = x.nbytes + x.nbytes // 4 + w.nbytes + tokens * 80
    return Example(fn, (x, w, *small, weight), moved, SLACK)


EXAMPLES = {"plain": partial(example, norm=False), "norm": partial(example, norm=True)}
FUSION = Fusion("hyper_connection_pre", find, (), EXAMPLES)
