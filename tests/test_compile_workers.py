"""torch's compile workers and this process must mean the same by a key of Triton's cache."""

from __future__ import annotations

import pytest
from torch._inductor.runtime import compile_tasks

from dsv4fuse import compile_workers

compiler = pytest.importorskip("triton.backends.nvidia.compiler")


@pytest.fixture
def their_ptxas(monkeypatch, tmp_path):
    """A ptxas of torch's own, which Triton, asked before, does not know of. Triton 3.9 lets one be
    named for GPUs below capability 9 only."""
    ptxas = tmp_path / "ptxas"
    ptxas.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.9, V99.9.9'\n")
    ptxas.chmod(0o755)
    taken = lambda: monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))  # noqa: E731
    monkeypatch.setattr(compile_tasks, "_set_triton_ptxas_path", taken)
    assert "99.9" not in compiler.get_ptxas_version(80)
    yield
    compiler.get_ptxas_version.cache_clear()


def test_their_ptxas_counts_though_triton_has_asked_another(their_ptxas):
    compile_workers.take_their_ptxas()
    assert "99.9" in compiler.get_ptxas_version(80)
