"""The lightning indexer's scores as people write them, with the masks that follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import BF16, FP16, FP32, Case, Draw, plain

NAME = "indexer_logits"
B, S, T, H, D = 2, 5, 33, 4, 16
SCALE = 0.29  # no power of two
Fn = Callable[..., Any]


def inputs(
    *, q: tuple[int, ...] = (B, S, H, D), k: tuple[int, ...] = (B, T, D), w: Any = None,
    dtype: torch.dtype = BF16, weight: torch.dtype = FP32, bounds: int = 0,
) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
    def make() -> tuple[Tensor, ...]:
        draw = Draw()
        given = (draw(*q, dtype=dtype), draw(*k, dtype=dtype), draw(*(w or q[:-1]), dtype=weight))
        places = (torch.arange(S) % T + 1, torch.arange(S) // 2)
        return (*given, *(p.expand(B, S).clone() for p in places[:bounds]))

    return make


def _case(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    more = {"counts": {NAME: 1}, "exact": False} | more
    return Case(plain(fn), make or inputs(), parts=parts or ("Dots, relu, head sum",), **more)


# ---- pieces: dots [B, S, H, T], and the weighted sum over the heads ------------------------------


def dots(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bshd,btd->bsht", q.float(), k.float())


def total(scores: Tensor, w: Tensor) -> Tensor:
    return (scores * w.unsqueeze(-1)).sum(dim=2)


def hf(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1))
    return total(F.relu(scores) * SCALE, w)


def hf_weights(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """The head weights out of a projection, scaled in fp32."""
    return hf(q, k, x.float() * H**-0.5)


def reference(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    score = torch.einsum("bshd,btd->bsht", q, k)
    return (score.relu_() * w.unsqueeze(-1)).sum(dim=2)


def ours(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    found = torch.matmul(q.flatten(1, 2), k.transpose(1, 2)).float()
    found = F.relu(found).unflatten(1, (-1, H)) * SCALE
    return (found * w.unsqueeze(-1)).sum(dim=2)


def deepgemm(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Heads in front; keys that all queries share."""
    score = torch.einsum("mhd,nd->hmn", q.float(), k.float())
    return (score.relu() * w.unsqueeze(-1).transpose(0, 1)).sum(dim=0)


def heads_first(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = q.float() @ k.float().unsqueeze(1).mT
    return (scores.relu() * w.unsqueeze(-1)).sum(1)


def visible(mask: Fn, score: Fn = hf) -> Fn:
    """Scores and their mask, apart: a row that holds −inf has no scale to compare with."""

    def fn(q: Tensor, k: Tensor, w: Tensor, *bounds: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(k.shape[1], device=q.device)
        masked = mask(score(q, k, w), places, *(n.unsqueeze(-1) for n in bounds))
        hidden = masked == float("-inf")
        return hidden, masked.masked_fill(hidden, 0.0)

    return fn


def _future(s: Tensor, places: Tensor, n: Tensor) -> Tensor:
    return s.masked_fill(places >= n, float("-inf"))


INF = float("-inf")
MASKS: dict[str, Fn] = {  # with the end of the range; which every row has
    "future": _future,
    "hf": lambda s, p, n: s.masked_fill(p.view(1, 1, -1) >= n, INF),
    "where shown": lambda s, p, n: torch.where(p < n, s, INF),
    "where hidden": lambda s, p, n: torch.where(n <= p, INF, s),
    "last included": lambda s, p, n: torch.where(p > n, INF, s),
    "turned round": lambda s, p, n: torch.where(n > p, s, INF),
    "negated": lambda s, p, n: s.masked_fill(~(p < n), INF),
    "in place": lambda s, p, n: s.masked_fill_(torch.logical_not(p < n), INF),
    "from a start on": lambda s, p, n: s.masked_fill(p < n, INF),
    "int32": lambda s, p, n: s.masked_fill(p.int() >= n.int(), INF),
}
WINDOWS: dict[str, Fn] = {  # with both ends
    "window: and": lambda s, p, n, m: s.masked_fill(~((p >= m) & (p < n)), INF),
    "window: or": lambda s, p, n, m: s.masked_fill((p < m) | (p >= n), INF),
    "window: logical": lambda s, p, n, m: torch.where(torch.logical_and(p >= m, p < n), s, INF),
}
SPELLINGS: dict[str, Case] = {
    "hf": _case(hf),
    "hf, weights scaled": _case(hf_weights, inputs(weight=BF16)),
    "reference": _case(reference, inputs(weight=BF16), "head sum (every)"),
    "ours": _case(ours, None, "head sum (dot)"),
    "deepgemm": _case(deepgemm, inputs(q=(S, H, D), k=(T, D))),
    "heads first": _case(heads_first, inputs(q=(B, H, S, D))),
    "keys of all batches": _case(
        lambda q, k, w: total(torch.einsum("bshd,td->bsht", q.float(), k.float()).relu(), w),
        inputs(k=(T, D)),
    ),
    "scaled first": _case(lambda q, k, w: total(F.relu(dots(q, k) * SCALE), w)),
    "not scaled": _case(lambda q, k, w: total(dots(q, k).relu(), w)),
    "scaled behind": _case(lambda q, k, w: total(dots(q, k).relu(), w) * SCALE),
    "q scaled": _case(lambda q, k, w: total(dots(q.float() * SCALE, k).relu(), w)),
    "clamp": _case(lambda q, k, w: total(dots(q, k).clamp(min=0), w)),
    "clamp_min": _case(lambda q, k, w: total(dots(q, k).clamp_min(0.0), w)),
    "clamp, in bf16": _case(
        lambda q, k, w: total((q @ k.mT.unsqueeze(1)).clamp(min=0), w), inputs(weight=BF16)
    ),
    "maximum": _case(
        lambda q, k, w: total(torch.maximum(dots(q, k), torch.zeros(())), w)
    ),
    "heads by einsum": _case(lambda q, k, w: torch.einsum("bsht,bsh->bst", dots(q, k).relu(), w)),
    "heads by matmul": _case(lambda q, k, w: (w.unsqueeze(-2) @ dots(q, k).relu()).squeeze(-2)),
    "heads by a product on the left": _case(
        lambda q, k, w: (w[..., None] * dots(q, k).relu()).sum(-2)
    ),
    "rounded dots, fp32 weights": _case(
        lambda q, k, w: total(torch.einsum("bshd,btd->bsht", q, k).relu(), w), None, "(dot)"
    ),
    "reference, scaled": _case(
        lambda q, k, w: total(torch.einsum("bshd,btd->bsht", q, k).relu() * SCALE, w),
        inputs(weight=BF16),
        "(every)",
    ),
    "fp32": _case(hf, inputs(dtype=FP32)),
    "fp16": _case(reference, inputs(dtype=FP16, weight=FP16), "(every)"),
    "fp8": _case(
        lambda q, k, w: hf(q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn), w),
        inputs(q=(B, S, H, 32), k=(B, T, 32)),
    ),
    "one sequence": _case(hf, inputs(q=(1, S, H, D), k=(1, T, D))),
    "one token": _case(hf, inputs(q=(B, 1, H, D))),
    "one of each": _case(hf, inputs(q=(1, 1, H, D), k=(1, T, D))),
    "six heads": _case(hf, inputs(q=(B, S, 6, D))),
    "dynamic": _case(hf, dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    "dynamic mask": _case(
        visible(_future), inputs(bounds=1), "→ mask as a range",
        dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1), 3: (0, 1)},
    ),
    "other readers": _case(
        lambda q, k, w: (lambda s, t: (s, t.amax(-1), s.mean(-1)))(hf(q, k, w), dots(q, k)),
    ),
    "masked and not": _case(
        lambda q, k, w, n: (lambda s: (s, *visible(_future, lambda *_: s)(q, k, w, n)))(
            hf(q, k, w)
        ),
        inputs(bounds=1),
        absent=("range",),
    ),
}  # fmt: skip
SPELLINGS |= {
    f"mask: {name}": _case(visible(mask), inputs(bounds=1), "→ mask as a range")
    for name, mask in MASKS.items()
}
SPELLINGS |= {
    name: _case(visible(mask), inputs(bounds=2), "→ mask as a range")
    for name, mask in WINDOWS.items()
}
SPELLINGS["mask: of the reference"] = _case(
    visible(_future, reference), inputs(weight=BF16, bounds=1), "(every) → mask as a range"
)


# ---- a scale for each key, as fp8 ones have it ---------------------------------------------------


def key_scales(*shape: int, **more: Any) -> Callable[[], tuple[Tensor, ...]]:
    """The inputs and scales of either sign: behind relu, a negative one is another function."""
    make = inputs(**{"q": (B, S, H, 32), "k": (B, T, 32)} | more)

    def with_scales() -> tuple[Tensor, ...]:
        q, k, *rest = make()
        fp8 = torch.float8_e4m3fn
        return q.to(fp8), k.to(fp8), *rest, Draw(1)(*(shape or (B, T)), dtype=FP32)

    return with_scales


def narrow_dots(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bshd,btd->bsht", q.to(BF16), k.to(BF16)).float()


def of_dots(q: Tensor, k: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return total((dots(q, k) * s[:, None, None]).relu(), w)


def of_sum(q: Tensor, k: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return total(dots(q, k).relu(), w) * s[:, None]


def _shown(q: Tensor, k: Tensor, w: Tensor, n: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return visible(_future, lambda q, k, w: of_sum(q, k, w, s))(q, k, w, n)


OF_DOTS, OF_SUM = "Dots, scales of keys, relu", "→ scales of keys"
SPELLINGS |= {
    "keys scaled": _case(of_dots, key_scales(), OF_DOTS, "(once)"),
    "keys scaled, rounded dots": _case(
        lambda q, k, w, s: total((s[:, None, None] * narrow_dots(q, k)).relu(), w),
        key_scales(), OF_DOTS, "(dot)",
    ),
    "keys scaled, a number behind": _case(
        lambda q, k, w, s: total((dots(q, k) * s[:, None, None]).relu() * SCALE, w),
        key_scales(), OF_DOTS,
    ),
    "keys of all batches scaled": _case(
        lambda q, k, w, s: total(
            (torch.einsum("bshd,td->bsht", q.float(), k.float()) * s).relu(), w
        ),
        key_scales(T, k=(T, 32)), OF_DOTS,
    ),
    "one sequence, keys scaled, scales in a column": _case(
        lambda q, k, w, s: (
            (torch.einsum("mhd,nd->hmn", q.float(), k.float()) * s.reshape(-1)).relu()
            * w.unsqueeze(-1).transpose(0, 1)
        ).sum(dim=0),
        key_scales(T, 1, q=(S, H, 32), k=(T, 32)), OF_DOTS,
    ),
    "sums scaled": _case(of_sum, key_scales(), OF_SUM),
    "sums scaled and masked": _case(
        _shown, key_scales(bounds=1), OF_SUM + " → mask as a range"
    ),
    "keys scaled, dynamic": _case(
        of_dots, key_scales(), OF_DOTS, dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1), 3: (0, 1)}
    ),
}  # fmt: skip


def _edit(fn: Fn, **more: Any) -> Case:
    case = _case(fn, **{"counts": {}, "like": SPELLINGS["not scaled"], "exact": True} | more)
    return replace(case, parts=())


def _mask_edit(mask: Fn, bounds: int = 1, like: str = "mask: future") -> Case:
    """The scores are taken all the same, the mask stays where it is."""
    return _case(visible(mask), inputs(bounds=bounds), absent=("range",), like=SPELLINGS[like])


MUTANTS: dict[str, Case] = {
    "no relu": _edit(lambda q, k, w: total(dots(q, k), w)),
    "another function": _edit(lambda q, k, w: total(F.gelu(dots(q, k)), w), exact=False),
    "leaky": _edit(lambda q, k, w: total(F.leaky_relu(dots(q, k), 0.1), w)),
    "clamped above": _edit(lambda q, k, w: total(dots(q, k).clamp(max=0), w)),
    "clamped at one": _edit(lambda q, k, w: total(dots(q, k).clamp(min=1.0), w)),
    "absolute value": _edit(lambda q, k, w: total(dots(q, k).abs(), w)),
    "relu behind the weights": _edit(lambda q, k, w: (dots(q, k) * w[..., None]).relu().sum(2)),
    "relu behind the sum": _edit(lambda q, k, w: total(dots(q, k), w).relu()),
    "relu of the weights": _edit(lambda q, k, w: total(dots(q, k), w.relu())),
    "relu twice": _edit(lambda q, k, w: total(dots(q, k).relu() - 1.0, w).relu()),
    "biased": _edit(lambda q, k, w: total((dots(q, k) + 0.5).relu(), w)),
    "negative scale first": _edit(lambda q, k, w: total((dots(q, k) * -SCALE).relu(), w)),
    "squared": _edit(lambda q, k, w: total(dots(q, k).relu().square(), w)),
    "mean over heads": _edit(lambda q, k, w: (dots(q, k).relu() * w[..., None]).mean(2)),
    "largest head": _edit(lambda q, k, w: (dots(q, k).relu() * w[..., None]).amax(2)),
    "rounded in between": _edit(
        lambda q, k, w: total((dots(q, k).bfloat16().relu() * SCALE).float(), w)
    ),
    "rounded terms": _edit(
        lambda q, k, w: (dots(q, k).relu() * w[..., None]).bfloat16().float().sum(2)
    ),
    "weights of the keys": _edit(
        lambda q, k, w: (dots(q, k).relu() * k.float()[:, None, None, :, 0]).sum(2)
    ),
    "weights of other heads": _edit(
        lambda q, k, w: (dots(q, k).relu() * w.roll(1, -1)[..., None]).sum(2),
        counts={NAME: 1}, exact=False,
    ),
    "summed over the keys": _edit(lambda q, k, w: (dots(q, k).relu() * w[..., None]).sum(3)),
    "fp64": _edit(lambda q, k, w: total(dots(q.double(), k.double()).double().relu(), w)),
    "mask: counts from one": _mask_edit(
        lambda s, p, n: s.masked_fill(torch.arange(1, T + 1) >= n, INF)
    ),
    "mask: every other key": _mask_edit(
        lambda s, p, n: s.masked_fill(torch.arange(0, 2 * T, 2) >= n, INF)
    ),
    "mask: a number, not −inf": _mask_edit(lambda s, p, n: s.masked_fill(p >= n, -3.0)),
    "mask: plus infinity": _mask_edit(lambda s, p, n: s.masked_fill(p >= n, -INF)),
    "mask: either end": _mask_edit(
        lambda s, p, n, m: s.masked_fill(~((p >= m) | (p < n - 3)), INF), 2, "window: and"
    ),
    "mask: outside the window": _mask_edit(
        lambda s, p, n, m: s.masked_fill((p >= m) & (p < n), INF), 2, "window: and"
    ),
    "mask: equal": _mask_edit(lambda s, p, n: s.masked_fill(p == n, INF)),
    "mask: of the scores": _mask_edit(lambda s, p, n: s.masked_fill(s.long() >= n, INF)),
}  # fmt: skip


def _scale_edit(fn: Fn, make: Fn, like: str = "keys scaled", **more: Any) -> Case:
    """One that no kernel's scale is: at most the sums are taken, and the scale stays outside."""
    more = {"counts": {}, "exact": True, "absent": ("scales of keys",)} | more
    return replace(_case(fn, make, like=SPELLINGS[like], **more), parts=())


TAKEN = {"counts": {NAME: 1}, "exact": False}
MUTANTS |= {
    "keys scaled behind relu": _scale_edit(
        lambda q, k, w, s: total(dots(q, k).relu() * s[:, None, None], w), key_scales()
    ),
    "queries scaled": _scale_edit(
        lambda q, k, w, s: total((dots(q, k) * s[:, :S, None, None]).relu(), w), key_scales()
    ),
    "keys scaled for each head": _scale_edit(
        lambda q, k, w, s: total((dots(q, k) * s[:, None]).relu(), w), key_scales(B, H, T)
    ),
    "keys scaled by their square": _scale_edit(
        lambda q, k, w, s: total((dots(q, k) * s[:, None, None] * s[:, None, None]).relu(), w),
        key_scales(),
    ),
    "keys shifted": _scale_edit(
        lambda q, k, w, s: total((dots(q, k) + s[:, None, None]).relu(), w), key_scales()
    ),
    "scaled dots rounded": _scale_edit(
        lambda q, k, w, s: total(
            (dots(q, k) * s[:, None, None]).to(BF16).float().relu(), w
        ),
        key_scales(),
    ),
    "sums scaled by the query": _scale_edit(
        lambda q, k, w, s: total(dots(q, k).relu(), w) * s[:, :S, None],
        key_scales(), "sums scaled", **TAKEN,
    ),
    "sums shifted by the key": _scale_edit(
        lambda q, k, w, s: total(dots(q, k).relu(), w) + s[:, None],
        key_scales(), "sums scaled", **TAKEN,
    ),
    "sums times themselves": _scale_edit(
        lambda q, k, w, s: (lambda t: t * t)(total(dots(q, k).relu(), w)),
        key_scales(), "sums scaled", **TAKEN,
    ),
    "sums scaled for each query and key": _scale_edit(
        lambda q, k, w, s: total(dots(q, k).relu(), w) * s,
        key_scales(B, S, T), "sums scaled", **TAKEN,
    ),
}  # fmt: skip
KNOWN_MISSES: dict[str, Case] = {
    "one head": _case(hf, inputs(q=(B, S, 1, D)), why="a sum over one head is none in the terms"),
    "one key": _case(hf, inputs(k=(B, 1, D)), why="an axis of one key is none in the terms"),
    "mask: added": _case(
        visible(lambda s, p, n: s + torch.where(p >= n, INF, 0.0)),
        inputs(bounds=1),
        "as a range",
        why="0 is added to what is shown; the mask stays outside",
    ),
    "scaled in the sum": _case(
        lambda q, k, w: (dots(q, k).relu() * w[..., None] * SCALE).sum(2),
        why="a scale behind the weights rounds elsewhere than one in front of them",
    ),
}
