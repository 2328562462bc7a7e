"""What the ranks of test_distributed run: ``torchrun tests/_distributed_worker.py NAME FOLDER``.

Each rank leaves what it found as FOLDER/<rank>.json.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import runpy
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from dsv4fuse import Report, backend
from examples.deepseek_v4 import PRESETS, Transformer, randomize
from examples.deepseek_v4.generate import pad
from examples.deepseek_v4.parallel import parallelize

torch.backends.mkldnn.enabled = False  # as in conftest: not every machine has its bf16
CONFIG = dataclasses.replace(PRESETS["tiny"], layers=("window", "csa"), n_mtp_layers=0)
FUSING = {"backend": backend.dsv4fuse, "options": {"select": "always", "inner": "eager"}}


def model() -> Transformer:
    made = Transformer(CONFIG)
    randomize(made)
    made.allocate(2, 64)
    return made


def steps() -> list[tuple[Tensor, Tensor, bool]]:
    """A prefill and a decode step: tokens, positions, prefill."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(128, (n,), generator=draw).tolist() for n in (5, 37)]
    tokens, positions = pad(prompts, "cpu")
    return [
        (tokens, positions, True),
        (tokens[:, :1], positions.amax(1, keepdim=True) + 1, False),
    ]


def apart(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def parallel() -> dict[str, object]:
    """Tensor parallel: a decode step of one layer, its heads, groups and experts split."""
    config = dataclasses.replace(CONFIG, layers=("csa",), n_hash_layers=0)
    plain = Transformer(config)
    randomize(plain)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    split = parallelize(copy.deepcopy(plain), mesh)
    plain.allocate(2, 64)
    split.allocate(2, 64)
    step = torch.tensor([[3], [4]]), torch.tensor([[40], [9]])
    found = torch.compile(split.decode, fullgraph=True, **FUSING)(*step)
    return {"errors": [apart(found, plain.decode(*step))], "taken": Report.of(split).counts()}


def sharded(whole: bool) -> dict[str, object]:
    """FSDP2, compiled from outside or block by block inside."""
    plain, split = model(), model()
    for layer in split.layers:
        if not whole:
            layer.compile(**FUSING)
        fully_shard(layer)
    fully_shard(split)
    fused = torch.compile(split, **FUSING) if whole else split
    errors = [apart(fused(*step), plain(*step)) for step in steps()]
    return {"errors": errors, "taken": Report.of(split).counts()}


class Stage(nn.Module):
    """One of two: the embedding and a layer, or a layer and the head."""

    def __init__(self, whole: Transformer, number: int):
        super().__init__()
        self.whole, self.number = whole, number
        del whole.layers[1 - number]

    def forward(self, x: Tensor, tokens: Tensor, positions: Tensor, prefill: bool) -> Tensor:
        step = self.whole.step(tokens, positions, prefill, False)
        if self.number == 0:
            x = self.whole.embed_tokens(x).unsqueeze(2).expand(-1, -1, CONFIG.hc_mult, -1)
        x = self.whole.layers[0](x, self.whole.ropes, step)
        return self.whole.logits(x) if self.number else x.contiguous()


def pipeline() -> dict[str, object]:
    """A pipeline of two stages, each compiled by itself: other graphs on each rank."""
    plain, rank = model(), dist.get_rank()
    module = Stage(model(), rank)
    module.compile(**FUSING)
    errors = []
    for tokens, positions, prefill in steps():
        stage = PipelineStage(module, rank, 2, torch.device("cpu"))
        more = {"tokens": tokens, "positions": positions, "prefill": prefill}
        given = (tokens,) if rank == 0 else ()
        out = ScheduleGPipe(stage, 1).eval(*given, **more)
        if rank == 1:
            errors.append(apart(out, plain(tokens, positions, prefill)))
    return {"errors": errors, "taken": Report.of(module).counts()}


def example(*arguments: str) -> None:
    """examples/distributed.py, which starts and ends the process group itself."""
    path = pathlib.Path(__file__).resolve().parents[1] / "examples" / "distributed.py"
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


RUNS = {
    "whole": lambda: sharded(whole=True),
    "blocks": lambda: sharded(whole=False),
    "parallel": parallel,
    "pipeline": pipeline,
}

if __name__ == "__main__":
    name, folder, *rest = sys.argv[1:]
    if name == "example":
        example(*rest)
    else:
        dist.init_process_group("gloo")
        with torch.no_grad():
            found = RUNS[name]()
        pathlib.Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.destroy_process_group()
