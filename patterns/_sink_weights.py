"""Weights of a softmax with a sink, as an atom: every way in which people write them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from dsv4fuse import maps
from dsv4fuse.maps import Size
from dsv4fuse.match import Hole
from dsv4fuse.scene import Atom, Spec
from dsv4fuse.terms import Term
from dsv4fuse.trace import ROWS

F32 = torch.float32
NARROW = (torch.bfloat16, torch.float16)


def sink_weights(
    s: Tensor, sink: Tensor, *, form: str, shifted: bool, upcast: bool, out: torch.dtype
) -> Tensor:
    """Weights of logits s ``[rows, T]`` beside a sink ``[rows, 1]`` that takes weight.

    form: "cat" a softmax with the sink as one more logit, dropped; "sum" exponentials over their
    sum and the sink's, shifted by the greatest logit, "max" by that or the sink; "lse" a softmax
    times the share that the sink leaves. shifted: the row's maximum was taken off before."""
    if form == "cat":
        c = torch.cat((s, sink.to(s.dtype) if sink.dtype == s.dtype else sink), dim=-1)
        if shifted:
            c = c - c.amax(-1, keepdim=True)
        return torch.softmax(c, -1, dtype=F32 if upcast else None)[..., :-1].to(out)
    if form == "lse":
        rest = torch.sigmoid(torch.logsumexp(s, -1, keepdim=True) - sink)
        return (torch.softmax(s, -1) * rest).to(out)
    top = s.amax(-1, keepdim=True)
    top = torch.maximum(top, sink) if form == "max" else top
    e = torch.exp(s - top)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(sink - top))).to(out)


def _specs(node: fx.Node, root: Term) -> Iterator[Spec]:
    if node.meta["val"].dim() < 2:
        return
    width, out = maps.sizes_of(node.meta["val"])[-1], node.meta["val"].dtype
    forms = _forms(root, width)
    if not forms or out not in (F32, *NARROW):
        return
    for s in dict.fromkeys((out, F32, *(NARROW if out == F32 else ()))):
        for sink in dict.fromkeys((s, F32, *NARROW)):
            holes = ((Hole("s", (ROWS, width)), s), (Hole("sink", (ROWS, 1)), sink))
            for form in forms:
                for shifted in (False, True) if form == "cat" else (False,):
                    for upcast in (False, True) if form == "cat" and s != F32 else (False,):
                        yield Spec(holes, (), (("form", form), ("shifted", shifted),
                                               ("upcast", upcast), ("out", out)))  # fmt: skip


def _forms(root: Term, width: Size) -> tuple[str, ...]:
    """Which forms the top of a term over so many keys leaves possible; most terms are none."""
    while root.op == "cast":
        (root,) = root.args
    if root.op == "mul":
        below = next((t.args[1] for t in root.args if t.op == "div"), None)
        return ("lse",) if below is not None and _sums(below, width) else ()
    if root.op != "div" or root.args[0].op != "exp":
        return ()
    below = root.args[1]
    if below.op == "add" and any(_sums(t, width) for t in below.args):
        return ("sum", "max")
    return ("cat",) if _sums(below, width + 1) else ()


def _sums(t: Term, width: Size) -> bool:
    """A sum over that many lanes."""
    return t.op == "fold" and t.args[0] == "sum" and bool(t.args[3][-1] == width)


WEIGHTS = Atom("sink_weights", sink_weights, _specs, frozenset({"exp", "fold"}))
