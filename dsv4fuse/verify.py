"""Each site checked before it is taken: the user's own nodes against the fused op.

Both run eagerly on the same random inputs of the real shapes, dtypes and strides, on the real
device. Matching is a proof from the terms; this catches a wrong rule, a wrong kernel, a wrong
binding. Equal regions are checked once a process.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from dsv4fuse import compat
from dsv4fuse.fusion import Candidate
from dsv4fuse.terms import short

log = logging.getLogger("dsv4fuse")
_verified: dict[object, str | None] = {}
# Differences allowed, in units of the output dtype's rounding step at the largest value of a row:
# a sum in another order may turn one rounding on the way, a rotation adds two rounded values.
STEPS = {"faithful": 2.0, "precise": 8.0}


def check(candidate: Candidate, region: list[fx.Node], numerics: str) -> str | None:
    """None if the fused op computes what the region does, else a sentence."""
    key = (candidate.fusion, numerics, _signature(candidate, region))
    if key not in _verified:
        with compat.outside_compilation():
            _verified[key] = _check(candidate, region, numerics)
    return _verified[key]


def _check(candidate: Candidate, region: list[fx.Node], numerics: str) -> str | None:
    made = {n: sample(n, candidate) for n in _leaves(candidate, region)}
    try:
        wanted = _run(region, dict(made))
        expected = [wanted[n] for n in (*candidate.outputs, *candidate.updates)]
        inputs = [made[n].clone() if n in candidate.caches else made[n] for n in candidate.inputs]
        found = list(candidate.call(*inputs))
        found += [inputs[candidate.inputs.index(c)] for c in candidate.caches]
    except torch.OutOfMemoryError:
        return "There was not enough memory to check the site."
    except Exception as error:  # whatever a kernel's compiler or launch raises
        log.exception("checking %s", candidate.fusion)
        return f"It could not be run for the check: {str(error).strip().splitlines()[:1]}."
    names = [n.name for n in (*candidate.outputs, *candidate.updates)]
    for i, (name, a, b) in enumerate(zip(names, expected, found, strict=True)):
        if i >= len(candidate.outputs):  # the last place may have been written twice
            a, b = a.narrow(-2, 0, a.shape[-2] - 1), b.narrow(-2, 0, b.shape[-2] - 1)
        wrong = _differ(a, b, numerics)
        if wrong:
            return f"On random inputs {name} differs from the unfused result: {wrong}."
    return None


def _leaves(candidate: Candidate, region: list[fx.Node]) -> list[fx.Node]:
    inside = set(region)
    outer = (a for n in region for a in n.all_input_nodes if a not in inside)
    return list(dict.fromkeys((*candidate.inputs, *outer)))


def _run(region: list[fx.Node], env: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    for node in region:
        args = fx.node.map_arg(node.args, env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return env


def hint(value: Any) -> Any:
    """The number that a symbol had when the graph was traced."""
    return compat.hint(value) if isinstance(value, torch.SymInt) else value


def sample(node: fx.Node, candidate: Candidate) -> Any:
    """A random value like the node's: real strides; indices in range and distinct.

    Where there are more rows than places, the surplus goes to the last one, which is then not
    compared: the order of writes to one place is not defined.
    """
    fake = node.meta["val"]
    if not isinstance(fake, Tensor):
        return hint(fake)
    shape = [hint(s) for s in fake.shape]
    strides = [hint(s) for s in fake.stride()]
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    extent = 1 if 0 in shape else extent
    generator = torch.Generator().manual_seed(len(node.name))
    if fake.dtype.is_complex:
        angle = torch.rand(extent, generator=generator) * 6.3
        flat = torch.polar(torch.ones_like(angle), angle).to(fake.dtype)
    elif fake.dtype.is_floating_point:
        flat = torch.randn(extent, generator=generator).mul_(2).to(fake.dtype)
    elif fake.dtype == torch.bool:
        flat = torch.rand(extent, generator=generator) < 0.5
    else:
        values = _indices(shape, *candidate.places.get(node, (1, None)))
        return values.to(fake.dtype).to(fake.device)
    return flat.to(fake.device).as_strided(shape, strides)


def _indices(shape: list[int], places: Any, axis: int | None) -> Tensor:
    """Place numbers counted along an axis, or through the whole tensor for None."""
    count = math.prod(shape) if axis is None else shape[axis]
    numbers = torch.arange(count).clamp(max=hint(places) - 1)
    if axis is not None:
        numbers = numbers.view([-1 if i == axis else 1 for i in range(len(shape))])
        return numbers.expand(shape)
    return numbers.view(shape)


def _differ(a: Tensor, b: Tensor, numerics: str) -> str | None:
    def strides(t: Tensor) -> list[int]:
        return [s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1]

    if (a.dtype, a.shape, strides(a)) != (b.dtype, b.shape, strides(b)):
        return (
            f"{short(b.dtype)}{list(b.shape)} with strides {b.stride()} instead of "
            f"{short(a.dtype)}{list(a.shape)} with {a.stride()}"
        )
    if not a.numel():
        return None
    if not a.dtype.is_floating_point:
        return None if torch.equal(a, b) else "the integers are not equal"
    x, y = a.to(torch.float64), b.to(torch.float64)
    if not torch.equal(x.isnan(), y.isnan()):
        return "NaN at other places"
    x, y = x.nan_to_num(), y.nan_to_num()
    step = torch.finfo(a.dtype).eps
    scale = x.abs().amax(-1, keepdim=True) if x.dim() else x.abs()
    worst = ((x - y).abs() / (scale * step + 1e-300)).max().item()
    if worst <= STEPS[numerics]:
        return None
    return f"by {worst:.3g} rounding steps of {short(a.dtype)}"


def _signature(candidate: Candidate, region: Iterable[fx.Node]) -> object:
    """Equal for regions that compute the same on inputs alike."""
    number: dict[fx.Node, object] = {}

    def like(node: fx.Node) -> object:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return (tuple(map(str, value.shape)), tuple(map(str, value.stride())),
                    value.dtype, value.device)  # fmt: skip
        return str(value)

    def name(node: fx.Node) -> str:
        return f"%{number.setdefault(node, len(number))}"

    rows = []
    for node in region:
        args = fx.node.map_arg((node.args, node.kwargs), name)
        leaves = tuple(like(a) for a in node.all_input_nodes)
        rows.append((name(node), str(node.target), repr(args), leaves))
    inputs = tuple((name(n), like(n)) for n in candidate.inputs)
    return (tuple(rows), inputs, str(sorted(candidate.detail.items())))


