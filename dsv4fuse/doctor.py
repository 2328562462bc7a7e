"""What dsv4fuse can do on this machine, and for each "no" the reason and the fix.

Every check stands alone and catches whatever its subject throws: a doctor that dies of the
illness is no help.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import pkgutil
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import dsv4fuse

MIN_TORCH = (2, 11)
MIN_TRITON = (3, 6)
MIN_TRANSFORMERS = (5, 17)


@dataclass(frozen=True)
class Check:
    """One question about this machine, with its answer."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    """What to do about a "no"; empty for a "yes"."""
    required: bool = False
    """Without it dsv4fuse does nothing at all, not even match and report."""


def examine() -> list[Check]:
    """Run all checks, in the order in which a missing one explains the next."""
    checks: list[Callable[[], Check]] = [
        _python, _torch, _triton, _gpu, _cxx, _cc, _headers, _cache, _transformers, _hub_kernels,
        _entry_point, _backend,
    ]  # fmt: skip
    return [_guarded(check) for check in checks] + list(fusions())


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        name = check.__name__.strip("_").replace("_", " ")
        return Check(name, False, _said(error), "Repair what the message names.")


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _at_least(version: str, minimum: tuple[int, int]) -> bool:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= minimum


def _library(name: str, minimum: tuple[int, int], fix: str, required: bool = False) -> Check:
    wanted = ".".join(map(str, minimum))
    try:
        version = str(importlib.import_module(name).__version__)
    except ModuleNotFoundError as error:
        if error.name != name:  # It is there, but something that it needs is not.
            return Check(name, False, _said(error), f"Install {error.name!r}.", required)
        return Check(name, False, "not installed", fix, required)
    except Exception as error:
        return Check(name, False, f"does not import: {_said(error)}", fix, required)
    if not _at_least(version, minimum):
        return Check(name, False, f"{version} is older than {wanted}", fix, required)
    return Check(name, True, version, required=required)


def _python() -> Check:
    # An older one cannot even parse this file; the line is for whoever reads the output.
    return Check("python", True, f"{platform.python_version()} at {sys.executable}", required=True)


def _torch() -> Check:
    return _library("torch", MIN_TORCH, 'Run: pip install "torch>=2.11"', required=True)


def _triton() -> Check:
    fix = 'Run: pip install "triton>=3.6"'
    if sys.platform != "linux":
        fix = "Triton has wheels for Linux only; here the fused ops run their PyTorch reference."
    return _library("triton", MIN_TRITON, fix)


def _transformers() -> Check:
    fix = 'Only the examples on Hugging Face models need it. Run: pip install "transformers>=5.17"'
    return _library("transformers", MIN_TRANSFORMERS, fix)


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = f"{properties.name}, capability {properties.major}.{properties.minor}"
        if properties.major >= 9 or torch.version.cuda is None:
            return Check("GPU", True, found)
        fix = "The fp8 kernels want capability 9.0 (Hopper) or newer; the others may still run."
        return Check("GPU", False, found, fix)
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        fix = "Install a build of torch for your GPU; on a machine without one this is expected."
        return Check("GPU", False, f"torch {torch.__version__} is built without CUDA", fix)
    found = "torch is built for GPUs, but finds none"
    return Check("GPU", False, found, "Check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES.")


def _compiler(name: str, candidates: tuple[str, ...], variable: str, why: str) -> Check:
    asked = os.environ.get(variable)
    for candidate in (asked,) if asked else candidates:
        path = shutil.which(candidate)
        if path:
            return Check(name, True, path)
    found = f"{variable}={asked} is not there" if asked else f"none of {', '.join(candidates)}"
    fix = f"Install one (Debian, Ubuntu: apt install g++) or set {variable}. {why}"
    return Check(name, False, found, fix)


def _cxx() -> Check:
    names = ("clang++",) if sys.platform == "darwin" else ("g++",)
    why = 'Inductor needs it for CPU code; without it use options={"inner": "eager"}.'
    return _compiler("C++ compiler", names, "CXX", why)


def _cc() -> Check:
    return _compiler("C compiler", ("gcc", "clang"), "CC", "Triton builds its launchers with it.")


def _headers() -> Check:
    header = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
    if header.is_file():
        return Check("Python headers", True, str(header))
    fix = "Triton and Inductor compile against them (Debian, Ubuntu: apt install python3-dev)."
    return Check("Python headers", False, f"{header} is not there", fix)


def _cache() -> Check:
    from dsv4fuse.cache import report_dir

    folder = report_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fix = "Set TORCHINDUCTOR_CACHE_DIR to a folder that you can write to."
        return Check("cache folder", False, _said(error), fix)
    return Check("cache folder", True, str(folder))


def _hub_kernels() -> Check:
    """The Hugging Face library ``kernels`` must not be shadowed by our folder of that name."""
    name = "hub kernels"
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        # Only transformers needs it, and only when it is there: its absence breaks nothing.
        return Check(name, True, "the library 'kernels' is not installed and nothing shadows it")
    ours = pathlib.Path(dsv4fuse.__file__).parent
    if pathlib.Path(spec.origin).parent in (ours / "kernels", ours.parent / "kernels"):
        fix = f"Delete {spec.origin}: our folder must stay without an __init__.py."
        return Check(name, False, "our folder kernels/ shadows the library 'kernels'", fix)
    return Check(name, True, spec.origin)


def _entry_point() -> Check:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    for point in points:
        if point.name == "dsv4fuse":
            return Check("entry point", True, f"dsv4fuse -> {point.value}")
    found = 'torch.compile(backend="dsv4fuse") does not find the name'
    fix = "Install the package (in a checkout: pip install -e .), or pass the backend itself: "
    return Check("entry point", False, found, fix + "backend=dsv4fuse.backend.dsv4fuse.")


def _backend() -> Check:
    try:
        backend = importlib.import_module("dsv4fuse.backend")
    except Exception as error:
        fix = "Repair what the message names; no graph can be examined before that."
        return Check("backend", False, _said(error), fix, required=True)
    return Check("backend", True, f"{backend.__name__} imports", required=True)


def fusions() -> Iterator[Check]:
    """One check for each pattern: is there a kernel for it, and does that kernel import here?"""
    patterns = importlib.import_module("dsv4fuse.patterns")
    for info in pkgutil.iter_modules(patterns.__path__):
        if not info.name.startswith("_"):
            yield _fusion(info.name)


def _fusion(stem: str) -> Check:
    name = f"fusion {stem}"
    if importlib.util.find_spec(f"dsv4fuse.kernels.{stem}") is None:
        from dsv4fuse.fusion import has_kernel

        if not has_kernel(stem):
            return Check(name, True, "plain operations, it needs no kernel")
        fix = "The pattern is only reported. A kernel goes into kernels/ under the same name."
        return Check(name, False, "no kernel of that name", fix)
    try:
        importlib.import_module(f"dsv4fuse.patterns.{stem}")
        importlib.import_module(f"dsv4fuse.kernels.{stem}")
    except Exception as error:
        fix = "Repair what the message names, then run the doctor again."
        return Check(name, False, f"does not import: {_said(error)}", fix)
    return Check(name, True, _how_it_runs())


def _how_it_runs() -> str:
    import torch

    if torch.cuda.is_available():
        return "kernel on the GPU"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "kernel in Triton's interpreter (slow, for tests)"
    return "PyTorch reference, as there is no GPU"


def verdict(checks: list[Check]) -> str:
    """The answer in one sentence."""
    bad = [check.name for check in checks if check.required and not check.ok]
    if bad:
        return f"dsv4fuse cannot work here: {', '.join(bad)}."
    ok = {check.name for check in checks if check.ok}
    if {"GPU", "triton", "C compiler"} <= ok:
        return "dsv4fuse can match, report and run its kernels here."
    if "C++ compiler" in ok:
        return "dsv4fuse can match and report here, and run references instead of kernels."
    return 'dsv4fuse can match and report here with options={"inner": "eager"}.'


def to_text(checks: list[Check]) -> str:
    """The checks as lines, each "no" followed by its fix, and the verdict last."""
    width = max(len(check.name) for check in checks)
    lines = [f"dsv4fuse {dsv4fuse.__version__} on {platform.platform()}"]
    for check in checks:
        lines.append(f"  {'yes' if check.ok else 'no ':<3}  {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"       {'':<{width}}  fix: {check.fix}")
    if not any(check.name.startswith("fusion ") for check in checks):
        lines.append("  no patterns are installed")
    return "\n".join([*lines, verdict(checks)])
