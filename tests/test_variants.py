"""The benchmark's sequences: each is one site of its fusion, at one token too, and equals eager."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common as common

from dsv4fuse import backend, fusion

SMALL = fusion.Sizes(heads=4, groups=2, inter=256)
VARIANTS = [(f, v) for f, made in fusion.registry().items() for v in made.examples]


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """As in test_spellings: the kernels have tests of their own, with the interpreter's exp."""
    monkeypatch.setattr(common, "INTERPRETED", False)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name, variant", VARIANTS)
def test_taken_as_one_site(name, variant, tokens):
    made = fusion.registry()[name].examples[variant](tokens, SMALL, "cpu")
    options = {"select": "always", "inner": "eager", "expect": {name: 1}}
    fused = torch.compile(made.fn, backend=backend.dsv4fuse, options=options, dynamic=False)
    ours, theirs = ([t.clone() for t in made.inputs] for _ in range(2))
    with torch.no_grad():
        found, wanted = fused(*ours), made.fn(*theirs)
    found, wanted = (
        [x] if isinstance(x, torch.Tensor) else list(x) for x in (found, wanted)
    )
    for a, b in zip(made.read(ours), made.read(theirs), strict=True):
        assert torch.equal(a, b), "an input was written, or a cache was written otherwise"
    for a, b in zip(found, wanted, strict=True):
        # With slack, sums have another order: a result's rounding may turn as well.
        turns = made.slack and a.dtype.is_floating_point
        step = 2 * torch.finfo(a.dtype).eps + made.slack if turns else 0.0
        off = (a.double() - b.double()).abs().where(a != b, 0)  # infinities too
        largest = b.double().abs().where(b.double().isfinite(), 0).amax(-1, keepdim=True)
        assert (off <= step * largest).all()
