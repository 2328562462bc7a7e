"""The lightning indexer's scores [→ the mask of keys that a query may not see].

Scope: ``Σ_h w[t,h] · relu(q[t,h] · k[s])`` as any product of q and k (matmul, einsum, heads merged
or on an axis of their own), relu before or after a positive scale or none, weights that do not
depend on the key, and a sum over the heads (sum, matmul, einsum); in fp32, in fp32 from dots that
were rounded, or rounding every step. A mask that follows, when it hides all keys from a position
on (``arange(S) >= n[t]``) or up to one, becomes the kernel's range. Seed: ATOM #794.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from dsv4fuse import rules
from dsv4fuse.contract import Contraction, Operand, contraction, product
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.scene import Scene, readers
from dsv4fuse.terms import Term

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
        found.append(_candidate(site, numerics))
        found += [_candidate(masked, numerics) for masked in _masked(scene, site)]
    return found


# ---- the scores --------------------------------------------------------------------------------


def _site(scene: Scene, node: fx.Node) -> Site | None:
    outer = contraction(scene, node)
    if outer is None or node.meta["val"].dim() > 3:
        return None
    for rated, weights in ((outer.left, outer.right), (outer.right, outer.left)):
        read = _rated(rated.term)
        if read is None:
            continue
        dots, scale, rounding = read
        inner = product(scene, dots, outer.summed + 1, node)
        steps = outer.rounded or node.meta["val"].dtype == F32
        if inner is not None and steps and rated.term.dtype == weights.term.dtype:
            return _seated(scene, node, inner, weights, scale, rounding)
    return None


def _rated(t: Term) -> tuple[Term, float, str] | None:
    """(the dots, the scale, the rounding) of a relu of dots, scaled before, after or not at all.

    ``relu(c·x) = c·relu(x)`` bit for bit, for c > 0: rounding is symmetric and monotonic.
    """
    t, after = rules.scaled(t)
    if t.op != "maximum" or not any(rules.number(a) == 0.0 for a in t.args):
        return None
    x = next((a for a in t.args if a.op != "const"), t)
    x, before = rules.scaled(x)
    if before <= 0 or (before != 1.0 and after != 1.0):
        return None
    scale = before * after
    if x.op == "load":
        return x, scale, "once" if x.dtype == F32 else "every"
    if x.op == "cast" and x.dtype == F32 and x.args[0].op == "load":
        return x.args[0], scale, "dot"
    return None


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
        pair = _alike(qs, ks, rounding)
        ws = [s for s in ws if rounding != "every" or dtype_of(s) == node.meta["val"].dtype]
        if pair is None or not ws:
            continue
        (q, k), w = pair, ws[0]
        order = _order(q, k, w, key)
        return None if order is None else Site(node, q, k, w, order, scale, rounding)
    return None


def _alike(qs: list[Seat], ks: list[Seat], rounding: str) -> tuple[Seat, Seat] | None:
    """q and k in the narrowest dtype that both are held in."""
    pairs = [(q, k) for q in qs for k in ks if dtype_of(q) == dtype_of(k)]
    if rounding != "once":
        pairs = [p for p in pairs if dtype_of(p[0]) in (torch.bfloat16, torch.float16)]
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
    held = (site.q, site.k, site.w, *(b.seat for b in site.bounds))
    inputs = tuple(dict.fromkeys(s.node for s in held))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = [tensors[inputs.index(s.node)] for s in held]
        return (_call(site, given, numerics),)

    steps = f"dots, relu, head sum ({site.rounding})" + " → mask as a range" * bool(site.bounds)
    shape = site.root.meta["val"].shape
    return Candidate(
        "indexer_logits",
        site.root,
        inputs,
        call,
        (site.root,),
        places={b.seat.node: (shape[-1] + 1, None) for b in site.bounds},
        variant="fp32" if dtype_of(site.q) == F32 else site.rounding,
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
    for bound, n in zip(site.bounds, given[3:], strict=True):
        n = placed(n, bound.seat.axes, site.order).expand(b, t)
        ends["end" if bound.end else "start"] = n + 1 if bound.plus else n
    out = torch.ops.dsv4fuse.indexer_logits(
        q, k, w, scale=site.scale, rounding=site.rounding, precise=numerics == "precise", **ends
    )
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


EXAMPLES = {
    "once": partial(example, dtype=torch.bfloat16, rounding="once"),
    "dot": partial(example, dtype=torch.bfloat16, rounding="dot"),
    "every": partial(example, dtype=torch.bfloat16, rounding="every"),
    "fp32": partial(example, dtype=F32, rounding="once"),
}
FUSION = Fusion("indexer_logits", find, (), EXAMPLES)
