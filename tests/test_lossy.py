"""quantise_wo_a: a lossy step of its own; what is computed from its weights is exact."""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common, _strategies
from torch import nn
from torch.nn.utils import parametrize

import dsv4fuse
from dsv4fuse import Report, backend


class Grouped(nn.Module):
    """Two groups of 256 columns from 256 lanes, as transformers multiplies them."""

    def __init__(self) -> None:
        super().__init__()
        self.o_a_proj = nn.Linear(256, 512, bias=False)
        self.o_a_proj.n_groups = 2
        self.other = nn.Linear(256, 256, bias=False)

    def forward(self, x, cos, sin):
        """x ``[B,S,4,128]`` with a rotation ``[B,S,32]`` to be undone."""
        rot, sin = x[..., 64:].float(), -sin.unsqueeze(2)
        even, odd, cos = rot[..., 0::2], rot[..., 1::2], cos.unsqueeze(2)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
        x = torch.cat((x[..., :64], turned.to(x.dtype)), -1)
        w = self.o_a_proj.weight.view(2, -1, 256).transpose(1, 2)
        rows = x.reshape(-1, 2, 256).transpose(0, 1)
        return torch.bmm(rows, w).transpose(0, 1).reshape(*x.shape[:2], 2, -1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Grouped().bfloat16().requires_grad_(False)


def inputs():
    angle = torch.randn(2, 3, 32)
    return torch.randn(2, 3, 4, 128).bfloat16(), angle.cos(), angle.sin()


def size(model):
    return sum(t.nbytes for t in model.state_dict().values())


def test_error_and_memory_are_reported(model):
    before, bytes_, other = model.o_a_proj.weight.clone(), size(model), model.other.weight.clone()
    (made,) = dsv4fuse.quantise_wo_a(model)
    after = model.o_a_proj.weight
    assert after.dtype == torch.bfloat16 and torch.equal(model.other.weight, other)
    error = ((after.float() - before.float()).norm() / before.float().norm()).item()
    assert made.name == "o_a_proj" and made.error == pytest.approx(error)
    assert 0.01 < error < 0.04  # three bits of mantissa
    assert made.saved == bytes_ - size(model) == 512 * 256 - 8 * 4
    # Each block by its own scale: the largest of each is met to a rounding of bf16.
    blocks, exact = (w.float().view(4, 128, 2, 128).abs().amax((1, 3)) for w in (after, before))
    assert torch.allclose(blocks, exact, rtol=2.0**-8)


def test_blocks_of_outliers_do_not_spoil_the_others(model):
    with torch.no_grad():
        model.o_a_proj.weight[0, 0] = 1000.0
    before = model.o_a_proj.weight.float().clone()
    dsv4fuse.quantise_wo_a(model)
    off = (model.o_a_proj.weight.float() - before).abs()
    assert off[128:].max() <= before[128:].abs().max() * 2.0**-4


def test_the_fused_op_reads_the_codes(model, monkeypatch):
    monkeypatch.setattr(_common, "INTERPRETED", False)
    monkeypatch.setattr(_strategies, "measured", lambda _: {"rows": []})  # or else the faster way
    dsv4fuse.quantise_wo_a(model)
    given = inputs()
    options = {"select": "always", "inner": "eager", "expect": {"inv_rope_grouped_bmm": 1}}
    with torch.no_grad():
        wanted = model(*given)
        found = torch.compile(model, backend=backend.dsv4fuse, options=options)(*given)
    assert "(e4m3)" in Report.of(model).sites[0].reason
    step = torch.finfo(torch.bfloat16).eps * wanted.abs().amax(-1, keepdim=True)
    assert ((found - wanted).abs() <= 2 * step).all()


def test_new_weights_are_used_and_the_step_can_be_undone(model, monkeypatch):
    """No copy goes stale: what is stored is what is read."""
    monkeypatch.setattr(_common, "INTERPRETED", False)
    dsv4fuse.quantise_wo_a(model)
    given, options = inputs(), {"select": "always", "inner": "eager"}
    fused = torch.compile(model, backend=backend.dsv4fuse, options=options)
    with torch.no_grad():
        first = fused(*given)
        model.o_a_proj.weight = model.o_a_proj.weight * 2  # through the quantiser again
        assert torch.equal(fused(*given), first * 2)
        weight = model.o_a_proj.weight.clone()
        parametrize.remove_parametrizations(model.o_a_proj, "weight")
        assert torch.equal(model.o_a_proj.weight, weight)


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="No module of Grouped has a name like"):
        dsv4fuse.quantise_wo_a(model, "absent")
    with pytest.raises(ValueError, match="neither bf16 nor fp16"):
        dsv4fuse.quantise_wo_a(Grouped())
    dsv4fuse.quantise_wo_a(model)
    with pytest.raises(ValueError, match="parametrised"):
        dsv4fuse.quantise_wo_a(model)
