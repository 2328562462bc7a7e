"""DeepSeek-V4 of transformers, its own modules unchanged, compiled with dsv4fuse.

    python examples/hf_deepseek_v4.py                                   # tiny, random weights
    python examples/hf_deepseek_v4.py --size flash --layers 4 --experts 8           # on a GPU
    python examples/hf_deepseek_v4.py --model path/of/a/checkpoint                  # on a GPU

A prefill without a cache. See hf_generate.py for ``generate`` with one.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
import warnings
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM  # noqa: E402

from dsv4fuse import Report  # noqa: E402
from examples.measure import backend, parsed, relative_error, show, times  # noqa: E402

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
# All three kinds of layers and both routers; "flash" keeps transformers' defaults.
TINY = dict(
    vocab_size=128,
    hidden_size=64,
    moe_intermediate_size=32,
    num_attention_heads=4,
    head_dim=64,
    q_lora_rank=32,
    num_experts_per_tok=2,
    n_routed_experts=8,
    max_position_embeddings=512,
    compress_rates={CSA: 4, HCA: 16},
    sliding_window=8,
    o_groups=2,
    o_lora_rank=32,
    index_n_heads=16,
    index_head_dim=32,
    index_topk=4,
    partial_rotary_factor=0.25,
)
say = Console().print


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint to load instead of random weights")
    parser.add_argument("--size", choices=("tiny", "flash"), default="tiny")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="keep only so many experts")
    parser.add_argument("--vocab", type=int, help="how many tokens the model knows")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=48, help="tokens of a prompt")
    return parsed(parser)


def build(args: argparse.Namespace) -> DeepseekV4ForCausalLM:
    """bf16 on a GPU; fp32 on a CPU, where not every machine can do bf16 matrix products.
    ``args.dtype`` may ask for another."""
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    dtype = getattr(args, "dtype", None) or dtype
    if args.model:
        model = DeepseekV4ForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        sizes: dict[str, Any] = dict(TINY) if args.size == "tiny" else {}
        if args.experts:
            sizes["n_routed_experts"] = args.experts
        if args.vocab:
            sizes["vocab_size"] = args.vocab
        kinds = ["sliding_attention"] + [HCA if i % 2 else CSA for i in range(args.layers - 1)]
        sizes |= dict(
            num_hidden_layers=args.layers,
            layer_types=kinds,
            mlp_layer_types=["hash_moe"] + ["moe"] * (args.layers - 1),
        )
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with torch.device(args.device):
            model = DeepseekV4ForCausalLM(DeepseekV4Config(**sizes))
        torch.set_default_dtype(torch.float32)
        randomize(model)
    # Its default, a loop over the experts that were hit, breaks the graph at each layer.
    model.config._experts_implementation = "grouped_mm"
    return model.to(args.device).eval()


@torch.no_grad()
def randomize(model: DeepseekV4ForCausalLM) -> None:
    """Norms around 1, everything else of order 1: nothing at a value that hides an error."""
    for name, weight in model.state_dict().items():
        if not weight.is_floating_point():
            weight.random_(model.config.n_routed_experts)
        elif weight.dim() == 1:
            weight.normal_(float("norm" in name), 0.3)
        else:
            weight.normal_(0.0, weight.shape[-1] ** -0.5)


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    args = arguments()
    model = build(args)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    options: dict[str, Any] = {} if args.device.startswith("cuda") else {"select": "always"}
    if not args.inductor:
        options["inner"] = "eager"
    kinds = "/".join(kind.split("_")[0] for kind in model.config.layer_types)
    say(f"[bold]DeepseekV4ForCausalLM[/] of transformers {transformers.__version__}, "
        f"{len(model.config.layer_types)} layers {kinds}, {dtype} on {args.device}")  # fmt: skip
    say(f'torch.compile(model, backend="dsv4fuse", fullgraph=True, options={options})\n',
        highlight=False)  # fmt: skip
    fused = torch.compile(model, backend=backend(), options=options, fullgraph=True)
    tokens = torch.randint(
        model.config.vocab_size, (args.batch, args.length), device=args.device
    )
    started = time.perf_counter()
    found = fused(tokens, use_cache=False).logits
    spent = time.perf_counter() - started
    Report.of(model).print()
    wanted = model(tokens, use_cache=False).logits
    equal = (found.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    say(f"\nCompiled and run in {spent:.1f} s. Against eager: logits differ by "
        f"{relative_error(found, wanted):.1e} of the largest; the most likely token is the same "
        f"at {equal:.1%} of the positions.\n", highlight=False)  # fmt: skip

    ways = {"eager": model}
    if args.inductor:
        ways["torch.compile (Inductor)"] = torch.compile(model, fullgraph=True)
    ways[f"dsv4fuse ({'Inductor' if args.inductor else 'node by node'})"] = fused
    header = ("a prefill of", "ms", "ms under CUDA graphs")
    rows = times({n: lambda w=w: w(tokens, use_cache=False) for n, w in ways.items()}, args.device)
    title = f"Medians, {args.batch} × {args.length} tokens"
    show(Console(), title, header[: len(rows[0])], rows)
    if not args.device.startswith("cuda"):
        say("Without a GPU no kernel of dsv4fuse runs: these times say nothing about its speed.")


if __name__ == "__main__":
    main()
