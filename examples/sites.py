"""Which fusions are taken in which model: ``python -m examples.sites`` writes results/sites.json.

Tiny models in bf16 on a CPU; what is found there depends on how a model is written, not on its
size. README's table of fusions is made from this file.
"""

from __future__ import annotations

import json
import pathlib
import warnings
from typing import Any

import torch
import transformers

import dsv4fuse
from examples import tiny

FILE = pathlib.Path(__file__).parent / "results" / "sites.json"
MODELS = {
    "transformers": {"prefill": tiny.hf},
    "plain": {"prefill": tiny.plain, "decode": tiny.plain_decode},
    "DeepSeek's": {"prefill": tiny.deepseek, "decode": tiny.deepseek_decode},
}


def sites() -> dict[str, dict[str, dict[str, int]]]:
    """Of each model and step, how many sites of each fusion are taken."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, steps in MODELS.items():
        for step, made in steps.items():
            torch._dynamo.reset()
            model, args, kwargs = made()
            report = dsv4fuse.explain(model, *args, options={"select": "always"}, **kwargs)
            found.setdefault(name, {})[step] = report.counts()
    return found


def main() -> None:
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    made: dict[str, Any] = {
        "torch": torch.__version__, "transformers": transformers.__version__, "models": sites(),
    }  # fmt: skip
    FILE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
