"""Several GPUs: the plain model's layers split over the ranks of a mesh, by a DTensor plan.

    mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (world_size,))
    parallelize(model, mesh)             # before allocate; every rank holds the whole model
    logits = model.decode(token, position)          # the same on every rank

Split: the heads of attention with their groups of the output projection, the routed experts, the
width of the shared expert. Whole on every rank: hyper-connections, the one kv head with its
caches, compressors, indexer, router, embedding and lm_head. So a layer has two all-reduces, behind
attention and behind the experts; everything between them is plain code on local tensors.
"""

from __future__ import annotations

from typing import Any

import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from .attention import Attention
from .model import Transformer
from .moe import Experts


def local(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Keeps this rank's rows of a parameter, for code that does arithmetic on it."""
    split = distribute_tensor(getattr(module, name), mesh, [Shard(0)], src_data_rank=None)
    # A copy, as what is a view of the whole parameter would keep it in memory.
    setattr(module, name, nn.Parameter(split.to_local().clone(), requires_grad=False))


def share(whole: int, mesh: DeviceMesh, what: str) -> int:
    if whole % mesh.size():
        raise ValueError(f"{whole} {what} cannot be split over {mesh.size()} ranks")
    return whole // mesh.size()


class Heads(ParallelStyle):
    """Attention on this rank's heads. Its q_b_proj is split by columns, its o_b_proj by rows."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Attention)
        module.n_heads = share(module.n_heads, device_mesh, "heads")
        module.o_groups = share(module.o_groups, device_mesh, "groups of heads")
        local(module, "sinks", device_mesh)
        local(module.o_a_proj, "weight", device_mesh)
        return module


class SplitExperts(ParallelStyle):
    """This rank's experts on the tokens that chose them: a part of the sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Experts)
        n = share(module.gate_up_proj.shape[0], device_mesh, "experts")
        for name in ("gate_up_proj", "down_proj"):
            local(module, name, device_mesh)
        module.split = True
        first = n * device_mesh.get_local_rank()

        def here(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, weights, experts = given
            held = (experts >= first) & (experts < first + n)
            return x, weights, (experts - first).where(held, n)

        module.register_forward_pre_hook(here)
        return module


class Summed(ParallelStyle):
    """What a module returns is this rank's part of a sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def summed(_: nn.Module, given: Any, out: Tensor) -> Tensor:
            return collectives.all_reduce(out, "sum", device_mesh)

        module.register_forward_hook(summed)
        return module


PLAN = {
    "self_attn": Heads(),
    "self_attn.q_b_proj": ColwiseParallel(),
    "self_attn.o_b_proj": RowwiseParallel(),
    "mlp": Summed(),
    "mlp.experts": SplitExperts(),
    "mlp.shared_experts.gate_proj": ColwiseParallel(),
    "mlp.shared_experts.up_proj": ColwiseParallel(),
    "mlp.shared_experts.down_proj": RowwiseParallel(output_layouts=Partial()),
}


def parallelize(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Splits the layers, in place. Raises ValueError where something does not divide evenly."""
    blocks = [*model.layers, *([model.mtp.layer] if model.mtp else [])]
    for block in blocks:
        parallelize_module(block, mesh, PLAN, src_data_rank=None)
    return model
