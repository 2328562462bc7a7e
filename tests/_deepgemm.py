"""DeepGEMM's place in ``transformers`` taken by plain PyTorch, for a machine without that library.

``transformers`` fetches DeepGEMM's kernels when an fp8 linear first runs. Here the same bundle
holds its cast of rows, written anew from the public form and traced as the original is, and matrix
products that are one opaque operation each, as the original's are. An fp8 linear then is what it is
on a Hopper GPU: the cast in plain operations, and a product that reads codes and scales.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

FP8, MAX, BLOCK = torch.float8_e4m3fn, 448.0, 128
ALIGNMENT = 8  # rows of an expert; 128 there


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool = False, gran_k: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """x ``[T, N]`` to codes ``[T, N]`` and fp32 scales ``[T, N / gran_k]``, as on Hopper."""
    assert not use_ue8m0 and x.dim() == 2
    m, n = x.shape
    padded = (n + gran_k - 1) // gran_k * gran_k
    room = torch.empty((m, padded), dtype=x.dtype, device=x.device).fill_(0)
    room[:, :n] = x
    blocks = room.view(m, padded // gran_k, gran_k)
    scale = blocks.abs().float().amax(dim=2).view(m, padded // gran_k).clamp(1e-4) / MAX
    codes = (blocks * (1.0 / scale.unsqueeze(2))).to(FP8).view(m, padded)[:, :n].contiguous()
    return codes, scale


def _wide(codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    """Codes ``[.., N, K]`` times the scales of their blocks of ``rows`` × 128."""
    spread = scales.repeat_interleave(rows, -2)[..., : codes.shape[-2], :]
    return codes.float() * spread.repeat_interleave(BLOCK, -1)[..., : codes.shape[-1]]


@torch.library.custom_op("dsv4fuse_tests::fp8_gemm_nt", mutates_args=("out",))
def fp8_gemm_nt(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> None:
    """out ``[T, N]`` = a ``[T, K]`` times b ``[N, K]``, each with its scales."""
    out.copy_(_wide(a, a_scale, 1) @ _wide(b, b_scale, BLOCK).t())


@torch.library.custom_op("dsv4fuse_tests::fp8_grouped_gemm_nt", mutates_args=("out",))
def fp8_grouped_gemm_nt(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, expert: Tensor
) -> None:
    """The same with b ``[E, N, K]`` by each row's expert; rows of expert −1 are nobody's."""
    weights = _wide(b, b_scale, BLOCK)
    out.zero_()
    for e in range(b.shape[0]):
        mine = (expert == e).nonzero().flatten()
        out[mine] = (_wide(a[mine], a_scale[mine], 1) @ weights[e].t()).to(out.dtype)


@torch.library.custom_op("dsv4fuse_tests::fp8_groups", mutates_args=())
def fp8_groups(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x ``[G · T, K]`` of G groups, weight ``[G, N, K]``: quantised inside, as the Triton kernel
    does that ``transformers`` calls for the grouped output projection."""
    rows = _wide(*per_token_cast_to_fp8(x), 1).unflatten(0, (weight.shape[0], -1))
    return (rows @ _wide(weight, scale.float(), BLOCK).mT).flatten(0, 1).to(x.dtype)


@fp8_groups.register_fake
def _(x, weight, scale):
    return x.new_empty(x.shape[0], weight.shape[1])


def _matmul(a: Any, b: Any, out: Tensor, recipe: Any = None) -> None:
    fp8_gemm_nt(*a, *b, out)


def _grouped_matmul(
    a: Any, b: Any, out: Tensor, layout: Tensor, recipe: Any = None, use_psum_layout: bool = False
) -> None:
    fp8_grouped_gemm_nt(*a, *b, out, layout)


def _groups(x: Tensor, weight: Tensor, scale: Tensor, **_: Any) -> Tensor:
    return fp8_groups(x, weight, scale.view(weight.shape[0], -1, scale.shape[-1]))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the places where ``transformers`` keeps what it has loaded."""
    deepgemm = pytest.importorskip("transformers.integrations.deepgemm")
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    names = dict.fromkeys(deepgemm.DeepGEMM.__dataclass_fields__)
    bundle = names | dict(
        fp8_fp4_matmul=_matmul, grouped_fp8_fp4_matmul_nt=_grouped_matmul,
        per_token_cast_to_fp8=per_token_cast_to_fp8, m_alignment=ALIGNMENT,
    )  # fmt: skip
    monkeypatch.setattr(deepgemm, "_DEEPGEMM", deepgemm.DeepGEMM(**bundle))
    triton = finegrained.FineGrainedFP8(None, None, _groups)
    monkeypatch.setattr(finegrained, "_FINEGRAINED_FP8", triton)
    for name, answer in (("is_deepgemm_loadable", True), ("is_sm100", False)):
        constant = torch._dynamo.assume_constant_result(lambda answer=answer: answer)
        for module in (deepgemm, finegrained):
            monkeypatch.setattr(module, name, constant)
