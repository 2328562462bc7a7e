"""Attention with a sink of all heads on one tensor that is keys and values: one flash kernel.

Scope: q ``[.., D]`` with a batch, a sequence and heads in any order, keys shared by the heads and
by all queries of a batch row (or each query's own); a mask added or filled in, before which the
scores are scaled; a softmax with one more logit per head that takes weight and adds nothing,
however it is written (``_sink_weights``). Keys that a gather has chosen are
``sparse_sink_attention``'s. Sources: transformers, DeepSeek's reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.layout import restore
from dsv4fuse.scene import Scene

from . import _attention as attention
from ._attention import Named, Roles, Site, heads_first, roles, seat, seated
from ._chosen import chosen
from ._sink_weights import WEIGHTS

Places = Mapping[fx.Node, tuple[int | torch.SymInt, int | None]]
SLACK = 1e-5  # of the fp32 sums, beside the roundings to bf16
ORDER = frozenset({"order of the sums"})


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    view, sites = attention.sites(scene)
    return [_candidate(site, numerics) for site in sites if chosen(view, site) is None]


def _candidate(site: Site, numerics: str) -> Candidate:
    kv = min(site.kv, key=lambda n: len([a for a in n.axes if a is not None]))
    who = roles(site, kv.axes)
    parts = named(site, who) if who else None
    if who is None or parts is None:
        return undecided("sink_attention", site)
    parts["kv"] = kv
    inputs = tuple(dict.fromkeys(n.node for n in parts.values()))
    own = who.sequence if who.sequence in kv.axes else None
    fixed = arguments(site, who, numerics)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensors[inputs.index(n.node)] for name, n in parts.items()}
        keys = seat(given["kv"], kv.axes, (who.batch, own, site.keys, site.lane))
        q, mask, sinks = arranged(site, who, parts, given)
        keys = keys.expand(q.shape[0], -1, -1, -1)
        out = torch.ops.dsv4fuse.sink_attention(q, keys, mask, sinks, **fixed)
        return (restore(out, who.order, site.root.meta["val"].dim()),)

    return candidate("sink_attention", site, who, inputs, call, "dense")


def named(site: Site, who: Roles) -> dict[str, Named] | None:
    """The nodes that hold q, sink and mask, or None where one has an axis that no kernel takes."""
    q = seated(site.q, (*who.order, site.lane))
    mask = seated(site.mask, (who.batch, who.sequence, site.keys))
    if q is None or (site.mask and (mask is None or site.keys not in mask.axes)):
        return None
    return {"q": q, "sink": site.sink} | ({"mask": mask} if mask else {})


def arranged(
    site: Site, who: Roles, parts: dict[str, Named], given: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """q ``[B,S,H,D]``, the mask ``[B or 1, S or 1, T]`` and the sinks ``[H]``."""
    q = seat(given["q"], parts["q"].axes, (*who.order, site.lane))
    mask = None
    if "mask" in parts:
        mask = seat(given["mask"], parts["mask"].axes, (*who.order[:2], site.keys))
    sinks = seat(given["sink"], parts["sink"].axes, (who.head,)).expand(q.shape[2])
    return q, mask, sinks


def arguments(site: Site, who: Roles, numerics: str) -> dict[str, object]:
    """The numbers and flags of either op."""
    read = site.logits
    kind, fill = ("add", 0.0) if read.mask is None else (read.mask[0], read.mask[2])
    return {
        "scale": read.scale,
        "mask_kind": kind,
        "fill": None if kind == "add" or fill == -math.inf else fill,
        "rounded": "" if numerics == "precise" else read.rounded,
        "wide": site.wide,
        "nan_empty": site.weights.arguments["form"] in ("sum", "lse"),  # they take off a maximum
        "out_dtype": site.root.meta["val"].dtype,
        "heads_first": heads_first(site.root, who),
    }


def candidate(
    name: str, site: Site, who: Roles, inputs: tuple[fx.Node, ...],
    call: Callable[..., tuple[Tensor, ...]], variant: str, places: Places | None = None,
    signed: frozenset[fx.Node] = frozenset(),
) -> Candidate:  # fmt: skip
    """The candidate of either fusion."""
    shape = site.root.meta["val"].shape
    tokens = math.prod(shape[a] for a in (who.batch, who.sequence) if a is not None)
    masked = " → mask" * (site.logits.mask is not None)
    masked = " → negative indices hidden" if signed else masked
    steps = f"scores{masked} → softmax with a sink → weighted sum"
    return Candidate(
        name, site.root, inputs, call, (site.root,), variant=variant, tokens=tokens,
        places=places or {}, signed=signed, loose=site.weights.env.loose | ORDER,
        judged="exact", detail={"parts": steps},
    )  # fmt: skip


def undecided(name: str, site: Site) -> Candidate:
    inputs = (site.q[0].node, site.kv[0].node, site.sink.node, *(m.node for m in site.mask[:1]))
    return Candidate(
        name, site.root, tuple(dict.fromkeys(inputs)), lambda *_: (), (site.root,),
        unsupported="It has axes beside a batch, a sequence and heads with the same keys and mask.",
    )  # fmt: skip


def example(tokens: int, sizes: Sizes, device: str) -> Example:
    """A prefill as transformers spells it: a window and a quarter as many entries, bf16 mask."""
    keys, scale = tokens + max(tokens // 4, 1), sizes.head_dim**-0.5

    def fn(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        shared = kv.expand(-1, q.shape[1], -1, -1)
        s = torch.matmul(q, shared.transpose(2, 3)) * scale + mask
        sink = sinks.reshape(1, -1, 1, 1).expand(*s.shape[:-1], -1)
        s = torch.cat((s, sink), dim=-1)
        s = s - s.max(dim=-1, keepdim=True).values
        w = torch.softmax(s, dim=-1, dtype=s.dtype)[..., :-1]
        return torch.matmul(w, shared).transpose(1, 2).contiguous()

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    q, kv = make(1, sizes.heads, tokens, sizes.head_dim), make(1, 1, keys, sizes.head_dim)
    at = torch.arange(tokens, device=device).unsqueeze(1)
    near = at - torch.arange(tokens, device=device)
    seen = (near >= 0) & (near < sizes.window)
    far = torch.arange(keys - tokens, device=device) < (at + 1) // 4
    hidden = ~torch.cat((seen, far), dim=1)
    mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -math.inf)
    mask = mask.to(torch.bfloat16)[None, None]
    moved = 2 * q.nbytes + kv.nbytes + mask.nbytes
    return Example(fn, (q, kv, mask, make(sizes.heads)), moved, SLACK)


FUSION = Fusion("sink_attention", find, (WEIGHTS,), {"dense": example}, varied=True)
