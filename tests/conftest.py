"""Set-up shared by all tests: machine quirks, markers, hypothesis profiles, a clean Dynamo."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys

# Each xdist worker would otherwise start a pool of compile processes of its own.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# An error inside the pass fails a test instead of leaving its graph unfused.
os.environ.setdefault("DSV4FUSE_DEBUG", "1")

# With AVX-512, eager's softmax of bf16 takes a coarser exp: bits would differ from CPU to CPU.
# Without, Inductor's x % n of integers is wrong before 2.13 (x = 3, n = 8 gives 11).
if platform.machine().lower() in ("x86_64", "amd64"):
    if tuple(map(int, importlib.metadata.version("torch").split(".")[:2])) >= (2, 13):
        os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")

import hypothesis
import pytest
import torch

# ci: the same examples in every run, so that a red run is a changed program and not bad luck.
hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "long",
    deadline=None,
    max_examples=2000,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _cpu_flags() -> set[str]:
    """The CPU's feature flags as Linux lists them; empty elsewhere."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = (line.partition(":")[2] for line in text.splitlines() if line.startswith("flags"))
    return set(next(lines, "").split())


# Without a GPU the kernels themselves run in Triton's interpreter, or nothing would test them. It
# must be set before any kernel module is imported, so here; TRITON_INTERPRET=0 keeps the
# references instead. The shim makes the interpreter's casts to bf16 and fp8 round as a GPU does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    importlib.import_module("_interpreter").install()
    del sys.path[0]

# On some x86 machines oneDNN's bf16 F.linear dies with an illegal instruction; those that have
# both features are safe, and without oneDNN the same numbers come out of torch's own loops.
if platform.machine().lower() in ("x86_64", "amd64"):
    if not {"avx2", "avx512_bf16"} <= _cpu_flags():
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers that each use every core for each matrix product only slow each other down.
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no GPU, with that as the reason."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """No test sees graphs, guards or recompile counts of the one before it."""
    torch._dynamo.reset()
    yield


@pytest.fixture(autouse=True)
def _seeded():
    """A test draws the same numbers alone as after others: which share a process is chance."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _small_pool():
    """Processes that share a GPU: none keeps the gigabytes of a test that is over."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def checkout() -> pathlib.Path:
    """The root of the checkout that these tests lie in."""
    return pathlib.Path(__file__).resolve().parents[1]
