"""Attention with a sink over keys that an index chooses for each query.

Scope: as ``sink_attention``, where the keys of each query are gathered (``gather``, or indexing
with or without a page per batch row) from rows that many queries share, alone or behind keys that
all queries of a batch row see (``cat``). The gathered tensor is never made. Where a mask hides by
-inf just what a negative index names, and no keys lie in front, the index as it was before it was
clamped says so itself: the op reads that and no mask. Sources: DeepSeek's reference; this
project's plain model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.layout import restore
from dsv4fuse.scene import Scene

from . import _attention as attention
from ._attention import Site, roles, seat, unmasked
from ._chosen import PAGE, ROW, Chosen, chosen, self_hiding
from ._sink_weights import WEIGHTS
from .sink_attention import SLACK, Places, arguments, arranged, candidate, named, undecided


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    view, sites = attention.sites(scene)
    found = ((s, chosen(view, s)) for s in sites)
    return [_candidate(view, site, keys, numerics) for site, keys in found if keys is not None]


def _candidate(scene: Scene, site: Site, keys: Chosen, numerics: str) -> Candidate:
    own = {a for n in (keys.far, keys.near) if n for a in n.axes if a is not None and a >= 0}
    who = roles(site, tuple(own))
    alone = self_hiding(scene, site, keys)
    keys, read = (alone, unmasked(site)) if alone else (keys, site)
    parts = named(read, who) if who else None
    if who is None or parts is None or not own <= {who.batch, site.keys, site.lane}:
        return undecided("sparse_sink_attention", site)
    more = {"near": keys.near, "far": keys.far, "index": keys.index, "page": keys.page}
    parts |= {name: n for name, n in more.items() if n is not None}
    inputs = tuple(dict.fromkeys(n.node for n in parts.values()))
    fixed = arguments(read, who, numerics)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensors[inputs.index(n.node)] for name, n in parts.items()}
        q, mask, sinks = arranged(read, who, parts, given)
        tokens = who.order[:2]
        wanted = {
            "near": (who.batch, site.keys, site.lane), "index": (*tokens, site.keys),
            "far": (who.batch if keys.page is None else PAGE, ROW, site.lane), "page": tokens,
        }  # fmt: skip
        near, far, index, page = (
            seat(given[n], parts[n].axes, wanted[n]) if n in given else None
            for n in ("near", "far", "index", "page")
        )
        out = torch.ops.dsv4fuse.sparse_sink_attention(
            q, near, far, index, page, mask, sinks, wrap=keys.wrap, **fixed
        )
        return (restore(out, who.order, site.root.meta["val"].dim()),)

    return candidate(
        "sparse_sink_attention", site, who, inputs, call, "gather", _places(keys, site),
        signed=frozenset({keys.index.node} if alone else ()),
    )  # fmt: skip


def _places(keys: Chosen, site: Site) -> Places:
    """How many rows an index may name, and pages; along the keys they differ."""
    rows, at = keys.far.node.meta["val"].shape[keys.far.axes.index(ROW)], keys.index
    found: dict = {at.node: (rows, at.axes.index(site.keys))}
    if keys.page is not None:
        found[keys.page.node] = (keys.far.node.meta["val"].shape[0], None)
    return found


def example(tokens: int, sizes: Sizes, device: str) -> Example:
    """DeepSeek's form: 640 of 4096 rows for each query, −1 = none, the sink in the denominator."""
    rows, count, scale = 4096, 640, sizes.head_dim**-0.5

    def fn(q: Tensor, kv: Tensor, index: Tensor, sinks: Tensor) -> Tensor:
        held = index.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, q.shape[-1])
        keys = kv.unsqueeze(1).expand(-1, q.shape[1], -1, -1).gather(2, held)
        s = torch.matmul(q, keys.transpose(-1, -2)).float() * scale
        s = s.masked_fill((index < 0).unsqueeze(2), float("-inf"))
        top = torch.maximum(s.amax(-1, keepdim=True), sinks.view(-1, 1))
        e = torch.exp(s - top)
        w = e / (e.sum(-1, keepdim=True) + torch.exp(sinks.view(-1, 1) - top))
        return torch.matmul(w.to(keys.dtype), keys)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    q, kv = make(1, tokens, sizes.heads, sizes.head_dim), make(1, rows, sizes.head_dim)
    few = torch.rand(min(tokens, 64), rows, device=device).topk(count, -1).indices
    index = few.repeat(-(-tokens // few.shape[0]), 1)[:tokens].unsqueeze(0)
    index[..., ::9] = -1
    sinks = torch.randn(sizes.heads, device=device)
    read = min(kv.nbytes, tokens * count * sizes.head_dim * 2)
    return Example(fn, (q, kv, index, sinks), 2 * q.nbytes + read + index.nbytes, SLACK)


FUSION = Fusion("sparse_sink_attention", find, (WEIGHTS,), {"gather": example}, varied=True)
