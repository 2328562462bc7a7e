"""Every op of drawn token counts and magnitudes, against its own reference on the same device.

The test of one kernel knows more of it; this one is held to by an op that was added a minute ago.
"""

from __future__ import annotations

import pytest
import torch
from dsv4fuse.kernels import _common as common
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4fuse import ops

from ._calls import calls
from ._kernels import DEVICE, GPU, MARKS, all_equal, all_near, drawn

pytestmark = MARKS
# No sum is made in another order than the reference's: every byte is the same.
BYTES = {"clamp_swiglu", "clamp_swiglu_quant", "indexer_q_quant", "inv_rope", "inv_rope_quant"}
# Beside two rounding steps of the first result, of a row's largest value: sums in fp32, mixes after
# 20 rounds of normalising, a code of e4m3.
SLACK = {"hyper_connection_pre": 3e-5, "hyper_connection_pre_norm": 3e-5, "hyper_head": 3e-5,
         "hyper_connection_post_pre_norm": 3e-5, "indexer_q": 1 / 8,
         "inv_rope_grouped_bmm": 1e-5, "inv_rope_grouped_bmm_": 1e-5,
         "grouped_bmm": 1e-5}  # fmt: skip
# Sharper than this a softmax hangs on which of two scores, rounded or not, is the larger.
SHARPEST = {"sink_attention": -2, "sparse_sink_attention": -2}
# Of equal scores each choice is right, and a row of one score may be a sum that cancels: how far
# off they may be hangs on their terms, and test_kernel_router.py and _indexer_logits.py ask that.
BY_TERMS = {"moe_router", "moe_router_hash", "indexer_logits"}
OPS = sorted(calls("cpu").keys() - BY_TERMS)


def _called(name: str, args: list[object], kwargs: dict[str, object]) -> list[Tensor]:
    """The results and then the arguments, of which some may be written."""
    found = getattr(ops, name)(*args, **kwargs)
    given = [a for a in args if isinstance(a, Tensor)]
    return [*([found] if isinstance(found, Tensor) else found), *given]


def _scaled(args: tuple[object, ...], tokens: int, size: float) -> list[object]:
    """Activations of another magnitude: what is bf16 and as long as there are tokens."""

    def is_activation(a: object) -> bool:
        return isinstance(a, Tensor) and a.dtype == torch.bfloat16 and tokens in a.shape

    return [a * size if is_activation(a) else a for a in args]  # type: ignore[operator]


def compare(name: str, tokens: int, power: int, seed: int) -> None:
    """The op at so many tokens, bf16 activations times 2**power, and its reference."""
    power = min(power, SHARPEST.get(name, power))
    torch.manual_seed(seed)
    args, kwargs = calls(DEVICE, tokens)[name]
    mine = _scaled(args, tokens, 2.0**power)
    theirs = [a.clone() if isinstance(a, Tensor) else a for a in mine]
    found = _called(name, mine, kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "use_reference", lambda _: True)
        wanted = _called(name, theirs, kwargs)
    if name in BYTES:
        all_equal(found, wanted)
    else:
        all_near(found, wanted, SLACK.get(name, 0.0))


@pytest.mark.parametrize("name", OPS)
@drawn(1)
@given(st.integers(1, 300 if GPU else 9), st.integers(-12, 8), st.integers(0, 999))
def test_as_the_reference(name, tokens, power, seed):
    compare(name, tokens, power, seed)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 127, 128, 129, 1000, 1500, 8192] if GPU else [1])
@pytest.mark.parametrize("name", OPS)
def test_token_counts(name, tokens):
    """In front of, at and behind the borders of blocks, and the longest of a prefill."""
    compare(name, tokens, 0, 0)
