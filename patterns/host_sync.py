"""Constants that the host builds in each forward and copies to the GPU: filled there instead.

Scope: ``torch.tensor(-1).to(device)``, ``torch.tensor(x, device=device)``, ``new_tensor``,
``full``/``zeros``/``arange`` on the CPU and then ``.to(device)``, through casts and views: the same
factory on the device. (Where torch sees the GPU while it traces, it makes the second and the third
there itself, once: no site.) Copies of other constants, and values read back by the host
(``.item()``, ``.cpu()``), are reported: each makes the host wait, and keeps a step out of a CUDA
graph.
No kernel. Seed: ATOM PR #704, item 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dsv4fuse import compat
from dsv4fuse.fusion import Candidate, Fusion
from dsv4fuse.readers import is_tensor
from dsv4fuse.scene import Scene
from dsv4fuse.views import VIEWS

aten, prims = torch.ops.aten, torch.ops.prims
FACTORIES = {aten.full.default, aten.scalar_tensor.default, prims.iota.default}
# Exact on every device; arithmetic might round differently there.
SAME = VIEWS | {
    aten.lift_fresh_copy.default, aten.clone.default, prims.convert_element_type.default,
}  # fmt: skip
COPIES = (prims.device_put.default, aten._to_copy.default)
_READ = "The host reads a value off the GPU here and waits for all that was started before."
_TABLE = "The host copies a constant of several values here in each call: make it a buffer."


def find(scene: Scene, numerics: str) -> list[Candidate]:
    """Every copy of a constant to a GPU, and every value that the host reads off one."""
    return [c for node in scene.graph.nodes if (c := _candidate(node)) is not None]


def _candidate(node: fx.Node) -> Candidate | None:
    if node.target is aten._local_scalar_dense.default and _on_gpu(node.args[0]):
        return _reported(node, _READ)
    if node.target not in COPIES:
        return None
    source = node.args[0]
    if _on_gpu(source) and not _on_gpu(node):
        return _reported(node, _READ)
    if _on_gpu(source) or not _on_gpu(node):
        return None
    made = _made_of(source)
    if made is None:
        return None
    leaves = [n for n in made if n.op == "get_attr"]
    if any(_value(n) is None for n in leaves):
        return _reported(node, _TABLE)
    fill = _Fill(node, tuple(made))
    sizes = tuple(dict.fromkeys(a for n in made for a in n.all_input_nodes if a not in made))
    return Candidate(
        "host_sync", node, sizes, fill, (node,), detail={"parts": "filled on the device"}
    )


def _reported(node: fx.Node, sentence: str) -> Candidate:
    return Candidate("host_sync", node, (), lambda: (), (node,), unsupported=sentence)


def _on_gpu(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.device.type not in ("cpu", "meta")


def _made_of(node: fx.Node) -> list[fx.Node] | None:
    """The nodes that a value on the host is made of, in order; None if not of constants alone."""
    made: dict[fx.Node, None] = {}

    def visit(n: fx.Node) -> bool:
        if n in made or n.op == "get_attr" or n.target in FACTORIES:
            fine = True
        elif n.target in SAME and is_tensor(n):
            tensors = [a for a in n.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
            fine = all(visit(a) for a in tensors)
        else:
            fine = False
        made[n] = None
        return fine

    return list(made) if visit(node) else None


def _value(node: fx.Node) -> bool | int | float | None:
    """The one number that a constant of the graph holds."""
    value = compat.constant(node)
    if value is None or value.dtype.is_complex or value.numel() == 0:
        return None
    with compat.outside_compilation():
        one = value.flatten()[0]
        return one.item() if bool((value == one).all()) else None


@dataclass(frozen=True)
class _Fill:
    """A site's replacement: what the host did, each factory on the device."""

    copy: fx.Node
    made: tuple[fx.Node, ...]

    def __call__(self, *sizes: Any) -> tuple[Tensor]:
        target = self.copy.meta["val"]
        outer = dict.fromkeys(a for n in self.made for a in n.all_input_nodes if a not in self.made)
        env: dict[fx.Node, Any] = dict(zip(outer, sizes, strict=True))
        for n in self.made:
            if n.op == "get_attr":
                shape, dtype = n.meta["val"].shape, n.meta["val"].dtype
                env[n] = torch.full(shape, _value(n), dtype=dtype, device=target.device)
                continue
            args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), env.__getitem__)
            if n.target in FACTORIES:
                kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
                kwargs |= {"device": target.device, "dtype": n.meta["val"].dtype}
            env[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return (env[self.copy.args[0]].to(target.dtype),)  # type: ignore[index]


def sentence(reason: str) -> str | None:
    """What is to be said of a graph break, by Dynamo's reason for it."""
    waits = any(w in reason for w in ("generic_jump", ".item()", ".tolist()", "ata-dependent"))
    return f"{_READ} The graph ends there; keep the value a tensor (torch.where)." * waits or None


FUSION = Fusion("host_sync", find, (), {}, kernel=False, broken=sentence)
