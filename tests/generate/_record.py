"""Runs that are kept: ``tests/generated.json``, and the same as a table in docs/versions.md."""

from __future__ import annotations

import datetime
import json
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

import torch

from ._draws import Tally

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "generated.json"
BAD = ("wrong", "crash", "mutant taken for another", "mutant crash", "generator")


def row(tally: Tally, first: int, tasks: int, seconds: float) -> dict[str, Any]:
    """One run: what was drawn, at which commit, and what came of it."""
    counts = tally.counts
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "seeds": [first, first + tasks - 1],
        "seconds": round(seconds),
        "programs": counts["programs"],
        "mutants": counts["mutants"],
        "taken as what they are": counts["mutants taken as what they are"],
        "forced": _named(counts, "forced, "),
        "ways": _named(counts, "way "),
        "sites": _named(counts, "sites "),
        "taken": _named(counts, "taken "),
        "bad": {name: counts[name] for name in BAD if counts[name]},
    }


def _named(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {k.removeprefix(prefix): n for k, n in sorted(counts.items()) if k.startswith(prefix)}


def _commit() -> str:
    """Of a checkout, with a plus where it holds more than that."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + "+" * bool(changed.strip())


def keep(new: dict[str, Any], file: pathlib.Path = RECORD) -> None:
    """Adds a run. The same seeds at the same commit, run again, replace what is kept of them."""
    runs = json.loads(file.read_text()) if file.exists() else []
    same = ("commit", "torch", "seeds")
    runs = [r for r in runs if any(r[k] != new[k] for k in same)]
    file.write_text(json.dumps([*runs, new], indent=1) + "\n")


