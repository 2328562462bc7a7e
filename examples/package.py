"""A decode step of the plain DeepSeek-V4, fused, as an AOTInductor package.

    python examples/package.py                                     # tiny, on whatever is here
    python examples/package.py --size flash --layers 4 --experts 8 --package decode.pt2

torch.export, then AOTInductor with dsv4fuse's pass in its configuration. The process that loads
the package has torch alone: neither this model's source nor dsv4fuse. The caches travel in the
package and are written in place. On a GPU the package holds the compiled kernels; on a CPU plain
operations in the place of each site.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import dsv4fuse  # noqa: E402
from examples.deepseek_v4 import PRESETS, Transformer, randomize  # noqa: E402
from examples.measure import parsed, relative_error  # noqa: E402

STEPS = 4
# All that the other process runs.
LOADS = """
import sys, torch
package, given, found = sys.argv[1:]
decode = torch._inductor.aoti_load_package(package)
torch.save([decode(*step) for step in torch.load(given)], found)
foreign = {name.partition(".")[0] for name in sys.modules} & {"dsv4fuse", "examples"}
assert not foreign, foreign
"""


class Decode(nn.Module):
    """What is exported: a module's forward."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model.decode(tokens, positions)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="keep only so many experts")
    parser.add_argument("--package", type=pathlib.Path, help="where to keep it")
    return parsed(parser)


def build(args: argparse.Namespace) -> Transformer:
    preset = PRESETS[args.size]
    config = dataclasses.replace(
        preset,
        layers=preset.layers[: args.layers],
        n_experts=args.experts or preset.n_experts,
        n_mtp_layers=0,
    )
    torch.set_default_dtype(torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    with torch.device(args.device):
        model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    randomize(model)
    model.allocate(batch=2, max_len=64)
    return model


def package(model: nn.Module, inputs: tuple[Tensor, ...], path: str) -> dsv4fuse.Report:
    """Exports, fuses and compiles ``model(*inputs)`` into the file ``path``; returns the report."""
    cuda = inputs[0].is_cuda
    fusing = dsv4fuse.inductor_pass({} if cuda else {"select": "always"})
    exported = torch.export.export(model, inputs)
    torch._inductor.aoti_compile_and_package(
        exported, package_path=path, inductor_configs={"joint_custom_pre_pass": fusing}
    )
    return fusing.report


@torch.no_grad()
def main() -> None:
    args = arguments()
    model = build(args)
    tokens = torch.tensor([[3], [4]], device=args.device)
    steps = [(tokens + i, torch.tensor([[40], [9]], device=args.device) + i) for i in range(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        given, found = (str(pathlib.Path(folder, name)) for name in ("given", "found"))
        path = str(args.package or pathlib.Path(folder, "decode.pt2"))
        package(Decode(model), steps[0], path).print()
        torch.save(steps, given)
        subprocess.run([sys.executable, "-c", LOADS, path, given, found], check=True, cwd=folder)
        wanted = [model.decode(*step) for step in steps]
        error = max(map(relative_error, torch.load(found), wanted))
        size = pathlib.Path(path).stat().st_size / 2**20
    print(f"{STEPS} decode steps in a process without dsv4fuse ({size:.0f} MiB package) "
          f"differ from eager by {error:.1e} of the largest logit.")  # fmt: skip


if __name__ == "__main__":
    main()
