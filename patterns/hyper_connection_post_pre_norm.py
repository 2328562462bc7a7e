"""Hyper-connections between two sublayers: new streams → mixes → post, comb → collapse → RMSNorm.

Scope: a ``hyper_connection_post`` whose new streams a ``hyper_connection_pre`` with its norm reads,
in any spelling of either, both in the streams' dtype; the new streams stay an output, as the next
sublayer's own post reads them. One node instead of two; the launches are those of the two.
Source: DeepSeek-V4's hc_post, hc_pre.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4fuse import atoms
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.scene import Scene

from . import _hyper_built as built
from . import hyper_connection_post as behind
from . import hyper_connection_pre as ahead

NAME = "hyper_connection_post_pre_norm"
# What one value of the new streams that rounds the other way (their sum has four products, in
# another order) does to the mixes of its token: a bf16 step of a value of 4 times 4 weights.
TURNED = 3e-4


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    found = []
    for site in ahead.sites(scene):
        streams = site.mixes.streams
        made = behind.expansion(scene, streams) if site.norm else None
        if made is not None and made.out.meta["val"].dtype == streams.meta["val"].dtype:
            found.append(_candidate(scene, made, site, numerics))
    return found


def _candidate(
    scene: Scene, made: behind.Expansion, site: ahead.Site, numerics: str
) -> Candidate:
    mixes, norm, weight = site.mixes, site.norm, site.weight
    assert norm is not None
    streams, lead = mixes.streams, mixes.streams.meta["val"].dim() - 2
    outputs = (streams, *(n for n in site.outputs if n is not None))
    old = (made.out, made.streams, made.post, made.comb)
    own = mixes.inputs[1:]
    inputs = tuple(dict.fromkeys((*old, *own, *([weight] if weight else []))))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        parts = [behind.flat(given[n], lead) for n in old]
        plain = mixes.tensors([given[made.streams], *(given[n] for n in own)])
        new, *rest = torch.ops.dsv4fuse.hyper_connection_post_pre_norm(
            *parts, *plain[1:], given[weight] if weight else None, **site.arguments(),
            rounding=made.rounding, y_eps=norm.scalar("eps"), norm=norm.arguments["rounding"],
            precise=numerics == "precise",
        )  # fmt: skip
        new = new.view(*given[made.out].shape[:-1], *new.shape[1:])
        pairs = zip(rest, site.outputs, strict=True)
        return (new, *(mixes.shaped(t, new, o) for t, o in pairs if o is not None))

    return Candidate(
        NAME, outputs[1], inputs, call, outputs, variant="plain", tokens=mixes.tokens,
        loose=ahead.loosened(scene, site, outputs, inputs),
        detail={"parts": f"post · out + combᵀ · streams ({made.rounding}) → {site.steps}"},
        spread=mixes.spread(), judged="exact",
    )  # fmt: skip


def example(tokens: int, sizes: Sizes, device: str) -> Example:
    """out ``[T, D]``, streams ``[T, 4, D]`` bf16, every operation of post rounds; 20 iterations."""
    d = built.hidden(sizes)

    def fn(
        out: Tensor, x: Tensor, post: Tensor, comb: Tensor, w: Tensor, scale: Tensor, base: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x = atoms.hyper_expand(out, x, post, comb, rounding="every")
        mixes = atoms.hyper_mixes(x, w, eps=1e-6, before=True)
        pre, post, comb = atoms.hyper_weights(mixes, scale, base, eps=1e-6, iters=20)
        y = atoms.rms_norm(atoms.hyper_collapse(x, pre), weight, eps=1e-6, rounding="weight")
        return x, y, post, comb

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(*shape, device=device).to(dtype)

    x = torch.randn(tokens, 4, d, device=device, dtype=torch.bfloat16)
    w = torch.randn(24, 4 * d, device=device) / (4 * d) ** 0.5
    given = (x[:, 0].clone(), x, make(tokens, 4), make(tokens, 4, 4), w, make(3), make(24))
    moved = x.nbytes * 10 // 4 + w.nbytes + tokens * 160
    return Example(fn, (*given, make(d, dtype=torch.bfloat16)), moved, TURNED)


EXAMPLES = {"plain": example}
FUSION = Fusion(NAME, find, (), EXAMPLES)
