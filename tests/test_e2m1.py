"""fp4 (e2m1): the atom against its definition, and which functions are taken for it."""

from __future__ import annotations

import ml_dtypes
import pytest
import torch
from torch import Tensor

from dsv4fuse import atoms, e2m1, recorded
from dsv4fuse.scene import Scene
from dsv4fuse.terms import Term

from ._bits import BF16, FP16, FP32, every, same_bits, specials
from .spellings import _fp4


def by_definition(v: Tensor, form: str) -> Tensor:
    """The cast of another library, which keeps zeros' signs and has no NaN to give."""
    wide = v.nan_to_num(0.0, posinf=6.0, neginf=-6.0).double().clamp(-6, 6)
    q = torch.from_numpy(wide.numpy().astype(ml_dtypes.float4_e2m1fn).astype("float32"))
    zeros, _, nan = form.partition(" ")
    unsigned = (v == 0) if zeros == "turned" else (q == 0) & (zeros == "plain")
    q = torch.where(unsigned, 0.0, q)
    return torch.where(v.isnan(), float(nan or "nan"), q)


@pytest.mark.parametrize("form", atoms.E2M1)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_the_atom(form, dtype):
    v = (specials(dtype) if dtype is FP32 else every(dtype)).float()
    v = v[~v.isnan() | ~v.signbit()]  # the sign of a NaN is nobody's
    same_bits(atoms.e2m1(v, form=form), by_definition(v, form))


def _read(code: _fp4.Piece, dtype: torch.dtype = BF16) -> set[str]:
    """The forms that a rounding is read as."""
    graph = recorded.graph(lambda x: _fp4.fake(x, 32, code=code), [((7, 64), dtype)])
    scene = Scene(graph)
    term = scene.low.term(next(n for n in graph.nodes if n.op == "output").args[0])
    assert isinstance(term, Term)
    found = [t for t in e2m1._inner(term) if t.op == "e2m1"]
    return {atoms.E2M1[int(t.args[1].args[0])] for t in found}


@pytest.mark.parametrize("form", atoms.E2M1)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_each_form_is_read_as_itself(form, dtype):
    assert _read(lambda v: atoms.e2m1(v, form=form), dtype) == {form}


def test_an_fp32_value_is_not_tried():
    assert _read(_fp4.by_where, FP32) == set()


@pytest.mark.parametrize("value", [2.015625, -0.2490234375, 5.03125, -4.96875, 2.0**-100])
def test_one_value_off(value):
    """Values of bf16 that are neither codes nor midpoints, and only the full run shows."""
    assert value not in e2m1.FEW

    def code(v: Tensor) -> Tensor:
        return torch.where(v == value, 1.5, _fp4.by_where(v))

    assert _read(_fp4.by_where) == {"turned 6"} and _read(code) == set()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_value_is_run(dtype):
    v = e2m1.every(dtype)
    assert set(every(dtype).float().nan_to_num(9e9).tolist()) <= set(v.nan_to_num(9e9).tolist())


def test_a_factor_that_rounds_is_no_sign():
    """g·(f·s) is (g·f)·s for a sign g, and not where f·s may round or overflow."""

    def fake(x: Tensor, g: _fp4.Piece, f: _fp4.Piece) -> Tensor:
        return _fp4.fake(x, 32, code=lambda v: v, back=lambda v, s: g(v) * (f(v) * s))

    half = (lambda v: torch.full_like(v, 0.5) + 0 * v, lambda v: 2 * _fp4.by_where(v))
    sign = (torch.sign, lambda v: _fp4.by_where(v.abs()))
    for (g, f), forms in ((half, 0), (sign, 1)):
        graph = recorded.graph(lambda x, g=g, f=f: fake(x, g, f), [((7, 64), BF16)])
        term = Scene(graph).low.term(next(n for n in graph.nodes if n.op == "output").args[0])
        assert isinstance(term, Term)
        assert len([t for t in e2m1._inner(term) if t.op == "e2m1"]) == forms
