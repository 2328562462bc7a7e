"""What a measurement was made on, as every file of measurements says it."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping

import torch


def environment() -> dict[str, object]:
    """GPU (None without one) and its capability, versions (None: not installed), today's date."""
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "capability": list(torch.cuda.get_device_capability()) if gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def described(made_on: dict[str, object]) -> str:
    """The same in one line, for a person."""
    versions = (f"{n} {made_on[n]}" for n in ("torch", "triton", "transformers") if made_on.get(n))
    return ", ".join((str(made_on.get("gpu") or "CPU"), *versions, str(made_on.get("date", "?"))))


def alike(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """May what was measured on both stand in one file? Their GPU and its compilers are equal."""
    return all(one.get(name) == other.get(name) for name in ("gpu", "torch", "triton"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
