"""Hyper-connections: in front of a sublayer, behind it, and at the end of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spellings import _hypers as h
from ..spellings import hyper_connection_post as post
from ..spellings import hyper_head as head
from . import _atoms
from ._hand import Fn, Hand, Site

MIXES = {
    "normed": h.mixes_of_normed,
    "scaled": h.mixes_scaled,
    "rows": h.mixes_of_rows,
    "mean of streams": h.mixes_by_mean_of_streams,
    "over root": h.mixes_over_root,
}
MIX_EDITS = {"each stream's": h.mixes_of_each_stream, "in bf16": h.mixes_in_bf16}
COLLAPSE = {"sum": h.collapse, "einsum": h.collapse_by_einsum, "matmul": h.collapse_by_matmul}
SPLITS = {"words of transformers": h.split, "words of the reference": None}
POSTS = {
    "transformers": post._transformers,
    "reference": post._reference,
    "ours": post._ours,
    "einsum": post._einsum,
    "einsum in bf16": post._einsum_in_bf16,
    "rows": post._rows,
    "bmm": post._bmm,
    "first layer": post._expanded,
}
CASTING = ("transformers", "einsum in bf16", "rows", "first layer")  # of any weights
POST_EDITS = {
    "products rounded": post._rounded_products,
    "one post": post._shared_post,
    "mix rounded": post._once_rounded_mix,
    "one batch's comb": post._other_token,
    "minus": post._minus,
}


def _inputs(hand: Hand, outputs: int) -> tuple[Tensor, ...]:
    b, s, width = (
        hand.number("B", (2, 1, 3)),
        hand.number("S", (3, 1)),
        hand.number("width", (64, 128)),
    )
    dtype, small = hand.dtype(), hand.dtype("parameters", "fp32", "bf16")
    x = hand.tensor("x", b, s, h.STREAMS, width, dtype=dtype)
    draw, scales = hand.random, 1 if outputs == h.STREAMS else 3
    w = draw(outputs, h.STREAMS * width, dtype=torch.float32, scale=(h.STREAMS * width) ** -0.5)
    return x, w.to(small), *(draw(k, dtype=small, scale=1.0) for k in (scales, outputs))


def _mixes(hand: Hand) -> Fn:
    return hand.pick("mixes", MIXES, loose={"over root"}, mutants=MIX_EDITS, of="normed")


def before(hand: Hand) -> Site:
    """Mixes → pre, post, comb → collapse [→ norm]."""
    x, w, scale, base = _inputs(hand, 24)
    mixes = _mixes(hand) if w.dtype == torch.float32 else h.mixes_of_normed
    collapse, iters = hand.pick("collapse", COLLAPSE), hand.number("iterations", (3, 1, 20))
    words = hand.pick("words", {"transformers": True, "reference": False})
    comb = hand.pick("sinkhorn", {"plain": True, "in place": False}) or iters != 3
    first, behind = hand.seam("in front"), hand.seam("behind")
    norm, weight = (None, None)
    if hand.flag("norm"):
        norm, weight = _atoms.norm(hand, x.dtype, x.shape[-1], "norm behind")

    def sinkhorn(logits: Tensor) -> Tensor:
        return h.sinkhorn(logits, iters) if comb else h.sinkhorn_in_place(logits)

    def parts(m: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        if words or iters != 3:
            return h.split(m, scale, base, sinkhorn)
        return h.split_by_slices(m, scale, base)

    def fn(x: Tensor, w: Tensor, scale: Tensor, base: Tensor, *weight: Tensor):
        made = h.connection(lambda t, f: mixes(first(t), f), parts, collapse)
        y, post, comb = made(x, w, scale, base)
        return behind(y if norm is None else norm(y, *weight)), post, comb

    given = (x, w, scale, base, *((weight,) if norm is not None else ()))
    return hand.site("hyper_connection_pre", fn, given, {"hyper_connection_pre": 1})


def behind(hand: Hand) -> Site:
    """post · out + combᵀ · streams."""
    b, s, width = (
        hand.number("B", (2, 1, 3)),
        hand.number("S", (3, 1)),
        hand.number("width", (64, 128)),
    )
    dtype = hand.dtype()
    # Known miss: bf16 weights cast to fp16 for an einsum, which is no rounding of fp32.
    weights = hand.dtype("weights", *(("fp32",) if dtype == torch.float16 else ("fp32", "bf16")))
    posts = POSTS if weights == torch.float32 else {n: POSTS[n] for n in CASTING}
    fn = hand.pick("post", posts, mutants=POST_EDITS, of="transformers")
    first, last = hand.seam("in front"), hand.seam("behind")
    out = hand.tensor("out", b, s, width, dtype=dtype)
    x = hand.tensor("x", b, s, h.STREAMS, width, dtype=dtype)
    small = (hand.random(b, s, 4, dtype=weights), hand.random(b, s, 4, 4, dtype=weights))

    def whole(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return last(fn(first(out), x, post, comb))

    return hand.site("hyper_connection_post", whole, (out, x, *small), {"hyper_connection_post": 1})


def at_the_end(hand: Hand) -> Site:
    """The streams collapsed into one."""
    x, w, scale, base = _inputs(hand, h.STREAMS)
    mixes = _mixes(hand) if w.dtype == torch.float32 else h.mixes_of_normed
    fn = head.head(mixes, hand.pick("collapse", COLLAPSE))
    first, last = hand.seam("in front"), hand.seam("behind")
    return hand.site(
        "hyper_head",
        lambda x, *rest: last(fn(first(x), *rest)),
        (x, w, scale, base),
        {"hyper_head": 1},
    )


FAMILIES = {"in front of a sublayer": before, "behind a sublayer": behind, "head": at_the_end}
