"""Which way a grouped projection is computed: by measurement, and only where it is legal."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.kernels import _strategies as strategies
from torch import Tensor

from dsv4fuse import Report, compat, explain
from dsv4fuse.backend import dsv4fuse as backend
from dsv4fuse.fusion import Sizes, registry

from .spellings import inv_rope_grouped_bmm as cases
from .spellings.inv_rope_grouped_bmm import EINSUM, back


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    """As if turning o in place were the fastest, which no graph is offered, then the copy."""
    us = {"place": 1.0, "dequantise": 1.5, "copy": 2.0, "tail": 3.0, "prologue": 4.0}
    rows = [{"kind": k, "groups": 8, "tokens": 64, "us": us} for k in ("wide", "e4m3")]
    monkeypatch.setattr(strategies, "measured", lambda _: {"rows": rows})


def _site(fn, args: tuple[Tensor, ...]) -> str:
    """How fn's projection is computed; the result and what is left of the inputs are eager's."""
    ours, theirs = ([a.clone() for a in args] for _ in range(2))
    with torch.no_grad():
        options = {"select": "always", "inner": "eager"}
        found = torch.compile(fn, backend=backend, options=options, fullgraph=True)(*ours)
        wanted = fn(*theirs)
    found, wanted = ([x] if isinstance(x, Tensor) else list(x) for x in (found, wanted))
    for a, b in zip([*found, *ours], [*wanted, *theirs], strict=True):
        assert torch.equal(a.float(), b.float()) or a.dtype == torch.bfloat16
        assert torch.allclose(a.float(), b.float(), rtol=2**-7, atol=2**-7 * b.abs().float().max())
    holder = torch.nn.Module()
    holder.register_buffer("x", ours[0])
    (site,) = Report.of(holder).with_status("taken")
    assert site.detail["strategies"][site.detail["strategy"]] == min(
        site.detail["strategies"].values()
    )
    return str(site.detail["strategy"])


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, c, s, w: EINSUM(back(x, c, s), w),  # the caller's own tensor
        lambda x, c, s, w: EINSUM(back(x[:, :, :, :64], c, s), w),
        lambda x, c, s, w: (lambda o: (EINSUM(back(o, c, s), w), o))(x * 2),
        lambda x, c, s, w: (lambda o: (EINSUM(back(o, c, s), w), o[..., 1:].sum(-1)))(x * 2),
        lambda x, c, s, w: (lambda o: (EINSUM(back(o, c, s), w), o.view(-1)))(x * 2),
        # heads first in memory: rows of a token are not one row
        lambda x, c, s, w: EINSUM(
            back((x.transpose(1, 2).contiguous() * 2).transpose(1, 2), c, s), w
        ),
    ],
)
def test_the_fastest_that_is_legal(fn):
    assert _site(fn, cases.usual()()) == "copy"


def test_e4m3_weights_are_left_to_the_graph_where_that_is_faster():
    fn = lambda x, c, s, w, ws: EINSUM(  # noqa: E731
        back(x, c, s), cases._blocks(w, ws).to(x.dtype)
    )
    assert _site(fn, cases.usual(e4m3=True)()) == "copy"


@pytest.mark.parametrize("heads, tokens, packaging, chosen", [
    (4, 4, False, "groups"), (6, 4, False, "batched"), (4, 6, False, "batched"),
    (4, 4, True, "batched"),
])  # fmt: skip
def test_torchs_own_product_where_cublas_takes_the_scales(
    heads, tokens, packaging, chosen, monkeypatch
):
    """Four blocks of lanes at once, and four tokens; a group has the lanes of half the heads. Its
    op is not in a package."""
    us = {"groups": 1.0, "batched": 2.0}
    rows = [{"kind": "fp8", "groups": 2, "tokens": 4, "us": us}]
    monkeypatch.setattr(strategies, "measured", lambda _: {"rows": rows})
    monkeypatch.setattr(common, "INTERPRETED", False)  # a CPU has no such product
    sizes = Sizes(heads=heads, groups=2, head_dim=256)
    made = registry()["inv_rope_grouped_bmm"].examples["fp8"](tokens, sizes, "cpu")
    monkeypatch.setattr(compat, "packaging", lambda: packaging)
    report = explain(made.fn, *made.inputs, options={"select": "always"})
    (site,) = report.with_status("taken")
    assert site.detail["strategy"] == chosen
