"""Parts of a tensor that are joined again are read as the tensor; others never are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .test_maps import check

X = torch.arange(4 * 6 * 8).view(4, 6, 8)
BEFORE = {
    "nothing": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "merged": lambda x: x.flatten(0, 1),
    "apart": lambda x: x.unflatten(-1, (2, 4)),
    "a part": lambda x: x[1:, :, 2:],
}
CUTS = {
    "halves": lambda x, axis: x.chunk(2, axis),
    "uneven": lambda x, axis: x.split([1, x.shape[axis] - 1], axis),
    "units": lambda x, axis: x.split(1, axis),
    "slices": lambda x, axis: (x.narrow(axis, 0, 1), x.narrow(axis, 1, x.shape[axis] - 1)),
}
BEHIND = {
    "nothing": lambda y: y,
    "flat": lambda y: y.reshape(-1),
    "moved": lambda y: y.movedim(-1, 0),
    "a part": lambda y: y[1:2],
}


@given(
    st.sampled_from(list(BEFORE)), st.sampled_from(list(CUTS)), st.sampled_from(list(BEHIND)),
    st.integers(0, 1), st.booleans(),
)  # fmt: skip
def test_in_their_order_they_are_the_tensor(before, cut, behind, axis, stacked):
    def fn(x):
        x = BEFORE[before](x)
        if stacked:
            return BEHIND[behind](torch.stack(x.unbind(axis), axis)).clone()
        return BEHIND[behind](torch.cat(CUTS[cut](x, axis), axis)).clone()

    # A cut of merged axes inside one of them is no view that the maps express.
    inside = before == "merged" and cut in ("uneven", "slices") and axis == 0 and not stacked
    assert check(fn, X, X, symbolic=False) or inside


@pytest.mark.parametrize(
    "parts",
    [
        lambda x: x.chunk(2, 0)[::-1],
        lambda x: (x[:2], x[3:]),
        lambda x: (x[:2], x[1:]),
        lambda x: (x[:2], x[2:].flip(1)),
        lambda x: (x[:2], x[2:].transpose(0, 1).reshape(2, 6, 8)),
        lambda x: (x[:2], (x * 1)[2:]),
        lambda x: x.split(1)[::-1],
        lambda x: (x[:1], x[1:2], x[3:]),
    ],
)
def test_others_are_not(parts):
    assert not check(lambda x: torch.cat(parts(x)).clone(), X, X, symbolic=False)


@pytest.mark.parametrize(
    "parts",
    [
        lambda x: (x[1:2], x[2:4]),
        lambda x: (x[:2], x[:2]),
        lambda x: (x[::2], x[1::2]),
    ],
    ids=["a run", "twice", "even and odd"],
)
def test_no_whole_tensor_but_a_view_of_it(parts):
    assert check(lambda x: torch.cat(parts(x)).clone(), X, X, symbolic=False)
