"""Deleting any guard of correctness makes a named test fail: shown for each (``_guards``)."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from ._guards import GUARDS, Guard

PARTS = ("dsv4fuse", "kernels", "patterns", "tests", "examples", "pyproject.toml")


def _copy(checkout: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    for part in PARTS:
        copy = shutil.copytree if (checkout / part).is_dir() else shutil.copy
        copy(checkout / part, to / part)
    return to


def _pytest(tree: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """The tests of a tree, run there and on its own code."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(tree), "TORCHINDUCTOR_CACHE_DIR": str(tree / "cache")}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *(f"tests/{t}" for t in tests)], cwd=tree, env=env, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS, ids=lambda g: g.name)
def test_a_guard_stands_where_the_table_says(guard: Guard, checkout: pathlib.Path):
    """Cheap, so that a change of the code cannot leave the table behind."""
    assert (checkout / guard.file).read_text().count(guard.old) == 1
    file, _, test = guard.test.partition("::")
    text = (checkout / "tests" / file).read_text()
    assert f"def {test.partition('[')[0]}(" in text
    assert sum(g.name == guard.name for g in GUARDS) == 1


@pytest.mark.long
def test_with_all_guards_the_tests_pass(checkout: pathlib.Path, tmp_path: pathlib.Path):
    done = _pytest(_copy(checkout, tmp_path), sorted({g.test for g in GUARDS}))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("guard", GUARDS, ids=lambda g: g.name)
def test_without_it_a_test_fails(guard: Guard, checkout: pathlib.Path, tmp_path: pathlib.Path):
    tree = _copy(checkout, tmp_path)
    source = tree / guard.file
    source.write_text(source.read_text().replace(guard.old, guard.new))
    done = _pytest(tree, [guard.test])
    # Without some guards a kernel writes out of bounds, which may kill the process as well.
    failed = f"FAILED tests/{guard.test}" in done.stdout or done.returncode < 0
    assert failed, done.stdout[-3000:] + done.stderr[-1000:]
