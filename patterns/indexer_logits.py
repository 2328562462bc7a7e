"""The lightning indexer's scores [→ the mask of keys that a query may not see].

Scope: ``Σ_h w[t,h] · relu(q[t,h] · k[s])`` as any product of q and k (matmul, einsum, heads merged
or on an axis of their own), relu before or after a positive scale or none, weights that do not
depend on the key, and a sum over the heads (sum, matmul, einsum); in fp32, in fp32 from dots that
were rounded, or rounding every step. A scale of each key (of fp8 ones) may multiply the dots in
front of relu, or the sum. A mask that follows, when it hides all keys from a position on
(``arange(S) >= n[t]``) or up to one, becomes the kernel's range. Seed: ATOM #794.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from dsv4fuse import maps, rules
from dsv4fuse.atoms import FP8
from dsv4fuse.contract import Contraction, Operand, contraction, product
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.readers import is_tensor, readers
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex, Term

from ._ranges import Bound, ranges
from ._seats import Seat, dtype_of, placed, seats, unplaced

F32 = torch.float32
LOOSE = frozenset({"order of the sums"})


@dataclass(frozen=True)
class Site:
    """The scores ``[.., S]`` at ``root`` and how the module computes them."""

    root: fx.Node
    q: Seat
    k: Seat
    w: Seat
    order: tuple[int | None, int | None]  # the root's axes of batch and token
    scale: float
    rounding: str
    bounds: tuple[Bound, ...] = ()
    keys: Seat | None = None  # a scale for each key, of the dots or of the sum
    of_dots: bool = False

    @property
    def rank(self) -> int:
        return self.root.meta["val"].dim()


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph, with the mask behind it and without."""
    found = list[Candidate]()
    roots: set[fx.Node] = set()
    for node in scene.nodes:
        site = _site(scene, node) if node.meta["val"].is_floating_point() else None
        if site is None or roots & {other for other, _ in scene.holders(node)}:
            continue  # a view of scores that are a site already
        roots.add(node)
        for whole in (site, *_scaled(scene, site)):
            found.append(_candidate(whole, numerics))
            found += [_candidate(masked, numerics) for masked in _masked(scene, whole)]
    return found


# ---- the scores --------------------------------------------------------------------------------


def _site(scene: Scene, node: fx.Node) -> Site | None:
    outer = contraction(scene, node)
    if outer is None or node.meta["val"].dim() > 3:
        return None
    for rated, weights in ((outer.left, outer.right), (outer.right, outer.left)):
        steps = outer.rounded or node.meta["val"].dtype == F32
        for dots, scale, rounding, keys in _rated(rated.term):
            inner = product(scene, dots, outer.space, node)
            if inner is not None and steps and rated.term.dtype == weights.term.dtype:
                site = _seated(scene, node, inner, weights, scale, rounding)
                return site if keys is None else site and _of_keys(scene, site, keys, True)
    return None


def _rated(t: Term) -> Iterator[tuple[Term, float, str, Term | None]]:
    """(the dots, the scale, the rounding, what else multiplies the dots) of a relu of dots, scaled
    before, after or not at all.

    ``relu(c·x) = c·relu(x)`` bit for bit, for c > 0: rounding is symmetric and monotonic.
    """
    t, after = rules.scaled(t)
    if t.op != "maximum" or not any(rules.number(a) == 0.0 for a in t.args):
        return
    x = next((a for a in t.args if a.op != "const"), t)
    x, before = rules.scaled(x)
    if before <= 0 or (before != 1.0 and after != 1.0):
        return
    both = (x.args, x.args[::-1]) if x.op == "mul" and x.dtype == F32 else ()
    for dots, keys in ((x, None), *both):
        if dots.op == "load":
            yield dots, before * after, "once" if dots.dtype == F32 else "every", keys
        if dots.op == "cast" and dots.dtype == F32 and dots.args[0].op == "load":
            yield dots.args[0], before * after, "dot", keys


def _seated(
    scene: Scene, node: fx.Node, inner: Contraction, weights: Operand, scale: float, rounding: str
) -> Site | None:
    """The operands by their axes: which of the root's are batch, token and key."""
    heads, rank = node.meta["val"].dim(), node.meta["val"].dim()
    key, lanes = rank - 1, rank + 1
    for left, right in ((inner.left, inner.right), (inner.right, inner.left)):
        qs = [s for s in seats(left) if {heads, lanes} <= set(s.axes) and key not in s.axes]
        ks = [s for s in seats(right) if {key, lanes} <= set(s.axes) and heads not in s.axes]
        ws = [s for s in seats(weights) if heads in s.axes and not {key, lanes} & set(s.axes)]
        pair = _alike(qs, ks, rounding, inner.product.meta["val"].dtype)
        ws = [s for s in ws if rounding != "every" or dtype_of(s) == node.meta["val"].dtype]
        if pair is None or not ws:
            continue
        (q, k), w = pair, ws[0]
        order = _order(q, k, w, key)
        return None if order is None else Site(node, q, k, w, order, scale, rounding)
    return None


def _alike(
    qs: list[Seat], ks: list[Seat], rounding: str, dots: torch.dtype
) -> tuple[Seat, Seat] | None:
    """q and k in the narrowest dtype that both are held in, and that rounds as the dots do."""
    pairs = [(q, k) for q in qs for k in ks if dtype_of(q) == dtype_of(k)]
    if rounding != "once":
        codes = (FP8,) * (rounding == "dot" and dots == torch.bfloat16)
        pairs = [p for p in pairs if dtype_of(p[0]) in (dots, *codes)]
    return min(pairs, key=lambda p: dtype_of(p[0]).itemsize, default=None)


def _order(q: Seat, k: Seat, w: Seat, key: int) -> tuple[int | None, int | None] | None:
    """The root's axes of (batch, token); keys that all queries share have no batch."""
    queries = [a for a in range(key) if a in q.axes or a in w.axes]
    batch = [a for a in range(key) if a in k.axes]
    tokens = [a for a in queries if a not in batch]
    if len(batch) > 1 or len(tokens) + len(batch) > 2:
        return None
    if not batch and len(tokens) == 2:
        batch = [tokens.pop(0)]
    return (batch or [None])[0], (tokens or [None])[0]


def _of_keys(scene: Scene, site: Site, keys: Term, of_dots: bool) -> Site | None:
    """The site with a scale that depends on the key alone, or on the batch as k does."""
    held = seats(Operand(keys, scene.places(keys, maps.sizes_of(site.root.meta["val"]))))
    key, fitting = site.rank - 1, {site.rank - 1, site.order[0], None}
    seat = next((s for s in held if key in s.axes and fitting.issuperset(s.axes)), None)
    return seat and replace(site, keys=seat, of_dots=of_dots)


def _scaled(scene: Scene, site: Site) -> Iterator[Site]:
    """The same with each key's sums times its scale."""
    total = scene.low.term(site.root)
    free = site.keys is None and site.rounding != "every"
    for user in filter(is_tensor, readers(site.root)[0] if free else ()):
        t = scene.low.term(user)
        if isinstance(t, Complex) or t.op != "mul" or total not in t.args:
            continue
        keys = t.args[t.args[0] is total]
        behind = _of_keys(scene, replace(site, root=user), keys, False)
        same = maps.sizes_of(user.meta["val"]) == maps.sizes_of(site.root.meta["val"])
        if behind is not None and same:
            yield behind


def _masked(scene: Scene, site: Site) -> Iterator[Site]:
    """The same with −inf for all keys from a position on, up to one, or both."""
    users = readers(site.root)[0]
    where = next(iter(users), None)
    if len(users) != 1 or where is None:
        return
    bounds = ranges(scene, where, site.root)
    if bounds:
        yield replace(site, root=where, bounds=tuple(bounds))


# ---- what replaces them ------------------------------------------------------------------------


def _candidate(site: Site, numerics: str) -> Candidate:
    scales = () if site.keys is None else (site.keys,)
    held = (site.q, site.k, site.w, *(b.seat for b in site.bounds), *scales)
    inputs = tuple(dict.fromkeys(s.node for s in held))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = [tensors[inputs.index(s.node)] for s in held]
        return (_call(site, given, numerics),)

    order = ["dots", *["scales of keys"] * site.of_dots, "relu", f"head sum ({site.rounding})"]
    steps = ", ".join(order) + " → scales of keys" * (site.keys is not None and not site.of_dots)
    steps += " → mask as a range" * bool(site.bounds)
    shape = site.root.meta["val"].shape
    return Candidate(
        "indexer_logits",
        site.root,
        inputs,
        call,
        (site.root,),
        places={b.seat.node: (shape[-1] + 1, None) for b in site.bounds},
        variant={F32: "fp32", FP8: "fp8"}.get(dtype_of(site.q), site.rounding),
        tokens=math.prod(shape[:-1]),
        loose=LOOSE,
        judged="exact",
        detail={"parts": steps},
    )


def _call(site: Site, given: list[Tensor], numerics: str) -> Tensor:
    (batch, token), rank = site.order, site.rank
    q, k, w = (
        placed(t, seat.axes, order)
        for t, seat, order in (
            (given[0], site.q, (batch, token, rank, rank + 1)),
            (given[1], site.k, (batch, rank - 1, rank + 1)),
            (given[2], site.w, (batch, token, rank)),
        )
    )
    b, t = q.shape[0], q.shape[1]
    b = w.shape[0] if isinstance(b, int) and b == 1 else b
    w, q, k = w.expand(b, t, -1), q.expand(b, -1, -1, -1), k.expand(b, -1, -1)
    ends: dict[str, Tensor] = {}
    scales = given[3 + len(site.bounds) :]
    for bound, n in zip(site.bounds, given[3 : 3 + len(site.bounds)], strict=True):
        n = placed(n, bound.seat.axes, site.order).expand(b, t)
        ends["end" if bound.end else "start"] = n + 1 if bound.plus else n
    if site.keys is not None:
        ends["k_scale"] = placed(scales[0], site.keys.axes, (batch, rank - 1)).expand(b, -1)
    out = torch.ops.dsv4fuse.indexer_logits(
        q, k, w, scale=site.scale, scale_dots=site.of_dots, rounding=site.rounding,
        precise=numerics == "precise", **ends,
    )  # fmt: skip
    return unplaced(out, site.order, rank - 1)


def example(tokens: int, sizes: Sizes, device: str, dtype: torch.dtype, rounding: str) -> Example:
    """q ``[T, 64, 128]`` against 4096 keys; integers, whose sums are exact in any order."""
    heads = min(sizes.heads, 64)
    keys, dim = 64 * heads, 128

    def fn(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        if rounding == "once":
            q, k = q.float(), k.float()
        dots = torch.einsum("thd,sd->ths", q, k)
        dots = dots.float() if rounding == "dot" else dots
        return (dots.relu() * w.unsqueeze(-1)).sum(dim=1)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randint(-3, 4, shape, device=device).to(dtype)

    out = dtype if rounding == "every" else F32
    q, k, w = make(tokens, heads, dim), make(keys, dim), make(tokens, heads, dtype=out)
    return Example(fn, (q, k, w), q.nbytes + k.nbytes + w.nbytes + tokens * keys * out.itemsize)


def causal(tokens: int, sizes: Sizes, device: str) -> Example:
    """e4m3 codes, a scale for each key; as many keys as tokens (64 at least), which are the last
    of them: each sees those up to its own."""
    heads, dim, keys = min(sizes.heads, 64), 128, max(tokens, 64)

    def fn(q: Tensor, k: Tensor, scale: Tensor, w: Tensor) -> Tensor:
        dots = torch.einsum("thd,sd->ths", q.float(), k.float())
        logits = (dots.relu() * w.unsqueeze(-1)).sum(dim=1) * scale
        place = torch.arange(keys, device=q.device)
        ends = place[keys - tokens :] + 1
        return logits.masked_fill(place >= ends.unsqueeze(-1), -math.inf)

    q, k = (torch.randint(-3, 4, s, device=device).float().to(FP8)
            for s in ((tokens, heads, dim), (keys, dim)))  # fmt: skip
    scale = 2.0 ** torch.randint(-2, 3, (keys,), device=device)
    w = torch.randint(-3, 4, (tokens, heads), device=device).float()
    moved = q.nbytes + k.nbytes + scale.nbytes + w.nbytes + 4 * tokens * keys
    # Of the pairs that are seen, fp8 products at twice the rate of bf16.
    flops = (tokens * keys - tokens * (tokens - 1) // 2) * heads * dim
    return Example(fn, (q, k, scale, w), moved, flops=flops)


EXAMPLES = {
    "once": partial(example, dtype=torch.bfloat16, rounding="once"),
    "dot": partial(example, dtype=torch.bfloat16, rounding="dot"),
    "every": partial(example, dtype=torch.bfloat16, rounding="every"),
    "fp32": partial(example, dtype=F32, rounding="once"),
    "fp8": causal,
}
FUSION = Fusion("indexer_logits", find, (), EXAMPLES, varied=True)
