"""The router of a mixture of experts: scores → choice → weights of the chosen.

Math     ``s = func(logits)``; the ``top_k`` experts with the largest ``s + bias``, or for
         ``moe_router_hash`` those that the row of ``table`` for a token's id names; then
         ``w = s[chosen]``, ``w / (sum(w) + eps) * scale`` (``bounded``: over max(sum(w), eps);
         without ``normalise``: ``w * scale``). func is a key of ``FUNCS``.
Shapes   logits ``[T,E]``, bias ``[E]`` or None, table ``[V,K]``, ids ``[T]`` (with a table
         the logits may have more rows); weights ``[T,K]``, experts ``[T,K]`` int64.
         ``1 ≤ K ≤ 16``, ``K ≤ E ≤ 4096``.
Dtypes   logits, bias any of bf16, fp16, fp32; ``scores``, ``sums``, ``out`` the dtypes of s, of the
         arithmetic on w, and of the result; table and ids int32 or int64.
Strides  any; weights and experts are dense.
Rounding softplus and its root, the sum with the bias, the sum of w (whose order hangs on the
         launch), its sum with eps, the quotient and the product each round to their dtype, as eager
         does. exp, log1p, sqrt and the divisions give ATen's bits on CUDA, subnormal results
         included: so distinct s + bias choose what ``torch.topk`` chooses (for softmax up to the
         order of a sum).
         ``precise`` concerns the weights: fp32 from the logits to the one store. The choice is
         the module's in either case.
Order    ``ordered``: by falling ``s + bias``. Otherwise as torch.topk(sorted=False) leaves it on
         CUDA: ascending experts, those equal to the least one chosen last. Among equals the
         lowest expert comes first, which torch.topk does not promise. NaN counts as largest.
Ids      A negative id counts from the end of the table. Where an id is not in the table, or an
         expert of it not below E, eager raises; here the weights of that token are NaN.
Source   ATOM and vLLM route in one launch too; DeepSeek's reference, ``Gate``.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dsv4fuse import atoms

from . import _common as common
from ._common import Config
from ._launch import wrap_triton
from ._router import DTYPES, FUNCS, moe_router_kernel

# One warp per program: the maxima over a row are then single redux instructions, no barrier.
CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (4096, Config(rows=1, warps=1)),
    (None, Config(rows=2, warps=1)),
)
HASH_CONFIGS: tuple[tuple[int | None, Config], ...] = (
    (64, Config(rows=1, warps=1)),
    (1024, Config(rows=4, warps=4)),
    (None, Config(rows=16, warps=4)),
)


def blocks(experts: int) -> tuple[int, int]:
    """Two powers of two that together hold a row: the largest in it, and the rest."""
    block = 1 << (experts.bit_length() - 1)
    return block, triton.next_power_of_2(experts - block) if experts > block else 0


def _check(logits: Tensor, func: str, *dtypes: torch.dtype) -> None:
    common.require(logits.dim() == 2, "logits must be [T, E]")
    common.require(logits.dtype in common.FLOATS, "logits must be bf16, fp16 or fp32")
    common.require(func in FUNCS, f"no score function {func!r} here")
    common.require(all(d in DTYPES for d in dtypes), "scores and weights are bf16, fp16 or fp32")
    common.require(
        dtypes[0] == torch.float32 or func in ("sigmoid", "softmax", "sqrt_softplus"),
        f"{func} is computed in fp32 only",
    )


def _check_bias(logits: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        common.require(bias.shape == logits.shape[1:], "bias must be [E]")
        common.require(bias.dtype in common.FLOATS, "bias must be bf16, fp16 or fp32")
        common.require(bias.stride(0) == 1, "bias must be dense")


def _check_table(logits: Tensor, table: Tensor, ids: Tensor) -> None:
    common.require(table.dim() == 2 and ids.dim() == 1, "table must be [V, K] and ids [T]")
    short = isinstance(ids.shape[0] - logits.shape[0], int) and ids.shape[0] > logits.shape[0]
    common.require(not short, "there are more ids than rows of logits")
    integers = (torch.int32, torch.int64)
    common.require(table.dtype in integers and ids.dtype in integers, "ids must be integers")


def _launch(
    logits: Tensor, bias: Tensor | None, table: Tensor | None, ids: Tensor | None, top_k: int, *,
    func: str, scores: torch.dtype, sums: torch.dtype, out: torch.dtype, normalise: bool,
    eps: float, bounded: bool, scale: float, precise: bool, ordered: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens = logits.shape[0] if ids is None else ids.shape[0]
    experts = logits.shape[1]
    common.require_static(experts=experts, top_k=top_k)
    common.require(1 <= top_k <= min(16, experts), f"{top_k} of {experts} experts are not 1 to 16")
    common.require(experts <= 4096, f"{experts} experts are more than 4096")
    weights, chosen = _empty(logits, tokens, top_k, out)
    block, tail = blocks(experts)
    config = common.launch_config(CONFIGS if ids is None else HASH_CONFIGS, tokens)
    table_strides = (0, 0) if table is None else common.strides(table)
    choice = scores if bias is None else torch.promote_types(scores, bias.dtype)
    wrap_triton(moe_router_kernel)[(common.cdiv(tokens, config.rows),)](
        logits, logits if bias is None else bias, chosen if table is None else table,
        chosen if ids is None else ids, weights, chosen, tokens,
        0 if table is None else table.shape[0], *common.strides(logits), *table_strides,
        0 if ids is None else common.strides(ids)[0],
        E=experts, BLOCK=block, TAIL=tail, K=top_k, KP=triton.next_power_of_2(top_k),
        ROWS=config.rows, FUNC=FUNCS[func], HASH=ids is not None, HAS_BIAS=bias is not None,
        ORDERED=ordered, SD=DTYPES[scores], BD=DTYPES[choice], WD=DTYPES[sums],
        NORMALISE=normalise, EPS=eps, BOUNDED=bounded, SCALE=scale, PRECISE=precise,
        num_warps=config.warps,
    )  # fmt: skip
    return weights, chosen


def _empty(
    logits: Tensor, tokens: int | torch.SymInt, top_k: int, out: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (tokens, top_k)
    return logits.new_empty(shape, dtype=out), logits.new_empty(shape, dtype=torch.int64)


def _weights(
    logits: Tensor, chosen: Tensor, *, func: str, scores: torch.dtype, sums: torch.dtype,
    out: torch.dtype, normalise: bool, eps: float, bounded: bool, scale: float, precise: bool,
) -> Tensor:  # fmt: skip
    """The weights of the chosen experts in plain PyTorch."""
    if precise:
        scores = sums = torch.float32
        func = func if func in ("sigmoid", "softmax") else "sqrt_stable"
    s = atoms.router_scores(logits, None, func=func, wide=scores != logits.dtype)
    return atoms.router_weights(
        s.gather(1, chosen), eps=eps, scale=scale, bounded=bounded, sums=sums, out=out,
        normalise=normalise,
    ).contiguous()  # fmt: skip


def reference(
    logits: Tensor, bias: Tensor | None, *, top_k: int, func: str, scores: torch.dtype,
    ordered: bool = True, **weights: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``moe_router`` in plain PyTorch."""
    s = atoms.router_scores(logits, bias, func=func, wide=scores != logits.dtype)
    chosen = s.topk(top_k, dim=-1, sorted=ordered).indices
    return _weights(logits, chosen, func=func, scores=scores, **weights), chosen  # type: ignore


def reference_hash(
    logits: Tensor, table: Tensor, ids: Tensor, **weights: object
) -> tuple[Tensor, Tensor]:
    """``moe_router_hash`` in plain PyTorch."""
    chosen = table[ids].long()
    return _weights(logits, chosen, **weights), chosen  # type: ignore[arg-type]


@torch.library.triton_op("dsv4fuse::moe_router", mutates_args=())
def moe_router(
    logits: Tensor, bias: Tensor | None, *, top_k: int, func: str, scores: torch.dtype,
    sums: torch.dtype, out: torch.dtype, normalise: bool = True, eps: float = 0.0,
    bounded: bool = False, scale: float = 1.0, ordered: bool = True, precise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights and experts by biased score, ``[T,K]`` each: see the module's docstring."""
    _check(logits, func, scores, sums, out)
    _check_bias(logits, bias)
    kw = dict(func=func, scores=scores, sums=sums, out=out, normalise=normalise, eps=eps,
              bounded=bounded, scale=scale, ordered=ordered, precise=precise)  # fmt: skip
    if common.use_reference(logits):
        return reference(logits, bias, top_k=top_k, **kw)
    return _launch(logits, bias, None, None, top_k, **kw)  # type: ignore[arg-type]


@moe_router.register_fake
def _(logits, bias, *, top_k, func, scores, sums, out, **_):
    _check(logits, func, scores, sums, out)
    _check_bias(logits, bias)
    return _empty(logits, logits.shape[0], top_k, out)


@torch.library.triton_op("dsv4fuse::moe_router_hash", mutates_args=())
def moe_router_hash(
    logits: Tensor, table: Tensor, ids: Tensor, *, func: str, scores: torch.dtype,
    sums: torch.dtype, out: torch.dtype, normalise: bool = True, eps: float = 0.0,
    bounded: bool = False, scale: float = 1.0, precise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights and experts by token id, ``[T,K]`` each: see the module's docstring."""
    _check(logits, func, scores, sums, out)
    _check_table(logits, table, ids)
    kw = dict(func=func, scores=scores, sums=sums, out=out, normalise=normalise, eps=eps,
              bounded=bounded, scale=scale, precise=precise)  # fmt: skip
    if common.use_reference(logits):
        return reference_hash(logits, table, ids, **kw)
    return _launch(logits, None, table, ids, table.shape[-1], **kw)  # type: ignore[arg-type]


@moe_router_hash.register_fake
def _(logits, table, ids, *, func, scores, sums, out, **_):
    _check(logits, func, scores, sums, out)
    _check_table(logits, table, ids)
    return _empty(logits, ids.shape[0], table.shape[-1], out)


def traffic(logits: Tensor, bias: Tensor | None, *outputs: Tensor) -> int:
    """Bytes that must move: every logit once, every output once."""
    return common.nbytes(logits, bias, *outputs)
