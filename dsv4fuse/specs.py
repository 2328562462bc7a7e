"""The ways in which the shared atoms may appear: shapes from the node, dtypes and roundings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from dsv4fuse import atoms
from dsv4fuse.match import Hole
from dsv4fuse.scene import Atom, Spec
from dsv4fuse.terms import Term
from dsv4fuse.trace import ROWS

F32 = torch.float32
NARROW = (torch.bfloat16, torch.float16)


def lanes(node: fx.Node) -> int | None:
    """The extent of a node's last axis, when it is a fixed number."""
    shape = node.meta["val"].shape
    return int(shape[-1]) if len(shape) and isinstance(shape[-1], int) else None


def _rms_norm(node: fx.Node, root: Term) -> Iterator[Spec]:
    d = lanes(node)
    if d is None or root.op not in ("mul", "cast"):
        return
    out = node.meta["val"].dtype
    sources = (out, *NARROW) if out == F32 else (out,)
    for x in sources:
        for weight in (None, *dict.fromkeys((x, F32))):
            for rounding in ("once", "weight", "rstd", "every"):
                if rounding == "weight" and weight is None:
                    continue
                holes = [(Hole("x", (ROWS, d)), x)]
                if weight is not None:
                    wide = weight == F32
                    holes.append((Hole("weight", (d,), wide), weight))
                yield Spec(tuple(holes), ("eps",), (("rounding", rounding),))


def _rope(inverse: bool):  # noqa: ANN202
    def specs(node: fx.Node, root: Term) -> Iterator[Spec]:
        d = lanes(node)
        turned = root.args[-1] if root.op == "cat" else root
        last = node.meta["val"].dim() - 1
        if d is None or turned.op != "lace" or len(turned.args) != 4 or turned.args[0] != last:
            return
        half = turned.args[1]
        if 2 * half != (root.args[1][-1] if root.op == "cat" else d):
            return
        x = node.meta["val"].dtype
        for rounding, table in (("once", F32), ("every", x)):
            wide = rounding == "once"
            tables = tuple((Hole(n, (ROWS, half), wide), table) for n in ("cos", "sin"))
            arguments = (("inverse", inverse), ("rounding", rounding))
            yield Spec(((Hole("x", (ROWS, d)), x), *tables), (), arguments)

    return specs


def _swiglu(node: fx.Node, root: Term) -> Iterator[Spec]:
    width = lanes(node)
    if width is None or root.op not in ("mul", "cast"):
        return
    out = node.meta["val"].dtype
    for x in dict.fromkeys((out, *NARROW)) if out == F32 else (out,):
        for weight in (None, *dict.fromkeys((F32, x))):
            for rounding in ("once", "silu"):
                holes = [(Hole("gate", (ROWS, width)), x), (Hole("up", (ROWS, width)), x)]
                if weight is not None:
                    holes.append((Hole("weight", (ROWS, 1), weight == F32), weight))
                for scalars, fixed in ((("limit",), ()), ((), (("limit", None),))):
                    yield Spec(tuple(holes), scalars, (*fixed, ("rounding", rounding)))


def group_of(term: Term, depth: int = 14) -> int | None:
    """The extent of the block maximum that a quantisation divides by."""
    if term.op == "fold" and term.args[0] == "amax":
        axes, shape = term.args[2], term.args[3]
        return shape[-1] if axes == (len(shape) - 1,) and isinstance(shape[-1], int) else None
    if depth == 0:
        return None
    inner = (group_of(a, depth - 1) for a in term.args if isinstance(a, Term))
    return next((g for g in inner if g is not None), None)


Arguments = tuple[tuple[str, object], ...]


def quant_arguments(group: int) -> Iterator[tuple[tuple[str, ...], Arguments]]:
    """(captured scalars, fixed arguments) of the quantisers' spellings."""
    for scale in ("pow2", "fp32"):
        for via in ("div", "mul"):
            for floored in (True, False):
                floor = () if floored else (("floor", None),)
                names = ("floor",) if floored else ()
                yield names, (("group", group), *floor, ("scale", scale), ("via", via))


def _codes(node: fx.Node, root: Term) -> Iterator[Spec]:
    shape = node.meta["val"].shape
    group = group_of(root)
    if node.meta["val"].dtype != atoms.FP8 or root.op != "cast" or group is None:
        return
    layouts = [(lanes(node), False)]
    if len(shape) > 1 and shape[-1] == group and isinstance(shape[-2], int):
        layouts.insert(0, (shape[-2] * group, True))
    for width, blocked in layouts:
        if width is None or width % group:
            continue
        for names, fixed in quant_arguments(group):
            for by in ("div", "mul"):
                for saturate in (True, False):
                    for x in (*NARROW, F32):
                        tail = (("by", by), ("saturate", saturate), ("blocked", blocked))
                        yield Spec(((Hole("x", (ROWS, width)), x),), names, (*fixed, *tail))


def _scales(node: fx.Node, root: Term) -> Iterator[Spec]:
    group = group_of(root, 6)
    shape = node.meta["val"].shape
    if group is None or node.meta["val"].dtype != F32 or root.op not in ("exp2", "div", "mul"):
        return
    keep = len(shape) > 0 and isinstance(shape[-1], int) and shape[-1] == 1
    width = shape[-2] if keep and len(shape) > 1 else shape[-1]
    if not isinstance(width, int):
        return
    for names, fixed in quant_arguments(group):
        for x in (*NARROW, F32):
            holes = ((Hole("x", (ROWS, width * group)), x),)
            yield Spec(holes, names, (*fixed, ("keepdim", keep)))


def _lead(node: fx.Node, root: Term) -> Iterator[Spec]:
    width = lanes(node)
    if width is None or root.op != "cat" or len(root.args) != 4:
        return
    (lead, tail), first = root.args[1], root.args[2]
    group = group_of(first)
    if group is None or lead % group:
        return
    hole = ((Hole("x", (ROWS, width)), node.meta["val"].dtype),)
    for names, fixed in quant_arguments(group):
        for by in ("div", "mul"):
            for saturate in (True, False):
                arguments = (("tail", tail), *fixed, ("by", by), ("saturate", saturate))
                yield Spec(hole, names, arguments)


def _codes_of(x: Tensor, *, group: int, blocked: bool, **quant: object) -> Tensor:
    codes = atoms.group_quant(x, group=group, **quant)[0]  # type: ignore[arg-type]
    return codes.unflatten(-1, (-1, group)) if blocked else codes


def _scales_of(x: Tensor, *, group: int, keepdim: bool, **quant: object) -> Tensor:
    s = atoms.amax_scale(x.unflatten(-1, (-1, group)), **quant)  # type: ignore[arg-type]
    return s if keepdim else s.squeeze(-1)


def _atom(
    name: str,
    reference: Callable[..., Tensor],
    specs: Callable[[fx.Node, Term], Iterator[Spec]],
    needs: str,
) -> Atom:
    return Atom(name, reference, specs, frozenset(needs.split()))


RMS_NORM = _atom("rms_norm", atoms.rms_norm, _rms_norm, "fold rsqrt mul")
ROPE = _atom("rope", atoms.rope, _rope(inverse=False), "lace mul add neg")
INVERSE_ROPE = _atom("inverse_rope", atoms.rope, _rope(inverse=True), "lace mul add neg")
SWIGLU = _atom("clamp_swiglu", atoms.clamp_swiglu, _swiglu, "exp mul div")
QUANT_LEAD = _atom("fake_quant_lead", atoms.fake_quant_lead, _lead, "cat fold cast")
CODES = _atom("group_quant", _codes_of, _codes, "fold cast abs")
SCALES = _atom("group_scale", _scales_of, _scales, "fold abs")
