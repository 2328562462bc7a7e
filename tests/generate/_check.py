"""One program through the pass: is it fused as stated, and does it still compute the same?"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4fuse import Report, pipeline, verify
from dsv4fuse.backend import parse

from .._same import copied, difference
from . import _graphs
from ._hand import Site

OPTIONS = {"select": "always", "inner": "eager"}
PARSED = parse(OPTIONS)


@dataclass
class Outcome:
    """``wrong``: other results than eager's, by more than rounding; ``inexact``: by that, where the
    spelling says to the bit. ``crash``: an exception. ``missed``: what was not
    taken, by fusion, with the report's reasons."""

    program: str = ""
    sites: Counter[str] = field(default_factory=Counter)
    taken: Counter[str] = field(default_factory=Counter)
    wrong: str = ""
    inexact: str = ""
    crash: str = ""
    invalid: str = ""
    missed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def unequal(wanted: Any, found: Any, exact: bool) -> str:
    """Everything that differs between two results, "" for nothing."""
    a, b = tensors(wanted), tensors(found)
    if len(a) != len(b):
        return f"{len(b)} tensors instead of {len(a)}"
    pairs = enumerate(zip(a, b, strict=True))
    return "; ".join(f"{i}: {said}" for i, p in pairs if (said := difference(*p, exact)))


def fused(fn: Any, args: Sequence[Any]) -> tuple[Report, Any]:
    """The pass on the traced graph, which is then run."""
    module = _graphs.traced(fn, args)
    report = pipeline.run(module.graph, PARSED)
    module.recompile()
    return report, _graphs.run(module, args)


def stated(site: Site, counts: Mapping[str, int]) -> Site:
    """The same site with another statement of what it is fused to."""
    return dataclasses.replace(site, counts=counts)


def check(site: Site, way: Any = fused) -> Outcome:
    """What the pass makes of one program, which need not be a single site."""
    started = time.perf_counter()
    outcome = Outcome(repr(site), Counter(site.counts))
    wanted_args, found_args = copied(site.inputs), copied(site.inputs)
    try:
        with torch.no_grad():
            wanted = site.fn(*wanted_args)
    except Exception as error:
        outcome.invalid = repr(error)
        return outcome
    try:
        report, found = way(site.fn, found_args)
        outcome.taken = whole(site, report)
        ends = (wanted, wanted_args), (found, found_args)
        outcome.wrong = unequal(*ends, exact=False) and further_off(site, *ends)
        outcome.inexact = unequal(*ends, exact=True) if site.exact else ""
        outcome.missed = _missed(site, report)
    except Exception:
        outcome.crash = traceback.format_exc()
    outcome.seconds = time.perf_counter() - started
    return outcome


def further_off(site: Site, wanted: Any, found: Any) -> str:
    """What of ``found`` is further from exact arithmetic than eager's, by more than roundings are.

    Sums in another order are no further off than eager's, but not equal to them. A single result
    of eager's may be near by chance: where it is not, eager's at inputs nearby are looked at too.
    """
    said = {
        i: s
        for i, (a, b) in enumerate(zip(tensors(wanted), tensors(found), strict=True))
        if (s := difference(a, b, exact=False))
    }
    left = {i: f"{i}: {s}" for i, s in said.items()}
    own: dict[int, float] = {}
    for number in range(NEARBY + 1):
        args = copied(site.inputs) if number == 0 else nearby(site.inputs, number)
        a = tensors(wanted) if number == 0 else _eager(site, args)
        true = _graphs.truth(site.fn, args)
        if number == 0:
            exact = true
        for i in list(left):
            x, b = a[i], tensors(found)[i]
            if (x.dtype, x.shape) != (b.dtype, b.shape):
                continue
            if not x.is_floating_point():
                if _free_bits(site, x, b):
                    del left[i]
                continue
            own[i] = max(own.get(i, 0.0), verify._steps(x, true[i], x.dtype))
            worst = verify._steps(b, exact[i], b.dtype)
            if worst <= own[i] + verify.steps_allowed(x.dtype):
                del left[i]
            else:
                left[i] = f"{i}: {said[i]}, from the truth {worst:.3g} and eager {own[i]:.3g}"
        if not left:
            break
    return "; ".join(left.values())


class _Bytes(TorchDispatchMode):
    """Sees whether the bytes of a NaN, or of a zero, are read."""

    of_nan = of_zero = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.view.dtype and args[0].is_floating_point():
            self.of_nan |= bool(args[0].isnan().any())
            self.of_zero |= bool((args[0].float() == 0).any())
        return func(*args, **(kwargs or {}))


NANS = torch.tensor([0x7F, 0xFF, 0xC0], dtype=torch.uint8)  # bytes of one, in e4m3 and in bf16


def _free_bits(site: Site, a: Tensor, b: Tensor) -> bool:
    """Bytes that differ in their highest bit alone or are both a NaN's, of a program that reads
    those of a NaN, whose sign and payload no operation says; or which are 0 but for that bit, where
    it reads those of a zero: the sum of two of -0 is +0, for it starts there. As floats the two are
    equal in all that is compared."""
    if a.dtype != torch.uint8:
        return False
    with _Bytes() as seen:
        _eager(site, site.inputs)
    sign = (a ^ b) == 0x80
    free = sign | (torch.isin(a, NANS) & torch.isin(b, NANS)) if seen.of_nan else (
        sign & (a & 0x7F == 0) & seen.of_zero
    )
    return bool(((a == b) | free).all())


NEARBY = 8  # inputs


def nearby(args: Sequence[Any], seed: int) -> list[Any]:
    """The same inputs, each value of them rounded a step or so up or down."""
    generator = torch.Generator().manual_seed(seed)

    def moved(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.element_size() < 2:
            return t
        step = 1 + torch.randn(t.shape, generator=generator) * torch.finfo(torch.bfloat16).eps
        return t.copy_(t.where(t.abs() > 1e30, (t * step).to(t.dtype)))

    return [moved(a) for a in copied(args)]


def _eager(site: Site, args: Sequence[Any]) -> list[Tensor]:
    given = copied(args)
    with torch.no_grad():
        return tensors((site.fn(*given), given))


def whole(site: Site, report: Report) -> Counter[str]:
    """How many sites of each fusion were taken with all that is stated of them."""
    taken, lacking = Counter(report.counts()), Counter[str]()
    for (fusion, words), wanted in site.parts.items():
        sites = (s for s in report.with_status("taken") if s.fusion == fusion)
        found = sum(words in s.reason.lower() for s in sites)
        lacking[fusion] = max(lacking[fusion], wanted - found)
    return Counter({f: n - min(n, lacking[f]) for f, n in taken.items()})


def _missed(site: Site, report: Report) -> list[tuple[str, str]]:
    """(fusion, reason) of what was stated and not taken, or taken and not stated."""
    missed = []
    taken = whole(site, report)
    for fusion in sorted({*site.counts, *taken}):
        wanted, found = site.counts.get(fusion, 0), taken[fusion]
        if wanted == found:
            continue
        left = report.counts().get(fusion, 0) != found  # a part of a site
        reasons = {
            f"{s.status}: {s.reason}"
            for s in report.sites
            if s.status != "taken" or left and s.fusion == fusion
        }
        said = " | ".join(sorted(reasons)) or "nothing near"
        missed.append((fusion, f"{found} of {wanted}; {said}"))
    return missed
