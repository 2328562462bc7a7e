"""What ``test_ahead`` runs in processes of their own: kernels asked for their keys in an order
drawn from a seed. Prints each kernel's settled key as JSON."""

from __future__ import annotations

import importlib
import json
import pathlib
import random
import sys

from dsv4fuse.kernels import _launch
from triton.runtime.jit import JITFunction

KERNELS = pathlib.Path(__file__).parents[1] / "kernels"


def functions(stems):
    """Those of the kernels' modules, by name."""
    modules = [importlib.import_module(f"dsv4fuse.kernels.{stem}") for stem in stems]
    return {
        f"{m.__name__}.{name}": f for m in modules for name, f in vars(m).items()
        if isinstance(f, JITFunction) and f.fn.__module__ == m.__name__
    }  # fmt: skip


def main():
    shuffled = random.Random(int(sys.argv[1]))
    stems = sorted(p.stem for p in KERNELS.glob("*.py"))
    shuffled.shuffle(stems)
    found = functions(stems)
    names = sorted(found)
    shuffled.shuffle(names)
    for name in names[::2]:  # what was launched or compiled before anybody thought of keys
        hash(found[name])
    print(json.dumps({name: _launch.settled(found[name]).cache_key for name in sorted(found)}))


if __name__ == "__main__":
    main()
