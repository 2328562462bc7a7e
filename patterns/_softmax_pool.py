"""The pool of a compressor as an atom: softmax over a window, weighted sum, per channel."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from dsv4fuse import atoms
from dsv4fuse.match import Hole
from dsv4fuse.scene import Atom, Spec
from dsv4fuse.specs import NARROW, lanes, walk
from dsv4fuse.terms import Term
from dsv4fuse.trace import ROWS


def _pool_specs(node: fx.Node, root: Term) -> Iterator[Spec]:
    d = lanes(node)
    total = root.args[0] if root.op == "cast" else root
    if d is None or total.op != "fold" or total.args[0] != "sum" or len(total.args[2]) != 1:
        return
    width = total.args[3][total.args[2][0]]
    body = total.args[1]
    top = next((t for t in walk(body) if t.op == "fold" and t.args[0] == "amax"), None)
    kv = [t for t in body.args if _bare(t).op != "div"] if body.op == "mul" else []
    if not isinstance(width, int) or top is None or len(kv) != 1:
        return
    out = node.meta["val"].dtype
    narrow = body.dtype in NARROW
    shape = (ROWS, width, d)
    source = kv[0].dtype if narrow else _bare(kv[0]).dtype
    holes = ((Hole("kv", shape), source), (Hole("gate", shape), top.dtype))
    yield Spec(holes, (), (("rounding", "every" if narrow else "once"), ("dtype", out)))


def _bare(t: Term) -> Term:
    return t.args[0] if t.op == "cast" else t


POOL = Atom("softmax_pool", atoms.softmax_pool, _pool_specs, frozenset({"fold", "exp", "div"}))
