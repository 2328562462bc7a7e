"""Each site checked before it is taken: the user's own nodes against the fused op.

Both run eagerly on the same random inputs of the real shapes, dtypes and strides, on the real
device. Matching is a proof from the terms; this catches a wrong rule, a wrong kernel, a wrong
binding. Equal regions are checked once a process.

A candidate promises to be what the module computes, in the order of its roundings ("eager"), or to
be as near to exact arithmetic as the module is ("exact"): then both are compared with the region
in fp64. A region whose run, in fp64 where that is asked, does not fit into free memory is taken as
proved by its terms.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from dsv4fuse import clock, compat, exact, samples
from dsv4fuse.fusion import Candidate
from dsv4fuse.terms import short

aten = torch.ops.aten
log = logging.getLogger("dsv4fuse")
_verified: dict[object, str | None] = {}
# Differences allowed, in units of the output dtype's rounding step at the largest value of a row:
# a sum in another order may turn one rounding on the way, a rotation adds two rounded values. In
# fp32 each function and sum on the way adds its own: 3.6 were seen (mixes of hyper-connections).
STEPS = {"faithful": 2.0, "precise": 8.0}
WIDE = 8.0
# Where each rounding is promised, few results of 16 bits or less differ at all. So many of them
# are another function, though each lies within the steps, which are wide for fp8.
DIFFERENT = 0.125
# But for what a narrow sum in another order, or a narrow root, may turn in most of them.
TURNING = frozenset({"divide by root", "order of a sum", "order of the sums"})
# Where the same nearness to exact arithmetic is promised: a module so much further from it rounds
# where the fused op does not, and is another function.
COARSER = 32.0
# Errors of many steps come from roundings on the way, in a narrower dtype than the result's: those
# of two such ways are alike and not equal.
ALIKE = 1.25
DRAWS = 3  # of inputs for a site in which many do: one scale that is turned is a row of them


def check(candidate: Candidate, region: list[fx.Node], numerics: str) -> str | None:
    """None if the fused op computes what the region does, else a sentence."""
    key = (candidate.fusion, numerics, signature(candidate, region))
    if key not in _verified:
        try:
            with compat.outside_compilation():
                _verified[key] = _checked(candidate, region, numerics)
        except torch.OutOfMemoryError:  # not remembered: the next time there may be enough
            return NO_MEMORY
        except Exception as error:  # whatever a kernel's compiler or launch raises
            log.exception("checking %s", candidate.fusion)
            _verified[key] = f"It could not be run for the check: {said(error)}."
    return _verified[key]


def forget() -> None:
    """Check every site anew, as a new process does."""
    _verified.clear()


def said(error: Exception) -> str:
    """The first line of an error's message, or the name of its type; of a compilation's error that
    of the backend."""
    error = getattr(error, "inner_exception", error)
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


NO_MEMORY = "There was not enough memory to check the site."
UNCHECKED = "It is proved by its terms; the unfused region is too large to run for the check."


def too_large(candidate: Candidate, region: list[fx.Node]) -> bool:
    """Would the run that the fused op is compared with not fit into the device's free memory?"""
    device, wide = candidate.root.meta["val"].device, candidate.judged == "exact"
    return not exact.fits(region, samples.leaves(candidate, region), device, wide)


def _checked(candidate: Candidate, region: list[fx.Node], numerics: str) -> str | None:
    """What is wrong on one draw of inputs; what chance can do must show on every one."""
    wrong = None
    for number in range(DRAWS):
        wrong = _check(candidate, region, numerics, number)
        if wrong is None or not any(words in wrong for words in BY_CHANCE):
            return wrong
    return wrong


_MANY = "of all elements differ, where each rounding is promised"
_COARSE = "so it rounds where the fused op does not"
BY_CHANCE = (_MANY, _COARSE)


def _check(
    candidate: Candidate, region: list[fx.Node], numerics: str, number: int
) -> str | None:
    ends = (*candidate.outputs, *candidate.updates)
    outer = samples.leaves(candidate, region)
    faithful = numerics == "faithful" and candidate.judged == "eager"
    true = None
    made = samples.draw(candidate, outer, number)
    if made is None:
        return "No random input has a single right result to compare with."
    with compat.exact_products():
        wanted = exact.run(region, dict(made), ends, _stably)
    if candidate.judged == "exact":
        true = exact.truth(region, dict(made), ends)
    inputs = [made[n].clone() if n in candidate.caches else made[n] for n in candidate.inputs]
    # On a GPU the first of a kernel, which is compiled for it unless it was ahead of time.
    with clock.step("launching"), compat.as_in_graphs(candidate.root.meta["val"].device):
        found = list(candidate.call(*inputs))
    found += [inputs[candidate.inputs.index(c)] for c in candidate.caches]
    rows = candidate.settled(*inputs) if candidate.settled is not None else ...
    for i, (node, b) in enumerate(zip(ends, found, strict=True)):
        values = [wanted[node], b, true[node] if true else wanted[node]]
        values = [v[rows] for v in values]
        drawn = candidate.places or candidate.reads  # then the last place may be written twice
        if i >= len(candidate.outputs) and drawn:
            values = [v.narrow(-2, 0, v.shape[-2] - 1) for v in values]
        split = candidate.pieces.get(node, lambda t: (t,))
        several = list(zip(*map(split, values), strict=True))
        code = candidate.code.get(node, 0.0)
        apart = (_differ(m, f, t, numerics, code) for m, f, t in several)
        wrong = next((w for w in apart if w), None)
        if wrong is None and faithful and (code or not candidate.loose & TURNING):
            wrong = next((w for a, b, _ in several if (w := _many(a, b, code))), None)
        if wrong:
            return f"On random inputs {node.name} differs from the unfused result: {wrong}."
    return None


def _stably(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """A node's value. Of the orders in which a sort may leave what is equal, that of the input: so
    there is one right result."""
    if node.target not in (aten.sort.default, aten.sort.stable):
        return node.target(*args, **kwargs)
    named = dict(zip(("dim", "descending"), args[1:], strict=False))
    return aten.sort.stable(args[0], **{**named, **kwargs, "stable": True})


def steps_allowed(dtype: torch.dtype, numerics: str = "faithful") -> float:
    """Beside the module's own error, for results of that dtype."""
    return STEPS[numerics] if dtype.itemsize <= 2 else WIDE


def _differ(a: Tensor, b: Tensor, true: Tensor, numerics: str, code: float) -> str | None:
    """What is wrong with b, which stands for the module's a; both are judged by ``true``."""

    def strides(t: Tensor) -> list[int]:
        return [s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1]

    if (a.dtype, a.shape, strides(a)) != (b.dtype, b.shape, strides(b)):
        return (
            f"{short(b.dtype)}{list(b.shape)} with strides {b.stride()} instead of "
            f"{short(a.dtype)}{list(a.shape)} with {a.stride()}"
        )
    if not a.numel():
        return None
    if not a.dtype.is_floating_point:
        return None if torch.equal(a, b) else "the integers are not equal"
    x, y = a.float(), b.float()  # no fp8 has these questions answered
    if not torch.equal(x.isnan(), y.isnan()):
        return "NaN at other places"
    if not torch.equal(x.where(x.isinf(), 0), y.where(y.isinf(), 0)):
        return "infinities at other places"
    own, worst = _steps(a, true, a.dtype), _steps(b, true, a.dtype)
    allowed = steps_allowed(a.dtype, numerics) + code / torch.finfo(a.dtype).eps
    if numerics == "faithful" and own > COARSER * (worst + STEPS[numerics]):
        return (
            f"the module's is off by {own:.3g} rounding steps of {short(a.dtype)}, "
            f"the fused op's by {worst:.3g}, {_COARSE}"
        )
    if worst <= max(own + allowed, ALIKE * own):
        return None
    beside = f", the module's is off by {own:.3g}" if own else ""
    return f"by {worst:.3g} rounding steps of {short(a.dtype)}{beside}"


def _many(a: Tensor, b: Tensor, code: float = 0.0) -> str | None:
    """Do more results differ than a sum in another order turns? Narrow ones tell, and those of fp32
    that follow a narrow one (``code``), by more than fp32's own steps."""
    wide = a.element_size() > 2
    if not a.dtype.is_floating_point or not a.numel() or wide and not code:
        return None
    x, y = a.float(), b.float()
    own = WIDE * torch.finfo(x.dtype).eps if wide else 0.0
    part = ((x - y).abs() > own * x.abs()).float().mean().item()
    return f"{100 * part:.0f} % {_MANY}" if part > DIFFERENT else None


def _steps(x: Tensor, true: Tensor, dtype: torch.dtype) -> float:
    """The largest difference from the truth, in rounding steps at a row's largest value."""
    x, true = x.double(), true.double()
    finite = x.isfinite() & true.isfinite()  # an infinity would be the scale of its row
    x, true = (t.where(finite, 0) for t in (x, true))
    scale = true.abs().amax(-1, keepdim=True) if true.dim() else true.abs()
    return ((x - true).abs() / (scale * torch.finfo(dtype).eps + 1e-300)).max().item()


def signature(candidate: Candidate, region: Iterable[fx.Node]) -> object:
    """Equal for regions that compute the same on inputs alike, on any GPU of a kind: each rank of a
    job has another one."""
    number: dict[fx.Node, object] = {}

    def like(value: Any) -> object:
        if isinstance(value, tuple | list):
            return tuple(map(like, value))
        if isinstance(value, Tensor):
            return (tuple(map(str, value.shape)), tuple(map(str, value.stride())),
                    value.dtype, value.device.type)  # fmt: skip
        return str(value)

    def name(node: fx.Node) -> str:
        return f"%{number.setdefault(node, len(number))}"

    def argument(value: Any) -> Any:
        if isinstance(value, torch.device):
            return value.type
        return name(value) if isinstance(value, fx.Node) else value

    rows = []
    for node in region:
        args = fx.node.map_aggregate((node.args, node.kwargs), argument)
        leaves = tuple(like(a.meta.get("val")) for a in node.all_input_nodes)
        rows.append((name(node), str(node.target), repr(args), leaves))
    inputs = tuple((name(n), like(n.meta.get("val"))) for n in candidate.inputs)
    bases = [samples.shows(n, candidate.inputs) for n in candidate.inputs]
    same = tuple(base and name(base) for base in bases)
    return (tuple(rows), inputs, same, str(sorted(candidate.detail.items())))
