"""Every spelling is taken and equals eager; every mutant is not, or equals eager all the same."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dsv4fuse.kernels import _common as common
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dsv4fuse import Report, compat, ops
from dsv4fuse.backend import dsv4fuse as backend
from dsv4fuse.fusion import registry

from ._same import copied, difference
from .spellings._case import Case

assert ops


def _cases(kind: str) -> list[Any]:
    found = []
    for name in registry():
        try:
            module = importlib.import_module(f".spellings.{name}", __package__)
        except ModuleNotFoundError:
            if kind != "KNOWN_MISSES":
                found.append(pytest.param(None, id=f"{name}: no file"))
            continue
        cases = getattr(module, kind, {})
        found += [pytest.param(case, id=f"{name}-{key}") for key, case in cases.items()]
    return found


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """Fused ops run their references: what is tested here is which of them are put where."""
    monkeypatch.setattr(common, "INTERPRETED", False)


def _tensors(value: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _run(case: Case, **options: Any) -> tuple[Report, list[Tensor], list[Tensor]]:
    """The report, and what eager and the compiled function return and leave behind."""
    eager, fused = case.build(), case.build()
    wanted_args, found_args = copied(case.inputs()), copied(case.inputs())
    for number, axes in case.dynamic.items():
        for axis in axes:
            torch._dynamo.mark_dynamic(found_args[number], axis)
    run = torch.compile(eager, backend="aot_eager_decomp_partition") if case.decomposed else eager
    with torch.no_grad():
        wanted = run(*wanted_args)
        options = {"select": "always", "inner": "eager"} | options
        found = torch.compile(fused, backend=backend, options=options, fullgraph=True)(*found_args)
    state = [m.state_dict() if isinstance(m, torch.nn.Module) else {} for m in (eager, fused)]
    left = SimpleNamespace(
        parameters=lambda: _tensors((found_args, state[1])), buffers=lambda: iter(())
    )
    return (
        Report.of(left),
        list(_tensors((wanted, wanted_args, state[0]))),
        list(_tensors((found, found_args, state[1]))),
    )


def _equal(wanted: list[Tensor], found: list[Tensor], exact: bool) -> None:
    assert len(wanted) == len(found)
    pairs = enumerate(zip(wanted, found, strict=True))
    wrong = {i: said for i, p in pairs if (said := difference(*p, exact))}
    assert not wrong


def _reasons(report: Report) -> str:
    return " | ".join(s.reason for s in report.sites if s.status == "taken")


def _fits(case: Case, report: Report) -> bool:
    text = _reasons(report)
    return (
        report.counts() == dict(case.counts)
        and all(p in text for p in case.parts)
        and not any(p in text for p in case.absent)
    )


@pytest.mark.parametrize("case", _cases("SPELLINGS"))
def test_spelling(case):
    assert case is not None, "a fusion needs a file of spellings"
    report, wanted, found = _run(case)
    assert _fits(case, report), f"wanted {dict(case.counts)} {case.parts}:\n{report}"
    _equal(wanted, found, case.exact)
    assert case.exact == ("up to rounding" not in _reasons(report))


@pytest.mark.parametrize("case", _cases("MUTANTS"))
def test_mutant(case):
    """Without the check on random inputs: it is the terms that must tell them apart."""
    assert case is not None, "a fusion needs a file of spellings"
    report, wanted, found = _run(case, verify=False)
    assert _fits(case, report), f"wanted {dict(case.counts)}, none of {case.absent}:\n{report}"
    assert not case.why or any(case.why in s.reason for s in report.with_status("declined"))
    _equal(wanted, found, case.exact)
    with torch.no_grad():
        args = copied(case.like.inputs())
        other = list(_tensors((case.like.build()(*args), args)))
    assert len(other) != len(wanted) or any(
        difference(a, b, exact=True) for a, b in zip(other, wanted, strict=True)
    ), "the edit changes nothing on these inputs"


@pytest.mark.parametrize("case", _cases("KNOWN_MISSES"))
def test_known_miss(case):
    """Not taken, for the reason that the case gives, and right all the same."""
    report, wanted, found = _run(case)
    assert not _fits(case, report), "now it is taken: move it to SPELLINGS"
    assert case.why
    _equal(wanted, found, case.exact)


INDUCTOR = [  # the shapes of code that Inductor itself may rewrite first, and writes in place
    ("norm_rope_cache", "the reference's q"),
    ("norm_rope_cache", "q and kv, dynamic"),
    ("norm_rope_cache", "fake quant in place: pow2"),
    ("clamp_swiglu_quant", "quant: pow2"),
    ("inv_rope_quant", "quant: of the reference's rope"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, key", INDUCTOR)
def test_spelling_with_inductor(name, key):
    """On a CPU the fused op is a call in Inductor's code; what it returns is what eager does."""
    case = importlib.import_module(f".spellings.{name}", __package__).SPELLINGS[key]
    with compat.without_caches():
        report, wanted, found = _run(case, inner="inductor")
    assert _fits(case, report), str(report)
    _equal(wanted, found, case.exact)
