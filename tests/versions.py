"""The spellings and the tests of the pass under several versions of torch: `make versions`.

Each version gets an environment of its own in `.versions/` (a CUDA build of torch is 5 GB), runs
without a GPU, and leaves a row in `tests/versions.json`; with no version named, the rows are
printed as they are.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import venv
from typing import Any
from xml.etree import ElementTree

import rich
from rich.table import Table

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "versions.json"
# What a version of torch can break; the kernels and the command line are not among it.
TESTS = (
    "spellings", "rules", "rules_held", "maps", "contract", "compat", "ahead", "compile_workers",
    "near_miss", "models",
)  # fmt: skip
# Of torch's choosing, or not to be built here.
LEFT_OPEN = ("torch==", "triton==", "sympy==", "setuptools==")


def environment(version: str) -> pathlib.Path:
    """The Python of an environment with this torch and what else the tests are pinned to."""
    folder = ROOT / ".versions" / version
    python = folder / "bin" / "python"
    made = folder / "made"
    if made.exists():
        return python
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    venv.create(folder, with_pip=True, clear=True)
    constraints.write_text("\n".join(p for p in pinned if not p.startswith(LEFT_OPEN)))
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    wanted = ["-c", constraints, f"torch=={version}", "-e", f"{ROOT}[test]"]
    subprocess.run([*install, *wanted], check=True)
    made.touch()
    return python


def run(version: str) -> dict[str, Any]:
    """One row: the versions, how many tests passed, failed or were skipped, which failed."""
    python = environment(version)
    folder = ROOT / ".versions" / version
    result = folder / "result.xml"
    files = [f"tests/test_{name}.py" for name in TESTS]
    options = ["-q", "-m", "not long and not gpu", f"--junitxml={result}"]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    subprocess.run([python, "-m", "pytest", *options, *files], cwd=ROOT, env=env, check=False)
    names = "import torch, triton; print(torch.__version__, triton.__version__)"
    found = subprocess.run([python, "-c", names], capture_output=True, text=True, check=True)
    torch_version, triton_version = found.stdout.split()
    return {
        "torch": torch_version,
        "triton": triton_version,
        "python": platform.python_version(),
        "device": "CPU",
        "date": datetime.date.today().isoformat(),
        **counts(result),
    }


def counts(junit: pathlib.Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": sorted(f"{c.get('classname')}::{c.get('name')}" for c in failed),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("torch", "triton", "Python", "date", "passed", "skipped", "failed")
    for row in rows:
        shown = [row[k] for k in ("torch", "triton", "python", "date", "passed", "skipped")]
        table.add_row(*map(str, shown), "\n".join(row["failed"]) or "none")
    rich.print(table)


def main(versions: list[str]) -> int:
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else []
    rows = {row["torch"].partition("+")[0]: row for row in kept}
    for version in versions:
        rows[version] = run(version)
        ordered = [rows[v] for v in sorted(rows, key=lambda v: tuple(map(int, v.split("."))))]
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n")
    show(list(rows.values()))
    return int(any(rows[v]["failed"] for v in versions))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
