"""DeepSeek-V4 over several GPUs on torch's own engine, each rank's share fused.

    torchrun --nproc-per-node 2 examples/distributed.py                      # tiny, on the CPU too
    torchrun --nproc-per-node 4 examples/distributed.py --size flash --layers 4 --experts 32
    torchrun --nproc-per-node 4 examples/distributed.py --model transformers --size flash ...

``plain`` is the model of examples/deepseek_v4 by its DTensor plan (heads, groups of the output
projection, experts), ``transformers`` its DeepseekV4ForCausalLM by its own expert-parallel plan,
for which it needs accelerate.
A prefill and a decode step; logits are compared with the whole model's on one GPU, both judged by
the whole model in fp32. Random weights. One process works too, for the scaling.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dsv4fuse import Report  # noqa: E402
from dsv4fuse.bench.machine import environment  # noqa: E402
from examples.deepseek_v4 import PRESETS, Transformer, randomize  # noqa: E402
from examples.measure import backend, parsed, relative_error, show, times  # noqa: E402

Compile = Callable[[Any], Any]
Calls = dict[str, Callable[[], Tensor]]
SIZES = ("model", "size", "layers", "experts", "batch", "length", "dtype")
TIMED_STEPS = 128  # more than the decode steps that are run to time one way


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("plain", "transformers"), default="plain")
    parser.add_argument("--size", choices=("tiny", "flash"), default="tiny")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="keep only so many experts")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights")
    parser.add_argument("--times", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=pathlib.Path, help="write what was found to this file")
    args = parsed(parser)
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


# The two models: the whole one, this rank's share of it, and its calls: a prefill compiled by
# ``prompt`` and a decode step compiled by ``step``. ---------------------------------------------


class Plain:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, preset = args, PRESETS[args.size]
        config = dataclasses.replace(
            preset,
            layers=preset.layers[: args.layers],
            n_experts=args.experts or preset.n_experts,
            n_mtp_layers=0,
        )
        torch.set_default_dtype(getattr(torch, args.dtype))
        with torch.device(args.device):
            self.whole = Transformer(config)
        torch.set_default_dtype(torch.float32)
        randomize(self.whole)
        self.vocab_size = config.vocab_size

    def share(self) -> nn.Module:
        from examples.deepseek_v4.parallel import parallelize

        kind = self.args.device.partition(":")[0]
        mesh = dist.device_mesh.init_device_mesh(kind, (dist.get_world_size(),))
        return parallelize(copy.deepcopy(self.whole), mesh)

    def calls(self, model: Any, tokens: Tensor, prompt: Compile, step: Compile) -> Calls:
        batch, length = tokens.shape
        model.allocate(batch, length + 1)
        positions = torch.arange(length, device=tokens.device).expand(batch, -1).contiguous()
        prefill, decode = prompt(model.forward), step(model.decode)
        here = positions[:, -1:] + 1
        return {
            "prefill": lambda: prefill(tokens, positions, True),
            "decode": lambda: decode(tokens[:, :1], here),
        }


class Transformers:
    def __init__(self, args: argparse.Namespace) -> None:
        from examples.hf_deepseek_v4 import build

        dtype = getattr(torch, args.dtype)
        self.args = argparse.Namespace(**{**vars(args), "model": None, "dtype": dtype})
        self.whole = build(self.args)
        self.vocab_size = self.whole.config.vocab_size

    def share(self) -> nn.Module:
        """By way of a folder: transformers splits a model as it loads it."""
        from transformers.distributed import DistributedConfig

        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            self.whole.save_pretrained(folder[0])
        dist.barrier()
        world = dist.get_world_size()
        named = "ep_size" in DistributedConfig.__dataclass_fields__  # from 5.21 on
        experts = {"ep_size": world} if named else {"enable_expert_parallel": True}
        plan = DistributedConfig(tp_size=world, **experts)
        dtype = self.args.dtype
        model = type(self.whole).from_pretrained(folder[0], dtype=dtype, distributed_config=plan)
        model.config._experts_implementation = "grouped_mm"
        # The whole model is of one dtype; as loaded, norms are fp32, which 5.17 cannot multiply.
        return model.to(dtype).eval()

    def calls(self, model: Any, tokens: Tensor, prompt: Compile, step: Compile) -> Calls:
        from dsv4fuse.models.hf import StaticV4Cache

        batch, length = tokens.shape
        cache = StaticV4Cache(model, batch, length + TIMED_STEPS)
        read, write = prompt(model), step(model)
        position = torch.full_like(tokens[:, :1], length)

        def prefill() -> Tensor:
            cache.reset()
            return read(tokens, past_key_values=cache).logits

        def decode() -> Tensor:
            return write(tokens[:, :1], position_ids=position, past_key_values=cache).logits

        return {"prefill": prefill, "decode": decode}


# ------------------------------------------------------------------------------------------------

# A graph for each size: Dynamo cannot trace a distributed embedding of an unknown one (torch 2.13).
GRAPHS = {"fullgraph": True, "dynamic": False}


def as_it_is(f: Any) -> Any:
    return f


def options(args: argparse.Namespace) -> dict[str, Any]:
    """On a CPU the plain PyTorch reference of each op: there is no kernel to be faster."""
    chosen: dict[str, Any] = {} if args.device.startswith("cuda") else {"select": "always"}
    return chosen if args.inductor else chosen | {"inner": "eager"}


def off(found: Tensor, true: Tensor) -> list[float]:
    """The median and the 90th percentile of the distance, of the largest true value."""
    distance = (found.float() - true.float()).abs().flatten().sort().values
    places = (int(share * (distance.numel() - 1)) for share in (0.5, 0.9))
    return [(distance[place] / true.float().abs().max()).item() for place in places]


def compare(args: argparse.Namespace, job: Any, tokens: Tensor, split: nn.Module) -> Any:
    """The errors of each step against the whole model, and the sites taken on each rank."""
    wide = copy.deepcopy(job.whole).float()
    plain = {name: job.calls(m, tokens, as_it_is, as_it_is) for name, m in
             (("whole", job.whole), ("true", wide))}  # fmt: skip
    fusing = lambda f: torch.compile(  # noqa: E731
        f, backend=backend(), options=options(args), **GRAPHS
    )
    calls, out = job.calls(split, tokens, fusing, fusing), {}
    for step, call in calls.items():
        found, whole, true = call(), plain["whole"][step](), plain["true"][step]()
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found.cpu())
        out[step] = {
            "error": relative_error(found, whole),
            "off": off(found, true),
            "whole off": off(whole, true),
            "ranks are equal": all(torch.equal(found.cpu(), other) for other in everywhere),
        }
    taken: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(taken, Report.of(split).counts())
    return {"steps": out, "taken": taken}, calls


def timed(args: argparse.Namespace, job: Any, tokens: Tensor, split: nn.Module, fused: Calls):
    """Rows of ms per decode step: as it is, compiled with Inductor, fused."""
    ways = {"eager": job.calls(split, tokens, as_it_is, as_it_is)}
    if args.inductor:
        inductor = lambda f: torch.compile(f, **GRAPHS)  # noqa: E731
        ways["torch.compile (Inductor)"] = job.calls(split, tokens, as_it_is, inductor)
    ways[f"dsv4fuse ({'Inductor' if args.inductor else 'node by node'})"] = fused
    rows = []
    for name, calls in ways.items():
        calls["prefill"]()
        # Every rank makes the same number of calls, or one would wait for the others forever.
        rows += times({name: calls["decode"]}, args.device, math.inf)
    return rows


@torch.no_grad()
def main() -> None:
    args = arguments()
    cuda = args.device.startswith("cuda")
    dist.init_process_group("nccl" if cuda else "gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    console = Console(quiet=rank > 0)
    job = (Plain if args.model == "plain" else Transformers)(args)
    split = job.share() if world > 1 else copy.deepcopy(job.whole)
    draw = torch.Generator().manual_seed(0)
    shape = (args.batch, args.length)
    tokens = torch.randint(job.vocab_size, shape, generator=draw).to(args.device)

    found, fused = compare(args, job, tokens, split)
    console.print(f"[bold]DeepSeek-V4 {args.size}[/] ({args.model}), {args.layers} layers, "
                  f"{args.dtype}, {world} ranks on {args.device}")  # fmt: skip
    if rank == 0:
        Report.of(split).print()
    for step, e in found["steps"].items():
        console.print(
            f"{step}: differs from the whole model by {e['error']:.1e} of the largest logit; off "
            f"the fp32 model by {e['off'][0]:.1e} (90 %: {e['off'][1]:.1e}), the whole model by "
            f"{e['whole off'][0]:.1e} ({e['whole off'][1]:.1e}); logits are "
            f"{'equal' if e['ranks are equal'] else 'NOT EQUAL'} on all ranks", highlight=False
        )  # fmt: skip
    same = all(counts == found["taken"][0] for counts in found["taken"])
    console.print(f"Sites taken are {'the same' if same else 'NOT THE SAME'} on all ranks.")
    if args.times:
        rows = found["times"] = timed(args, job, tokens, split, fused)
        header = ("a decode step of", "ms", "ms under CUDA graphs")[: len(rows[0])]
        show(console, f"Medians, {args.batch} sequences, {world} ranks", header, rows)
    if args.json and rank == 0:
        sizes = {name: getattr(args, name) for name in SIZES} | {"ranks": world}
        text = json.dumps({**environment(), "sizes": sizes, **found}, indent=1)
        args.json.write_text(text + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
