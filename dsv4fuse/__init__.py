"""dsv4fuse: fused DeepSeek-V4 kernels for plain PyTorch models, found in the graph by meaning.

Use it as a backend, ``torch.compile(model, backend="dsv4fuse")``, or as a decorator,
``@dsv4fuse.fuse``. ``dsv4fuse.explain(model, *args)`` says what is fused, what is not, and why.

Importing this package is cheap on purpose: torch looks the backend up by entry point in every
process, so nothing below imports torch before a public name is used (PEP 562).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import pathlib
import pkgutil
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4fuse.backend import explain, fuse, inductor_pass
    from dsv4fuse.options import OptionError, Options
    from dsv4fuse.report import FusionError, Report

    ops: Any

__version__ = "0.1.0"

__all__ = [
    "FusionError",
    "OptionError",
    "Options",
    "Report",
    "__version__",
    "explain",
    "fuse",
    "inductor_pass",
    "ops",
    "quantise_wo_a",
]

# Public name -> the module that defines it.
_HOME = {
    "FusionError": "report",
    "OptionError": "options",
    "Options": "options",
    "Report": "report",
    "explain": "backend",
    "fuse": "backend",
    "inductor_pass": "backend",
    "quantise_wo_a": "lossy",
}


def _checkout(package: pathlib.Path) -> pathlib.Path | None:
    """The checkout that holds kernels/ and patterns/ beside this package, if they lie there.

    A plain editable install ignores setuptools' package-dir mapping. In a wheel the two lie inside
    the package; then a stray ``pyproject.toml`` in site-packages makes no checkout, or the Hugging
    Face library ``kernels`` would become ``dsv4fuse.kernels``.
    """
    root = package.parent
    if (package / "kernels").is_dir() or not (root / "pyproject.toml").is_file():
        return None
    return root if (root / "kernels").is_dir() and (root / "patterns").is_dir() else None


def _adopt(folder: pathlib.Path) -> None:
    """Make a folder beside the package a subpackage of it, as a namespace package is one.

    Not by the root in ``__path__``: then ``dsv4fuse.dsv4fuse`` is a package too, which holds
    another, and whoever walks all packages (torch does for TORCH_LOGS="+dsv4fuse") never ends.
    """
    spec = importlib.machinery.ModuleSpec(f"{__name__}.{folder.name}", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = globals()[folder.name] = module


if (_root := _checkout(pathlib.Path(__file__).resolve().parent)) is not None:
    for _name in ("kernels", "patterns"):
        if f"{__name__}.{_name}" not in sys.modules:
            _adopt(_root / _name)


def _load_ops() -> Any:
    """Import every kernel module, which registers its op, and return ``torch.ops.dsv4fuse``."""
    import torch

    kernels = importlib.import_module("dsv4fuse.kernels")
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"dsv4fuse.kernels.{module.name}")
    return torch.ops.dsv4fuse


def __getattr__(name: str) -> Any:
    if name == "ops":
        value = _load_ops()
    elif name in _HOME:
        value = getattr(importlib.import_module(f"dsv4fuse.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'dsv4fuse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
