"""The ways in which the shared atoms may appear: shapes from the node, dtypes and roundings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dsv4fuse import atoms
from dsv4fuse.match import Hole
from dsv4fuse.scene import Atom, Spec
from dsv4fuse.terms import Term
from dsv4fuse.trace import ROWS

F32 = torch.float32
NARROW = (torch.bfloat16, torch.float16)
# cast, weight, product, cast, quotient, sum, exp: how deep in a SwiGLU its exp lies at most
SILU_DEPTH = 7
Arguments = tuple[tuple[str, object], ...]


def lanes(node: fx.Node) -> int | None:
    """The extent of a node's last axis, when it is a fixed number of more than one."""
    shape = node.meta["val"].shape
    return int(shape[-1]) if len(shape) and isinstance(shape[-1], int) and shape[-1] > 1 else None


def _rms_norm(node: fx.Node, root: Term) -> Iterator[Spec]:
    d = lanes(node)
    if d is None or root.op not in ("mul", "cast"):
        return
    out = node.meta["val"].dtype
    sources = (out, *NARROW) if out == F32 else (out,)
    for x in sources:
        for weight in (None, *dict.fromkeys((x, F32))):
            for rounding in ("once", "weight", "rstd", "every") if x != F32 else ("once",):
                wider = weight == F32 and rounding != "once"
                if out != (F32 if wider else x) or rounding == "weight" and weight is None:
                    continue
                holes = [(Hole("x", (ROWS, d)), x)]
                if weight is not None:
                    wide = weight == F32
                    holes.append((Hole("weight", (d,), wide), weight))
                yield Spec(tuple(holes), ("eps",), (("rounding", rounding),))


def _rope(inverse: bool) -> Callable[[fx.Node, Term], Iterator[Spec]]:
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
    gates = any(t.op == "div" and t.args[1].op == "add" for t in walk(root, 8))
    if width is None or root.op not in ("mul", "cast") or not gates:
        return
    inner = {t.op for t in walk(root, SILU_DEPTH)}
    if "exp" not in inner:
        return  # a product far behind some exp: each try costs a trace
    out = node.meta["val"].dtype
    for x in dict.fromkeys((out, *NARROW)) if out == F32 else (out,):
        for weight in (None, *dict.fromkeys((F32, x))):
            for rounding in ("once",) if root.op == "cast" else ("silu", "once"):
                holes = [(Hole("gate", (ROWS, width)), x), (Hole("up", (ROWS, width)), x)]
                if weight is not None:
                    holes.append((Hole("weight", (ROWS, 1), weight == F32), weight))
                arguments = (("rounding", rounding),)
                for round_limit in (True, False) if "minimum" in inner else ():
                    yield Spec(tuple(holes), ("limit",), arguments, round_limit)
                yield Spec(tuple(holes), (), (("limit", None), *arguments))


@dataclass(frozen=True)
class Quantiser:
    """What a term says of the quantiser in it, so that few of its spellings need a try."""

    group: int
    dtype: torch.dtype  # of the value quantised
    scale: str
    saturate: bool
    fp4: str = ""  # a form of atoms.e2m1

    def spellings(self) -> Iterator[tuple[tuple[str, ...], Arguments]]:
        """(captured scalars, fixed arguments) of ``atoms.amax_scale``."""
        for via in ("div", "mul"):
            fixed = (("group", self.group), ("scale", self.scale), ("via", via))
            yield ("floor",), fixed
            yield (), (*fixed, ("floor", None))

    def encoded(self) -> Iterator[tuple[tuple[str, ...], Arguments]]:
        """The same of ``atoms.group_quant``, or of ``atoms.fake_quant`` to fp4."""
        kind = ("fp4", self.fp4) if self.fp4 else ("saturate", self.saturate)
        for names, fixed in self.spellings():
            for by in ("div", "mul"):
                yield names, (*fixed, ("by", by), kind)


def quantiser(term: Term) -> Quantiser | None:
    """The quantiser whose block maximum a term divides by, if there is one."""
    inner = list(walk(term, 14))
    maximum = next((t for t in inner if t.op == "fold" and t.args[0] == "amax"), None)
    if maximum is None or maximum.args[2] != (len(maximum.args[3]) - 1,):
        return None
    group = maximum.args[3][-1]
    coded = next((t for t in inner if t.op == "cast" and t.dtype == atoms.FP8), None)
    saturate = coded is not None and coded.args[0].op == "minimum"
    scale = "pow2" if any(t.op == "exp2" for t in inner) else "fp32"
    form = next((int(t.args[1].args[0]) for t in inner if t.op == "e2m1"), None)
    fp4 = "" if form is None else atoms.E2M1[form]
    if not isinstance(group, int):
        return None
    return Quantiser(group, maximum.dtype, scale, saturate, fp4)


def walk(term: Term, depth: float = math.inf) -> Iterator[Term]:
    """The terms of a term's elementwise part, and the reductions in it, down to a depth."""
    yield term
    if depth and term.op != "fold":
        for a in term.args:
            if isinstance(a, Term):
                yield from walk(a, depth - 1)


def code_distance(arguments: Mapping[str, object]) -> float:
    """How far apart the two largest codes of a fake quantiser are, as a part of the larger."""
    return 2 / atoms.FP4_MAX if arguments.get("fp4") else 32 / atoms.FP8_MAX


def _codes(node: fx.Node, root: Term) -> Iterator[Spec]:
    shape = node.meta["val"].shape
    if node.meta["val"].dtype != atoms.FP8 or root.op != "cast":
        return
    found = quantiser(root)
    if found is None:
        return
    layouts = [(lanes(node), False)]
    if len(shape) > 1 and shape[-1] == found.group and isinstance(shape[-2], int):
        layouts.insert(0, (shape[-2] * found.group, True))
    for width, blocked in layouts:
        if width is None or width % found.group:
            continue
        for names, fixed in found.encoded():
            hole = (Hole("x", (ROWS, width)), found.dtype)
            yield Spec((hole,), names, (*fixed, ("blocked", blocked)))


def _scales(node: fx.Node, root: Term) -> Iterator[Spec]:
    shape = node.meta["val"].shape
    if node.meta["val"].dtype != F32 or root.op not in ("exp2", "div", "mul") or not len(shape):
        return
    found = quantiser(root)
    keep = isinstance(shape[-1], int) and shape[-1] == 1
    width = shape[-2] if keep and len(shape) > 1 else shape[-1]
    if found is None or not isinstance(width, int):
        return
    for names, fixed in found.spellings():
        hole = (Hole("x", (ROWS, width * found.group)), found.dtype)
        yield Spec((hole,), names, (*fixed, ("keepdim", keep)))


def _fake(node: fx.Node, root: Term) -> Iterator[Spec]:
    width = lanes(node)
    found = quantiser(root) if width is not None and root.op == "cast" else None
    if width is None or found is None or width % found.group:
        return
    hole = (Hole("x", (ROWS, width)), node.meta["val"].dtype)
    for names, fixed in found.encoded():
        yield Spec((hole,), names, fixed)


def _lead(node: fx.Node, root: Term) -> Iterator[Spec]:
    width = lanes(node)
    last = node.meta["val"].dim() - 1
    if width is None or root.op != "cat" or len(root.args) != 4 or root.args[0] != last:
        return
    (lead, tail), first = root.args[1], root.args[2]
    found = quantiser(first)
    if found is None or lead % found.group or found.fp4:
        return
    hole = (Hole("x", (ROWS, width)), node.meta["val"].dtype)
    for names, fixed in found.encoded():
        yield Spec((hole,), names, (("tail", tail), *fixed))


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
FAKE_QUANT = _atom("fake_quant", atoms.fake_quant, _fake, "fold cast abs")
QUANT_LEAD = _atom("fake_quant_lead", atoms.fake_quant_lead, _lead, "cat fold cast")
CODES = _atom("group_quant", _codes_of, _codes, "fold cast abs")
SCALES = _atom("group_scale", _scales_of, _scales, "fold abs")
