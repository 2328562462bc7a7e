"""The router of a mixture of experts: scores → choice → weights of the chosen.

Scope: logits ``[.., E]``, sqrt(softplus), sigmoid or softmax of them, the choice by
``topk(scores + bias)`` with or without a bias, or by a table's row for each token id; the bare
scores of the chosen (gather, take_along_dim, an index, top-k's own values), divided by their sum
with or without an eps, scaled, cast; in fp32 or rounding to the logits' dtype at each step.
Seed: DeepSeek's reference ``Gate``; transformers' two routers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsv4fuse import atoms
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.layout import arrange
from dsv4fuse.match import Hole
from dsv4fuse.scene import Atom, Hit, Scene, Spec
from dsv4fuse.specs import F32, NARROW, lanes
from dsv4fuse.terms import Term
from dsv4fuse.trace import ROWS

from . import _routing
from ._routing import MOST, Choice, Gathered


def _scores(node: fx.Node, root: Term) -> Iterator[Spec]:
    """With a bias where the root is a sum. 16-bit scores only where PyTorch itself rounds."""
    width, out = lanes(node), node.meta["val"].dtype
    funcs = _functions(root)
    if width is None or not funcs:
        return
    sources = (out, *NARROW) if out == F32 else (out,)
    for scores in sources if root.op == "add" else (out,):
        for logits in (*NARROW, F32) if scores == F32 else (scores,):
            for bias in (scores, F32) if root.op == "add" else (None,):
                if bias is not None and torch.promote_types(scores, bias) != out:
                    continue
                holes = [(Hole("logits", (ROWS, width)), logits)]
                if bias is not None:
                    holes.append((Hole("bias", (width,), wide=bias == F32), bias))
                for func in funcs if scores == F32 else funcs[:1]:
                    yield Spec(tuple(holes), (), (("func", func), ("wide", logits != scores)))


def _functions(term: Term, depth: int = 8) -> tuple[str, ...]:
    """The score functions that a term may be, by an operation that it holds."""
    if term.op == "sigmoid":
        return ("sigmoid",)
    if term.op == "log1p":
        return ("sqrt_softplus", "sqrt_log1p_exp", "sqrt_stable")
    if term.op == "log":
        return ("sqrt_log_exp",)
    if term.op == "fold":
        return ("softmax",) if term.args[0] == "sum" else ()
    inner = (_functions(a, depth - 1) for a in term.args if isinstance(a, Term) and depth)
    return next((found for found in inner if found), ())


def _weights(node: fx.Node, root: Term) -> Iterator[Spec]:
    width, out = lanes(node), node.meta["val"].dtype
    if width is None or width > MOST or root.op not in ("mul", "div", "cast"):
        return
    sums = root.args[0].dtype if root.op == "cast" else out
    hole = ((Hole("w", (ROWS, width), wide=sums == F32), sums),)
    fixed = (("sums", sums), ("out", out))
    for scale in (("scale",), ()):
        none: tuple[Any, ...] = () if scale else (("scale", None),)
        for bounded in (False, True):
            common = (("bounded", bounded), *fixed, *none)
            for representable in (True, False) if bounded else (True,):
                yield Spec(hole, ("eps", *scale), common, representable)
        common = (("bounded", False), ("eps", None), *fixed, *none)
        yield Spec(hole, scale, common)
        yield Spec(hole, scale, (*common, ("normalise", False)))


SCORES = Atom("router_scores", atoms.router_scores, _scores, frozenset())
WEIGHTS = Atom("router_weights", atoms.router_weights, _weights, frozenset())


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    found = (_candidate(scene, g, numerics) for g in _routing.gathers(scene))
    return [c for c in found if c is not None]


def _normalised(scene: Scene, gathered: fx.Node) -> Hit | None:
    """The last value that is made of the gathered scores alone, as weights are."""
    shape = gathered.meta["val"].shape
    found, seen, stack = list[Hit](), set[fx.Node](), [gathered]
    while stack:
        for user in stack.pop().users:
            value = user.meta.get("val")
            if user in seen or not isinstance(value, Tensor) or value.dim() != len(shape):
                continue
            seen.add(user)
            stack.append(user)
            hit = scene.hit(WEIGHTS, user) if value.shape == shape else None
            if hit is not None and hit.w.node is gathered and hit.w.straight:
                found.append(hit)
    return max(found, key=lambda h: scene.order[h.node], default=None)


def _candidate(scene: Scene, gathered: Gathered, numerics: str) -> Candidate | None:
    choice = _routing.choice(scene, gathered)
    scores = scene.hit(SCORES, gathered.scores) if choice else None
    if choice is None or scores is None or "bias" in scores.env.holes:
        return None
    by = scores if choice.by is None else scene.hit(SCORES, choice.by)
    if by is None or by.logits != scores.logits or by.arguments != scores.arguments:
        return None
    lead = [t.meta["val"].shape[:-1] for t in (gathered.node, gathered.scores)]
    same = all(statically_known_true(a == b) for a, b in zip(*lead, strict=True))
    if not same and (choice.table is None or len(lead[0]) != 1):
        return None  # a gather of the first rows only
    weights = _normalised(scene, gathered.node)
    root = gathered.node if weights is None else weights.node
    router = _Router(gathered, choice, by, weights, numerics == "precise")
    shown = [g for g in (gathered.node, *choice.experts.all_input_nodes) if g is not root]
    return Candidate(
        "moe_router",
        root,
        router.inputs,
        router,
        (root, choice.experts),
        reads=router.reads,
        settled=router.settled if choice.table is None else None,
        variant="topk" if choice.table is None else "hash",
        tokens=math.prod(lead[0]),
        unsupported=_READ if any(_still_read(scene, g, root, choice) for g in shown) else None,
        loose=scores.env.loose | (weights.env.loose if weights else frozenset()),
        # The sum over all experts is in another order, and each step behind it rounds to fp32.
        judged="exact" if by.arguments["func"] == "softmax" else "eager",
        detail={"parts": router.parts},
    )


_READ = "What it would replace in between (scores of the chosen, the top-k) is read elsewhere too."


def _still_read(scene: Scene, node: fx.Node, root: fx.Node, choice: Choice) -> bool:
    needed = node.op == "call_function" and node not in (choice.table, choice.ids)
    return needed and scene.live_without(node, (root, choice.experts))


@dataclass(frozen=True)
class _Router:
    """A site's fused op as a function of its inputs."""

    gathered: Gathered
    choice: Choice
    by: Hit
    weights: Hit | None
    precise: bool

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        bias = [self.by.bias.node] if "bias" in self.by.env.holes else []
        lookup = [n for n in (self.choice.table, self.choice.ids) if n is not None]
        return tuple(dict.fromkeys((self.by.logits.node, *bias, *lookup)))

    @property
    def reads(self) -> dict[fx.Node, int | torch.SymInt]:
        table, ids = self.choice.table, self.choice.ids
        if table is None or ids is None:
            return {}
        experts = self.gathered.scores.meta["val"].shape[-1]
        return {table: experts, ids: table.meta["val"].shape[0]}

    @property
    def arguments(self) -> dict[str, Any]:
        dtype = self.gathered.node.meta["val"].dtype
        found = {"scores": dtype, "sums": dtype, "out": dtype, "normalise": False}
        if self.weights is not None:
            fixed, captured = self.weights.arguments, self.weights.env.scalars
            found |= {"normalise": True} | {k: v for k, v in fixed.items() if v is not None}
            found |= captured
        return {"func": self.by.arguments["func"], "precise": self.precise, **found}

    @property
    def parts(self) -> str:
        a = self.arguments
        how = "by token id" if self.choice.table is not None else "top-k"
        how += " of biased scores" * ("bias" in self.by.env.holes)
        steps = [a["func"].replace("_", " "), how, "normalised" * a["normalise"]]
        return " → ".join(s for s in (*steps, "scaled" * ("scale" in a)) if s)

    def _rows(self, tensors: dict[fx.Node, Tensor]) -> tuple[Tensor, Tensor | None]:
        """logits ``[.., E]`` in the root's axes, and the bias ``[E]``; no data moves."""
        rank = self.by.node.meta["val"].dim()
        x = arrange(tensors[self.by.logits.node], self.by.logits, tuple(range(rank - 1)))
        return x, tensors[self.by.bias.node].flatten() if "bias" in self.by.env.holes else None

    def __call__(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        tensors = dict(zip(self.inputs, values, strict=True))
        x, bias = self._rows(tensors)
        flat = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
        lead, k = x.shape[:-1], self.gathered.node.meta["val"].shape[-1]
        if self.choice.table is None or self.choice.ids is None:
            w, experts = torch.ops.dsv4fuse.moe_router(
                flat, bias, top_k=k, ordered=self.choice.ordered, **self.arguments
            )
            return w.view(*lead, k), experts.view(*lead, k)
        table, ids = tensors[self.choice.table], tensors[self.choice.ids]
        w, experts = torch.ops.dsv4fuse.moe_router_hash(
            flat, table, ids.flatten(), **self.arguments
        )
        w = w if x.dim() == 2 else w.view(*lead, k)  # [T, K], of as many tokens as there are ids
        return w, experts.view(*ids.shape, k)

    def settled(self, *values: Tensor) -> Tensor:
        """The rows in which no two of the largest k + 1 scores are equal."""
        x, bias = self._rows(dict(zip(self.inputs, values, strict=True)))
        s = atoms.router_scores(x, bias, **self.by.arguments)
        k = min(self.gathered.node.meta["val"].shape[-1] + 1, s.shape[-1])
        top = s.topk(k, dim=-1).values
        return (top[..., 1:] != top[..., :-1]).all(-1)


def example(tokens: int, sizes: Sizes, device: str, by_hash: bool) -> Example:
    """bf16 logits, fp32 scores by sqrt(softplus); a table of V4's vocabulary."""
    x = torch.randn(tokens, sizes.experts, device=device).bfloat16()
    moved = x.nbytes + tokens * sizes.top_k * 12
    slack = sizes.top_k * 2**-23  # the weights' sum, in two orders
    if by_hash:
        table = torch.randint(sizes.experts, (129280, sizes.top_k), device=device)
        ids = torch.randint(129280, (tokens,), device=device)
        # of the logits only the chosen ones are read, in sectors of 32 bytes
        moved = tokens * (8 + sizes.top_k * (8 + 32 + 12))
        return Example(partial(_plain, by_hash=True), (x, table, ids), moved, slack)
    bias = torch.randn(sizes.experts, device=device) * 0.1
    inputs = (x, bias)
    return Example(partial(_plain, top_k=sizes.top_k), inputs, moved + bias.nbytes, slack)


def _plain(x: Tensor, *rest: Tensor, by_hash: bool = False, top_k: int = 0) -> tuple[Tensor, ...]:
    scores = atoms.router_scores(x, None, func="sqrt_softplus", wide=True)
    chosen = rest[0][rest[1]] if by_hash else (scores + rest[0]).topk(top_k, dim=-1).indices
    w = scores.gather(1, chosen)
    return w / (w.sum(dim=-1, keepdim=True) + 1e-20) * 1.5, chosen


EXAMPLES = {"topk": partial(example, by_hash=False), "hash": partial(example, by_hash=True)}
FUSION = Fusion("moe_router", find, (SCORES, WEIGHTS), EXAMPLES)
