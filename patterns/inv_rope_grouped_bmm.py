"""Inverse rope of the attention output [→ fp8 quant] → grouped output projection.

Scope: o ``[.., H, D]`` in any order of its leading axes, rotated back on the trailing pairs, its
heads merged into groups (one group too), each group times its own weights: einsum, matmul, bmm on
views, linear; the result in tokens' or in groups' order. Weights in the activation's dtype, or
e4m3 with block scales that the graph dequantises; the rotated heads as they are, or quantised and
dequantised in the same blocks. Seeds: ATOM #676, #677; TensorRT-LLM #14254.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from dsv4fuse.patterns._grouped import F32, Rows, rows_of, weights
from dsv4fuse.patterns._grouped_ways import DEQUANTISE, NAME, Site, strategy_of, tokens_of
from dsv4fuse.patterns._turns import rotated
from torch import Tensor, fx

from dsv4fuse import atoms, maps
from dsv4fuse.chains import Quantised, quantised
from dsv4fuse.contract import Contraction, contraction
from dsv4fuse.fusion import Candidate, Example, Fusion, Sizes
from dsv4fuse.layout import Order, arrange, head_order, token_count
from dsv4fuse.rules import widens
from dsv4fuse.scene import Hit, Scene
from dsv4fuse.specs import INVERSE_ROPE
from dsv4fuse.terms import Term
from dsv4fuse.views import VIEWS

aten = torch.ops.aten
ROUNDED = (
    "The module rounds the dequantised activations, which a product of fp8 codes does not; "
    "numerics='precise' takes it."
)
WIDE = "The module keeps the sums in fp32; in another order they differ in more than a last bit."


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every place of this fusion in a graph."""
    turned = [(h, o) for h in scene.outermost(INVERSE_ROPE) if (o := _seats(h)) is not None]
    if not turned:
        return []
    view = rotated(scene)
    quants = quantised(view)
    found = []
    for node in view.nodes:
        if node.target in (aten.mm.default, aten.bmm.default):
            sites = (_sites(view, out, turned, quants) for out in _shown(node))
            ways = next((w for s in sites if (w := list(s))), None)
            if ways is not None:
                found.append(_fastest(ways, numerics))
    return found


def _fastest(ways: list[Site], numerics: str) -> Candidate:
    """Of the ways to read one product: e4m3 weights are left to the graph where that is faster."""
    wide = next((s for s in ways if s.weight.scales is None), None)
    strategy, times = strategy_of(ways[0], wide is not None)
    if strategy == DEQUANTISE and wide is not None:
        return _candidate(wide, *strategy_of(wide), numerics)
    return _candidate(ways[0], strategy, times, numerics)


def _seats(hit: Hit) -> Order | None:
    order = head_order(hit.x, hit.cos, lone="heads")
    return order if order is not None and len(order) == 3 and order[2] is not None else None


def _shown(product: fx.Node) -> list[fx.Node]:
    """A product and what shows it alone (views, a copy, a narrower dtype), the last one first."""
    chain = [product]
    passed = {*VIEWS, aten.clone.default, torch.ops.prims.convert_element_type.default}
    while len(chain[-1].users) == 1:
        (reader,) = chain[-1].users
        if reader.target not in passed or not isinstance(reader.meta.get("val"), Tensor):
            break
        chain.append(reader)
    return chain[::-1]


def _sites(
    scene: Scene, output: fx.Node, turned: list[tuple[Hit, Order]], quants: list[Quantised]
) -> Iterator[Site]:
    product = contraction(scene, output, narrowed=True)
    if product is None or product.rounded:
        return
    for left, right in ((product.left, product.right), (product.right, product.left)):
        for hit, order in turned:
            dtype = hit.node.meta["val"].dtype
            for rows, quant, rounded in _heads(scene, product, left.term, hit, order, quants):
                if rows.token_major(*tokens_of(hit, order)) is None:
                    continue
                if scene.live_without(hit.node, [output]):
                    continue  # the turned heads are written for somebody else anyway
                for weight in weights(scene, right.term, rows, dtype):
                    if quant is None or weight.scales is not None:
                        yield Site(hit, order, rows, weight, quant, rounded)


def _heads(
    scene: Scene, product: Contraction, term: Term, hit: Hit, order: Order,
    quants: list[Quantised],
) -> Iterator[tuple[Rows, Quantised | None, bool]]:  # fmt: skip
    """How a factor is the turned heads: themselves, or through fp8 (and then rounded or not)."""
    shape, dtype = maps.sizes_of(hit.node.meta["val"]), hit.node.meta["val"].dtype
    plain = term.args[0] if term.op == "cast" and widens(dtype, term.dtype) else term
    for node, m in scene.places(plain, product.space):
        if node is hit.node and (rows := rows_of(product, m, shape, order)):
            yield rows, None, False
    rounded = term.op == "cast" and term.dtype == dtype
    wide = term.args[0] if rounded else term
    if wide.op != "mul" or wide.dtype != F32:
        return
    for quant in quants:
        if quant.is_reshape(scene, hit.node):
            for codes, scale in (wide.args, wide.args[::-1]):
                rows = _through(scene, product, codes, scale, quant, hit, order)
                if rows is not None:
                    yield rows, quant, rounded


def _through(
    scene: Scene, product: Contraction, codes: Term, scale: Term, quant: Quantised, hit: Hit,
    order: Order,
) -> Rows | None:  # fmt: skip
    """Are these the codes and the scales of one quantiser, each block by its own scale?"""
    *lead, dim = maps.sizes_of(hit.node.meta["val"])
    group = quant.arguments["group"]
    if codes.op != "cast" or not isinstance(dim, int) or dim % group:
        return None
    pairs = (
        (codes.args[0], [quant.codes.node], (*lead, dim), 1),
        (scale, [s.node for s in quant.scales], (*lead, dim // group), group),
    )
    found: list[Rows | None] = []
    for term, nodes, shape, block in pairs:
        own = [
            rows_of(product, through, shape, order, block)
            for node, m in scene.places(term, product.space)
            if node in nodes
            and (through := maps.reshape(m, maps.sizes_of(node.meta["val"]), shape)) is not None
        ]
        found.append(next((r for r in own if r is not None), None))
    return found[0] if found[0] == found[1] else None


def _candidate(
    site: Site, strategy: str, times: dict[str, float], numerics: str
) -> Candidate:
    bounds = {n: site.hit.env.holes[n] for n in ("x", "cos", "sin")}
    seats = [s for s in (site.weight.values, site.weight.scales) if s is not None]
    inputs = tuple(dict.fromkeys((*(b.node for b in bounds.values()), *(s.node for s in seats))))
    arguments = {
        "rope_rounding": site.hit.arguments["rounding"],
        "precise": numerics == "precise",
        "token_major": site.rows.token_major(*tokens_of(site.hit, site.order)),
        "strategy": strategy,
    }

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (_call(site, dict(zip(inputs, tensors, strict=True)), arguments),)

    steps = "inverse rope" + " → fp8 quant" * (site.quant is not None)
    steps += f" → projection of {site.rows.groups} groups" + " (e4m3)" * (len(seats) == 2)
    measured = ", ".join(f"{name} {us:g} µs" for name, us in sorted(times.items()))
    parts = f"{steps} by {strategy!r}" + f" (measured: {measured})" * bool(measured)
    return Candidate(
        NAME,
        site.output,
        inputs,
        call,
        (site.output,),
        variant="fp8" if site.quant else "e4m3" if len(seats) == 2 else "bf16",
        tokens=token_count(site.hit.node, site.order),
        unsupported=_unsupported(site, numerics),
        loose=site.hit.env.loose | {"order of a sum"} | (site.quant.loose if site.quant else set()),
        detail={"parts": parts, "strategy": strategy, "strategies": times},
    )


def _unsupported(site: Site, numerics: str) -> str | None:
    if site.output.meta["val"].dtype.itemsize > 2:
        return WIDE
    if site.quant is None:
        return None
    if site.rounded and numerics != "precise":
        return ROUNDED
    return site.quant.unsupported


def _call(site: Site, given: dict[fx.Node, Tensor], arguments: dict[str, object]) -> Tensor:
    """The fused op on the site's own tensors, its result with the output's own axes."""
    x = arrange(given[site.hit.x.node], site.hit.x, site.order)
    cos, sin = (arrange(given[b.node], b, site.order[:2]).expand(*x.shape[:2], -1)
                for b in (site.hit.cos, site.hit.sin))  # fmt: skip
    groups, weight = site.rows.groups, site.weight
    w = weight.values.arrange(given[weight.values.node], groups)
    scales = weight.scales and weight.scales.arrange(given[weight.scales.node], groups)
    batch, length = x.shape[:2]
    ops, out_dtype = torch.ops.dsv4fuse, site.output.meta["val"].dtype
    if site.quant is not None:
        quant = {k: v for k, v in site.quant.arguments.items() if k != "group"}
        out = ops.inv_rope_grouped_fp8(
            x, cos, sin, w, scales, out_dtype=out_dtype, **quant, **arguments
        )
    else:
        out = ops.inv_rope_grouped_bmm(
            x, cos, sin, w, scales, scaled=weight.scaled, out_dtype=out_dtype, **arguments
        )  # fmt: skip
    return site.rows.shaped(out, batch, length)


def example(tokens: int, sizes: Sizes, device: str, kind: str) -> Example:
    """o ``[1, T, H, D]`` bf16, fp32 tables; weights bf16, or e4m3 with 128 × 128 scales."""
    k, n = sizes.heads // sizes.groups * sizes.head_dim, 1024

    def fn(o: Tensor, cos: Tensor, sin: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
        o = atoms.rope(o, cos.unsqueeze(2), sin.unsqueeze(2), inverse=True, rounding="once")
        y = o.view(*o.shape[:2], sizes.groups, -1)
        if scale is None:
            return torch.einsum("bsgd,grd->bsgr", y, w).flatten(2)
        wide = w.float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        if kind == "e4m3":
            return torch.einsum("bsgd,grd->bsgr", y, wide.to(o.dtype)).flatten(2)
        y = atoms.fake_quant(y.float(), group=128, floor=1e-10, scale="fp32")
        return torch.einsum("bsgd,grd->bsgr", y, wide).to(o.dtype).flatten(2)

    o = torch.randn(1, tokens, sizes.heads, sizes.head_dim, device=device, dtype=torch.bfloat16)
    angle = torch.rand(1, tokens, sizes.rope_dim // 2, device=device)
    w = torch.randn(sizes.groups, n, k, device=device) * k**-0.5
    tensors: tuple[Tensor, ...] = (o, angle.cos(), angle.sin())
    if kind == "bf16":
        tensors += (w.bfloat16(),)
    else:
        scale = torch.rand(sizes.groups, n // 128, k // 128, device=device) * 1e-3 + 1e-4
        tensors += ((w * 1000).to(atoms.FP8), scale)
    moved = sum(t.nbytes for t in tensors) + 2 * tokens * sizes.groups * n
    return Example(fn, tensors, moved)


EXAMPLES = {kind: partial(example, kind=kind) for kind in ("bf16", "e4m3", "fp8")}
FUSION = Fusion(NAME, find, (), EXAMPLES)  # a rope that nearly is one is inv_rope_quant's
