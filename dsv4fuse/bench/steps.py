"""Which steps of whole models ``bench --e2e`` runs, and of what sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4fuse.factory import arguments

SHORT = {"hf": "examples.models:hf", "plain": "examples.models:plain"}
# What a model is asked for where nobody says otherwise: where there is no GPU, and on one.
TINY = {"size": "tiny", "layers": 4, "experts": 8, "batch": 2, "length": 48}
FLASH = {"size": "flash", "layers": 4, "experts": 32, "batch": 1, "length": 2048}
FLASH_DECODE = FLASH | {"batch": 4, "length": 512}


@dataclass(frozen=True)
class Step:
    """``name``: "prefill", "decode", or "" of a factory that does not know them; ``given``: what
    the ``factory`` of the ``model`` is called with."""

    model: str
    name: str
    given: Mapping[str, Any]

    @property
    def factory(self) -> str:
        return SHORT.get(self.model, self.model)

    @property
    def sizes(self) -> dict[str, Any]:
        return {k: v for k, v in self.given.items() if k not in ("decode", "device")}


def steps(models: Sequence[str], asked: Mapping[str, Any], gpu: bool) -> list[Step]:
    """Of each model, with what was ``asked`` for of its sizes."""
    return [step for model in models for step in _of(model, asked, gpu)]


def _of(model: str, asked: Mapping[str, Any], gpu: bool) -> list[Step]:
    factory = SHORT.get(model, model)
    wanted = [asked["decode"]] if "decode" in asked else [False, True]
    found = []
    for decode in wanted:
        usual = (FLASH_DECODE if decode else FLASH) if gpu else TINY
        usual = usual | {"device": "cuda" if gpu else "cpu", "decode": decode}
        given = arguments(factory, asked, usual)
        if "decode" not in given:
            return [Step(model, "", given)]
        found.append(Step(model, "decode" if decode else "prefill", given))
    return found
