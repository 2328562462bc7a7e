"""The router: scores → choice → weights, spelled and misspelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._case import BF16, FP16, FP32, Case, Draw, plain

NAME = "moe_router"
E, K, VOCAB, SCALE = 24, 6, 50, 1.7


# ---- the three sources -------------------------------------------------------------------------


class Transformers(nn.Module):
    """Everything in the logits' dtype, but for a bias that stays fp32."""

    def __init__(self, dtype: torch.dtype = BF16, bias: torch.dtype = FP32, by_hash: bool = False):
        super().__init__()
        draw = Draw(3)
        self.by_hash = by_hash
        self.weight = nn.Parameter(draw(E, 16, dtype=dtype), requires_grad=False)
        self.e_score_correction_bias = nn.Buffer(draw(E, dtype=bias))
        self.tid2eid = nn.Buffer(_table())

    def forward(self, hidden: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
        logits = F.linear(hidden.reshape(-1, 16), self.weight)
        scores = F.softplus(logits).sqrt()
        if self.by_hash:
            indices = self.tid2eid[input_ids.reshape(-1)].long()
        else:
            biased = scores + self.e_score_correction_bias
            indices = torch.topk(biased, K, dim=-1, sorted=False).indices
        weights = scores.gather(1, indices)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * SCALE, indices


class Reference(nn.Module):
    """DeepSeek's ``Gate``: fp32 throughout, the weights normalised in place but for softmax."""

    def __init__(self, func: str = "sqrtsoftplus", by_hash: bool = False):
        super().__init__()
        draw = Draw(3)
        self.func, self.by_hash = func, by_hash
        self.weight = nn.Parameter(draw(E, 16), requires_grad=False)
        self.bias = None if by_hash else nn.Parameter(draw(E, dtype=FP32), requires_grad=False)
        self.tid2eid = nn.Parameter(_table().int(), requires_grad=False)

    def forward(self, x: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.view(-1, 16).float(), self.weight.float())
        if self.func == "softmax":
            scores = scores.softmax(dim=-1)
        elif self.func == "sigmoid":
            scores = scores.sigmoid()
        else:
            scores = F.softplus(scores).sqrt()
        original = scores
        if self.bias is not None:
            scores = scores + self.bias
        if self.by_hash:
            indices = self.tid2eid[input_ids.view(-1)].long()
        else:
            indices = scores.topk(K, dim=-1)[1]
        weights = original.gather(1, indices)
        if self.func != "softmax":
            weights /= weights.sum(dim=-1, keepdim=True)
        weights *= SCALE
        return weights, indices


def _table(draw: Draw | None = None) -> Tensor:
    draw = draw or Draw(5)
    return torch.stack([draw.permutation(E)[:K] for _ in range(VOCAB)])


def _hidden() -> tuple[Tensor, Tensor]:
    return Draw(1)(2, 5, 16), torch.randint(VOCAB, (2, 5), generator=Draw(2).generator)


# ---- one step exchanged at a time --------------------------------------------------------------


def softplus_sqrt(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def add_eps(w: Tensor) -> Tensor:
    return w / (w.sum(dim=-1, keepdim=True) + 1e-20) * SCALE


def by_gather(scores: Tensor, index: Tensor) -> Tensor:
    return scores.gather(1, index)


def route(
    x: Tensor, bias: Tensor, *, func: Any = softplus_sqrt, wide: bool = True,
    choose: Any = lambda s, b: (s + b).topk(K, dim=-1).indices, gather: Any = by_gather,
    weigh: Any = add_eps,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores = func(x.float() if wide else x)
    index = choose(scores, bias)
    return weigh(gather(scores, index)), index


def look_up(
    x: Tensor, table: Tensor, ids: Tensor, *, find: Any = lambda t, i: t[i], **more: Any
) -> tuple[Tensor, Tensor]:
    return route(x, ids, choose=lambda s, b: find(table, ids), **more)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": softplus_sqrt,
    "softplus, power": lambda x: F.softplus(x) ** 0.5,
    "softplus, in place": lambda x: F.softplus(x).sqrt_(),
    "log1p of exp": lambda x: torch.log1p(torch.exp(x)).sqrt(),
    "where": lambda x: torch.where(x > 20, x, torch.log1p(torch.exp(x))).sqrt(),
    "stable": lambda x: (x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))).sqrt(),
    "stable, relu": lambda x: torch.sqrt(F.relu(x) + (-x.abs()).exp().log1p()),
    "log of one plus": lambda x: torch.log(1 + torch.exp(x)).sqrt(),
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(dim=-1),
    "softmax written out": lambda x: (lambda e: e / e.sum(-1, keepdim=True))(
        (x - x.amax(-1, keepdim=True)).exp()
    ),
}
GATHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last axis": lambda s, i: torch.gather(s, -1, i),
    "along": lambda s, i: torch.take_along_dim(s, i, dim=-1),
    "index": lambda s, i: s[torch.arange(s.shape[0])[:, None], i],
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "no eps": lambda w: w / w.sum(-1, keepdim=True) * SCALE,
    "other eps": lambda w: SCALE * (w / (0.25 + w.sum(-1, keepdim=True))),
    "eps in front": lambda w: w / (1e-9 + w.sum(1).unsqueeze(-1)) * SCALE,
    "bounded": lambda w: w / w.sum(-1, keepdim=True).clamp(min=9.0) * SCALE,
    "bounded by max": lambda w: w / w.sum(-1, keepdim=True).clamp_min(0.3) * SCALE,
    "in place": lambda w: w.div_(w.sum(-1, keepdim=True)).mul_(SCALE),
    "not scaled": lambda w: w / (w.sum(-1, keepdim=True) + 1e-20),
    "not normalised": lambda w: w * SCALE,
    "bare": lambda w: w,
    "cast": lambda w: add_eps(w).to(BF16),
    "cast only": lambda w: w.to(BF16),
}
LOOKUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda t, i: t[i],
    "embedding": lambda t, i: F.embedding(i, t),
    "index_select": lambda t, i: t.index_select(0, i),
    "int32": lambda t, i: t.int()[i].long(),
    "two axes": lambda t, i: t[i.view(1, -1)].flatten(0, 1),
}


def _inputs(*lead: int, dtype: torch.dtype = BF16, bias: torch.dtype = FP32) -> Any:
    return lambda: (Draw()(*lead, E, dtype=dtype), Draw(9)(E, dtype=bias))


def _ids(rows: int = 7, dtype: torch.dtype = BF16) -> Any:
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.randint(VOCAB, (rows,), generator=Draw(2).generator)
        return Draw()(rows, E, dtype=dtype), _table(), ids

    return inputs


def _case(fn: Callable[..., Any], inputs: Any = None, *parts: str, **more: Any) -> Case:
    return Case(plain(fn), inputs or _inputs(7), {NAME: 1}, parts, **more)


def _with(**pieces: Any) -> Callable[..., Any]:
    return lambda *args: route(*args, **pieces)


def _own_values(x: Tensor) -> tuple[Tensor, Tensor]:
    w, index = softplus_sqrt(x.float()).topk(K, dim=-1)
    return add_eps(w), index


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    scores = softplus_sqrt(x.float())
    index = scores.topk(K, dim=-1).indices
    weights = torch.zeros_like(scores).scatter(1, index, scores.gather(1, index))
    return weights / weights.sum(dim=-1, keepdim=True), index


def _batched(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return route(x, bias, gather=lambda s, i: s.gather(-1, i))


def _busy(x: Tensor, bias: Tensor) -> Any:
    """The logits and the scores have other readers."""
    scores = x.float().sigmoid()
    index = (scores + bias).topk(K, dim=-1).indices
    loss = scores.mean(0)
    return add_eps(scores.gather(1, index)), index, loss, x.sum()


SPELLINGS: dict[str, Case] = {
    "transformers": Case(Transformers, _hidden, {NAME: 1}, ("top-k of biased", "normalised")),
    "transformers, bf16 bias": Case(lambda: Transformers(bias=BF16), _hidden, {NAME: 1}),
    "transformers, hash": Case(lambda: Transformers(by_hash=True), _hidden, {NAME: 1}, ("id",)),
    "reference": Case(Reference, _hidden, {NAME: 1}, ("top-k of biased", "normalised", "scaled")),
    "reference, softmax": Case(
        lambda: Reference("softmax"), _hidden, {NAME: 1}, ("Softmax", "scaled"), ("normalised",)
    ),
    "reference, sigmoid": Case(lambda: Reference("sigmoid"), _hidden, {NAME: 1}, ("igmoid",)),
    "reference, hash": Case(lambda: Reference(by_hash=True), _hidden, {NAME: 1}, ("by token id",)),
}
for _name, _func in FUNCTIONS.items():
    # torch's own softplus and softmax are an ulp from their decompositions on a CPU
    _weigh = WEIGHTS["cast"] if _name in ("where", "softmax written out") else add_eps
    SPELLINGS[f"scores: {_name}"] = _case(_with(func=_func, weigh=_weigh))
for _name in ("softplus", "sigmoid", "softmax"):
    for _dtype in (BF16, FP16, FP32):
        SPELLINGS[f"scores: {_name}, {_dtype}"] = _case(
            _with(func=FUNCTIONS[_name], wide=False), _inputs(7, dtype=_dtype)
        )
for _name, _gather in GATHERS.items():
    SPELLINGS[f"gather: {_name}"] = _case(_with(gather=_gather))
for _name, _weigh in WEIGHTS.items():
    SPELLINGS[f"weights: {_name}"] = _case(_with(weigh=_weigh))
for _name, _find in LOOKUPS.items():
    SPELLINGS[f"hash: {_name}"] = _case(
        lambda *a, find=_find: look_up(*a, find=find), _ids(), "by token id"
    )
SPELLINGS |= {
    "default": _case(route, None, "Sqrt softplus", "top-k of biased", "normalised", "scaled"),
    "bias first": _case(_with(choose=lambda s, b: (b + s).topk(K)[1])),
    "bias of a row": _case(_with(choose=lambda s, b: (s + b[None]).topk(K, dim=1).indices)),
    "bf16 bias": _case(route, _inputs(7, bias=BF16)),
    "no bias": _case(lambda x, _: route(x, _, choose=lambda s, b: s.topk(K)[1]), None, "top-k"),
    "own values": _case(_own_values, lambda: (Draw()(7, E),)),
    "spread over all experts": _case(_spread, lambda: (Draw()(7, E),)),
    "not sorted": _case(_with(choose=lambda s, b: (s + b).topk(K, sorted=False).indices)),
    "two experts": _case(_with(choose=lambda s, b: (s + b).topk(2).indices)),
    "one expert": _case(_with(choose=lambda s, b: (s + b).topk(1)[1], weigh=lambda w: w * SCALE)),
    "float of the chosen": _case(_with(wide=False, weigh=lambda w: add_eps(w.float()))),
    "batch": _case(_batched, _inputs(2, 3)),
    "as many sequences as tokens": _case(_batched, _inputs(3, 3)),
    "one row": _case(route, _inputs(1)),
    "strided rows": _case(route, lambda: (Draw()(14, 2 * E)[::2, E:], Draw(9)(E, dtype=FP32))),
    "dynamic": _case(route, dynamic={0: (0,)}),
    "dynamic batch": _case(_batched, _inputs(2, 3), dynamic={0: (0, 1)}),
    "hash, dynamic": _case(look_up, _ids(), dynamic={0: (0,), 2: (0,)}),
    "hash, first rows": _case(lambda x, t, i: look_up(x, t, i[:5]), _ids()),
    "hash, softmax": _case(lambda *a: look_up(*a, func=FUNCTIONS["softmax"]), _ids()),
    "hash, bf16": _case(lambda *a: look_up(*a, wide=False), _ids()),
    "other readers": _case(_busy),
    "layers": dataclasses.replace(
        _case(lambda xs, b: [route(x, b) for x in xs.unbind(0)], _inputs(3, 7)), counts={NAME: 3}
    ),
}


# ---- mutants -----------------------------------------------------------------------------------


def _mutant(fn: Callable[..., Any], like: str = "default", **more: Any) -> Case:
    """No site at all, or what ``more`` says. Unfused, softplus is exp and log1p: an ulp apart."""
    exact = {"exact": False} | more
    return Case(plain(fn), SPELLINGS[like].inputs, like=SPELLINGS[like], **exact)


def _gone(**pieces: Any) -> Case:
    return _mutant(_with(**pieces))


def _other_scores(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    index = (x.float().sigmoid() + bias).topk(K, dim=-1).indices
    return add_eps(softplus_sqrt(x.float()).gather(1, index)), index


def _values_too(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = softplus_sqrt(x.float())
    values, index = (scores + bias).topk(K, dim=-1)
    return add_eps(scores.gather(1, index)), index, values


def _rounded_choice(s: Tensor, b: Tensor) -> Tensor:
    return (s.to(torch.float8_e4m3fn).float() + b).topk(K, dim=-1).indices


MUTANTS: dict[str, Case] = {
    "the smallest": _gone(choose=lambda s, b: (s + b).topk(K, dim=-1, largest=False).indices),
    "bias in the weights": _mutant(
        lambda x, b: route(
            x, b, func=lambda y: softplus_sqrt(y) + b, choose=lambda s, _: s.topk(K)[1]
        )
    ),
    "values with the bias": _mutant(
        lambda x, b: (lambda v, i: (add_eps(v), i))(*(softplus_sqrt(x.float()) + b).topk(K))
    ),
    "other scores to choose by": _mutant(_other_scores),
    "bias as a factor": _gone(choose=lambda s, b: (s * b).topk(K, dim=-1).indices),
    "bias twice": _gone(choose=lambda s, b: (s + b + b).topk(K, dim=-1).indices),
    "bias of the tokens": _gone(choose=lambda s, b: (s + b[:7, None]).topk(K, dim=-1).indices),
    "choice rounded": _gone(choose=_rounded_choice),
    "choice in other rows": _mutant(  # its index is looked up in a table all the same
        _with(choose=lambda s, b: (s + b).topk(K, dim=-1).indices.roll(1, 0)),
        counts={NAME: 1}, absent=("top-k",),
    ),
    "next expert": _gone(choose=lambda s, b: ((s + b).topk(K, dim=-1).indices + 1) % E),
    "weights of the first row": _gone(gather=lambda s, i: s[torch.zeros(7, 1).long(), i]),
    "beta": _gone(func=lambda x: F.softplus(x, beta=2.0).sqrt()),
    "threshold": _gone(func=lambda x: F.softplus(x, threshold=1.0).sqrt()),
    "no root": _gone(func=F.softplus),
    "softmax over tokens": _mutant(
        _with(func=lambda x: x.softmax(dim=0)), like="scores: softmax"
    ),
    "bias in the logits": _mutant(
        lambda x, b: route(x.float() + b, b, choose=lambda s, _: s.topk(K)[1]),
        counts={NAME: 1}, absent=("biased",),
    ),
    "weights of tokens in another order": _mutant(
        lambda x, b: route(
            x, b, gather=GATHERS["last axis"], weigh=lambda w: add_eps(w.transpose(0, 1))
        ),
        "as many sequences as tokens", counts={NAME: 1}, absent=("normalised",),
    ),
    "sum over tokens": _mutant(
        _with(weigh=lambda w: w / (w.sum(0, keepdim=True) + 1e-20) * SCALE),
        counts={NAME: 1}, absent=("normalised",),
    ),
    "eps inside": _mutant(
        _with(weigh=lambda w: w / (w + 0.1).sum(-1, keepdim=True) * SCALE),
        counts={NAME: 1}, absent=("normalised",),
    ),
    "sum of squares": _mutant(
        _with(weigh=lambda w: w / (w.square().sum(-1, keepdim=True) + 1e-20) * SCALE),
        counts={NAME: 1}, absent=("normalised",),
    ),
    "a scale of the token": _mutant(
        lambda x, b: route(x, b, weigh=lambda w: add_eps(w) * b[:7, None]),
        counts={NAME: 1},
    ),
    "cast before": _mutant(_with(weigh=lambda w: add_eps(w.to(BF16))), counts={NAME: 1}),
    "biased values read": _mutant(_values_too, why="read elsewhere too"),
    "the chosen scores read": _mutant(
        _with(weigh=lambda w: (add_eps(w), w)), why="read elsewhere too"
    ),
    "hash: rows of other tokens": _mutant(
        lambda x, t, i: look_up(x, t, i.roll(1)), "hash: index", counts={NAME: 1}
    ),
    "hash: entries wrap": _mutant(
        lambda x, t, i: look_up(x, t - E // 2, i, gather=GATHERS["along"]),
        "hash: index",
    ),
    "hash: entries wrap in an index": _mutant(
        lambda x, t, i: look_up(x, t - E // 2, i, gather=GATHERS["index"]),
        "hash: index",
    ),
}  # fmt: skip


def _sorted(s: Tensor, b: Tensor) -> Tensor:
    return (s + b).sort(dim=-1, descending=True).indices[:, :K]


def _miss(fn: Callable[..., Any], *parts: str, why: str) -> Case:
    return _case(fn, None, *parts, why=why, exact=False)


KNOWN_MISSES: dict[str, Case] = {
    "by sorting": _miss(_with(choose=_sorted), why="a sort of all experts is no topk"),
    "logaddexp": _miss(
        _with(func=lambda x: torch.logaddexp(x, torch.zeros_like(x)).sqrt()),
        why="it decomposes into a dozen selections of its own",
    ),
    "logsigmoid": _miss(
        _with(func=lambda x: (-F.logsigmoid(-x)).sqrt()),
        why="-(min(0, -x) - log1p(..)) is the stable form only by distributing the sign",
    ),
    "normalize": _miss(
        _with(weigh=lambda w: F.normalize(w, p=1, dim=-1) * SCALE), "normalised",
        why="it sums |w|, which no rule knows to be w",
    ),
    "scaled before": _miss(
        _with(weigh=lambda w: w * SCALE / w.sum(-1, keepdim=True)), "normalised",
        why="the product is rounded before the quotient; no reference rounds in that order",
    ),
    "by a mask": _miss(
        _with(gather=lambda s, i: torch.stack([s[r, i[r]] for r in range(7)])),
        why="a gather row by row",
    ),
}
