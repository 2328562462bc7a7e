"""Keys that a gather or an indexing has chosen for each query, behind keys that all of them see."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from dsv4fuse import maps, rules
from dsv4fuse.contract import Axes
from dsv4fuse.maps import Size
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Complex, Term

from ._attention import Named, Site

aten = torch.ops.aten
ROW = -1  # the name of the far keys' own axis in the axes of ``Chosen.far``
PAGE = -2


@dataclass(frozen=True)
class Chosen:
    """``cat(near, far[page, index])`` along the keys; axes named by the site's output."""

    near: Named | None
    far: Named
    index: Named
    page: Named | None
    wrap: bool  # negative indices count from the end


def chosen(scene: Scene, site: Site) -> Chosen | None:
    """How the keys of a site were chosen, if they were."""
    for named in site.kv:
        found = _chosen(scene, site, named)
        if found is not None:
            return found
    return None


def _chosen(scene: Scene, site: Site, named: Named) -> Chosen | None:
    node, axes = named.node, named.axes
    if node.target is aten.cat.default and len(node.args[0]) == 2:
        along = (node.args[1] if len(node.args) > 1 else 0) % len(axes)
        if axes[along] != site.keys:
            return None
        near, far = node.args[0]
        beside = _shared(scene, near, axes, site)
        found = _gathered(scene, far, axes, site) if beside else None
        return found and Chosen(beside, found.far, found.index, found.page, found.wrap)
    return _gathered(scene, node, axes, site)


def self_hiding(scene: Scene, site: Site, keys: Chosen) -> Chosen | None:
    """The same keys by the index of which the mask hides what is negative, and nothing else."""
    if keys.near is not None or site.logits.mask is None:
        return None
    kind, _, fill = site.logits.mask
    term = _integer(scene.low.term(keys.index.node))
    above = [t for t in term.args if rules.number(t) != 0] if term.op == "maximum" else []
    term = _integer(above[0]) if len(above) == 1 else term
    shown = _holding(scene, term, keys.index)
    for mask in site.mask:
        x = _negative(scene.low.term(mask.node), kind, fill)
        for named in _holding(scene, _integer(x), mask) if x is not None else ():
            if named in shown and named.node.meta["val"].dtype in rules.INTEGERS:
                return replace(keys, index=named, wrap=False)
    return None


def _negative(t: Term, kind: str, fill: float) -> Term | None:
    """x, where a mask hides a key, by -inf, just where x < 0."""
    hides = kind != "allowed"
    if kind == "add":
        if t.op != "where" or {rules.number(v) for v in t.args[1:]} != {0, -math.inf}:
            return None
        hides, fill = rules.number(t.args[2]) == 0, -math.inf
        t = t.args[0]
    while t.op in ("logical_not", "bitwise_not"):
        hides, t = not hides, t.args[0]
    below = t.op == ("lt" if hides else "ge") and rules.number(t.args[1]) == 0
    return t.args[0] if below and fill == -math.inf else None


def _integer(t: Term) -> Term:
    """An index before it was widened."""
    widened = t.op == "cast" and (t.args[0].dtype, t.dtype) == rules.INTEGERS
    return t.args[0] if widened else t


def _holding(scene: Scene, term: Term, named: Named) -> list[Named]:
    """The nodes that hold a term in the coordinates of a named node, named as it is."""
    space = maps.sizes_of(named.node.meta["val"])
    return [Named(n, _renamed(a, named.axes)) for n, a in _holders(scene, term, space)]


def _whole(scene: Scene, node: fx.Node) -> list[tuple[fx.Node, Axes]]:
    """Nodes that hold the same, each axis of them one of this node's (None: of size one)."""
    term = scene.low.term(node)
    if isinstance(term, Complex):
        return []
    return _holders(scene, term, maps.sizes_of(node.meta["val"]))


def _holders(scene: Scene, term: Term, space: tuple[Size, ...]) -> list[tuple[fx.Node, Axes]]:
    """Nodes that hold a term of such a space, each axis one of the space's."""
    found = []
    for other, m in scene.places(term, space):
        axes = tuple(i.whole() for i in m)
        plain = all(a is not None or i == maps.ZERO for a, i in zip(axes, m, strict=True))
        if plain and maps.whole_axes(m, maps.sizes_of(other.meta["val"])):
            found.append((other, axes))
    return found


def _renamed(axes: Axes, names: Axes) -> Axes:
    return tuple(None if a is None else names[a] for a in axes)


def _first(scene: Scene, node: fx.Node, names: Axes, allowed: set[int]) -> Named | None:
    """The node nearest to the inputs that holds this one with no axis but the allowed."""
    for other, axes in _whole(scene, node):
        named = _renamed(axes, names)
        if {a for a in named if a is not None} <= allowed:
            return Named(other, named)
    return None


def _shared(scene: Scene, near: fx.Node, axes: Axes, site: Site) -> Named | None:
    """Near keys, alike for all queries of a batch row: no more axes than that."""
    options = [_renamed(a, axes) for _, a in _whole(scene, near)]
    nodes = [n for n, _ in _whole(scene, near)]
    best = min(range(len(nodes)), key=lambda i: sum(a is not None for a in options[i]), default=-1)
    if best < 0 or sum(a is not None for a in options[best]) > 3:
        return None
    return Named(nodes[best], options[best])


def _gathered(scene: Scene, node: fx.Node, axes: Axes, site: Site) -> Chosen | None:
    if node.target is aten.gather.default:
        return _by_gather(scene, node, axes, site)
    if node.target is aten.index.Tensor:
        return _by_index(scene, node, axes, site)
    whole = [(n, _renamed(a, axes)) for n, a in _whole(scene, node) if n is not node]
    inner = [(n, a) for n, a in whole if n.target in (aten.gather.default, aten.index.Tensor)]
    return _gathered(scene, inner[0][0], inner[0][1], site) if inner else None


def _by_gather(scene: Scene, node: fx.Node, axes: Axes, site: Site) -> Chosen | None:
    """gather(far, dim, index): index expanded along D, far along the sequence."""
    base, dim, index = node.args[:3]
    dim %= len(axes)
    sizes = [maps.sizes_of(n.meta["val"]) for n in (base, index)]
    alike = all(a == b for i, (a, b) in enumerate(zip(*sizes, strict=True)) if i != dim)
    if axes[dim] != site.keys or not alike:
        return None
    tokens = {a for a in axes if a is not None} - {site.lane, site.keys}
    at = _first(scene, index, axes, tokens | {site.keys})
    own = tuple(ROW if i == dim else a for i, a in enumerate(axes))
    options = [Named(n, _renamed(a, own)) for n, a in _whole(scene, base)]
    options = [o for o in options if ROW in o.axes and site.lane in o.axes]
    far = min(options, key=lambda o: sum(a is not None for a in o.axes), default=None)
    if at is None or far is None or len([a for a in far.axes if a is not None]) > 3:
        return None
    return Chosen(None, far, at, None, wrap=False)


def _by_index(scene: Scene, node: fx.Node, axes: Axes, site: Site) -> Chosen | None:
    """far[index] or far[page, index]: the indexed axes are the first, D is the last."""
    base, indices = node.args
    rank = base.meta["val"].dim()
    if None in indices or len(indices) != rank - 1 or rank not in (2, 3):
        return None
    if axes[-1] != site.lane:
        return None
    lead = axes[:-1]
    named = [_index(scene, i, lead, site) for i in indices]
    if None in named or base.meta["val"].dtype == torch.bool:
        return None
    page = named[0] if rank == 3 else None
    if page is not None and site.keys in page.axes:
        return None
    own: Axes = (PAGE, ROW, site.lane) if rank == 3 else (ROW, site.lane)
    return Chosen(None, Named(base, own), named[-1], page, wrap=True)


def _index(scene: Scene, index: fx.Node, lead: Axes, site: Site) -> Named | None:
    """An index tensor, aligned at the last of the indexed axes."""
    value = index.meta["val"]
    if value.dtype not in rules.INTEGERS or value.dim() > len(lead):
        return None
    tail = lead[len(lead) - value.dim() :]
    held = tuple(None if n == 1 else a for n, a in zip(value.shape, tail, strict=True))
    return Named(index, held)
