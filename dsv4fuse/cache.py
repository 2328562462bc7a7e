"""Identity of the pass for Inductor's FX cache, and the reports that outlive it.

When the FX cache is warm, Inductor does not run the pass. So the identity must change with
everything the pass's result depends on, and the report is kept on disk beside that cache.
The store is a convenience: whatever goes wrong with it, compilation goes on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dsv4fuse.options import Options
from dsv4fuse.report import Report

T = TypeVar("T")
_LOG = logging.getLogger("dsv4fuse")
_PACKAGES = ("dsv4fuse", "dsv4fuse.kernels", "dsv4fuse.patterns")
# .json: where a fusion wins is measured data beside its kernel, and it decides what is taken.
_SUFFIXES = (".py", ".json")
_warned: set[str] = set()


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """SHA-256 over the name and content of every source of the package; read once a process."""
    digest = hashlib.sha256()
    for name, path in _sources():
        content = path.read_bytes()
        # Lengths keep two files apart whose bytes would read the same when joined.
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _sources() -> list[tuple[str, pathlib.Path]]:
    """The sources with a name that is the same in a checkout and in a wheel."""
    found: dict[str, pathlib.Path] = {}
    for package in _PACKAGES:
        module = importlib.import_module(package)
        for folder in map(pathlib.Path, module.__path__):
            for path in folder.iterdir():
                if path.suffix in _SUFFIXES and path.is_file():
                    found.setdefault(f"{package}/{path.name}", path)
    return sorted(found.items())


def pass_uuid(options: Options, extra: object = None) -> str:
    """What Inductor's FX cache is to take as the identity of a pass with these options.

    ``extra`` is whatever else decides the result, such as the identity of a chained pass; it may
    be made of JSON values, bytes, tuples and sets. Anything else raises ``TypeError``, since its
    text might differ from process to process or, worse, be equal for different things.
    """
    identity = {
        "sources": source_hash(),
        "options": options.to_dict(),
        "environment": _environment(),
        "extra": _stable(extra),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _environment() -> dict[str, object]:
    import torch

    try:
        triton = importlib.import_module("triton").__version__
    except Exception:  # A Triton that fails to import is as good as none.
        triton = None
    device = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # The name too: two devices of one capability win in different places.
        device = [properties.name, properties.major, properties.minor]
    return {
        "torch": [torch.__version__, torch.version.git_version],
        "runtime": [torch.version.cuda, getattr(torch.version, "hip", None)],
        "triton": triton,
        "device": device,
        "interpret": os.environ.get("TRITON_INTERPRET", "0"),
        "only": os.environ.get("DSV4FUSE_ONLY"),
    }


def _stable(value: object) -> Any:
    """A JSON value that is equal exactly when ``value`` is, in this process and the next."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, (list, tuple)):
        return [_stable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((_stable(item) for item in value), key=json.dumps)}
    if isinstance(value, Mapping):
        items = [[_stable(key), _stable(item)] for key, item in value.items()]
        return {"map": sorted(items, key=json.dumps)}
    raise TypeError(
        f"pass_uuid cannot identify a value of type {type(value).__name__}. Give it JSON values, "
        f"bytes, tuples or sets, for example the uuid() of the chained pass."
    )


def report_dir() -> pathlib.Path:
    """The folder of the stored reports, inside torchinductor's cache directory."""
    return pathlib.Path(_inductor_dir()) / "dsv4fuse"


def _inductor_dir() -> str:
    for module in ("torch._inductor.runtime.cache_dir_utils", "torch._inductor.codecache"):
        try:
            return str(importlib.import_module(module).cache_dir())
        except (ImportError, AttributeError):
            continue  # The function has moved before; the next line finds it elsewhere.
    fallback = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.environ.get('USER', '')}")
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or fallback


def _path(key: str) -> pathlib.Path:
    # A key that could leave the folder, or clash on a file system that ignores case, is hashed.
    name = (
        key if re.fullmatch(r"[0-9a-f]{16,64}", key) else hashlib.sha256(key.encode()).hexdigest()
    )
    return report_dir() / f"{name}.json"


def save_report(key: str, report: Report) -> None:
    """Keep ``report`` under ``key`` for later processes; a failure is logged, never raised."""
    _save(key, report.to_json)


def load_report(key: str) -> Report | None:
    """The report kept under ``key``, or ``None`` when there is none that can be read."""
    return _load(key, Report.from_json)


def save_times(key: str, times: tuple[float, float]) -> None:
    """Keep a site's measured (Inductor's, our) µs for later processes."""
    _save(key, lambda: json.dumps({"inductor": times[0], "ours": times[1]}))


def load_times(key: str) -> tuple[float, float] | None:
    """The times kept under ``key``, or ``None``."""
    return _load(key, _times)


def _times(content: bytes) -> tuple[float, float]:
    stored = json.loads(content)
    if not isinstance(stored, dict) or set(stored) != {"inductor", "ours"}:
        raise ValueError("not a file of times")
    times = float(stored["inductor"]), float(stored["ours"])
    if not all(math.isfinite(t) and t > 0 for t in times):
        raise ValueError(f"{times} are no times")
    return times


def _save(key: str, text: Callable[[], str]) -> None:
    """A reader sees the old file or the new one, never a part: the text goes to a temporary file
    that is then renamed, so two processes may write the same key at once.
    """
    temporary: str | None = None
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", suffix=".json", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text())
        os.replace(temporary, path)
        temporary = None
    except (OSError, ValueError, TypeError) as error:
        _warn(
            "save",
            f"dsv4fuse could not store its report ({error}). On a warm cache the "
            f"report will be missing; set TORCHINDUCTOR_CACHE_DIR to a writable folder.",
        )
    finally:
        if temporary is not None:
            _remove(temporary)


def _load(key: str, parse: Callable[[bytes], T]) -> T | None:
    try:
        return parse(_path(key).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        _warn(
            "load",
            f"dsv4fuse could not read a stored report ({error}). It goes on without; "
            f"delete the folder 'dsv4fuse' in the torchinductor cache to get rid of this.",
        )
        return None


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # Nothing depends on it, and the next clean-up of the cache takes it.


def _warn(kind: str, message: str) -> None:
    # Once a process: a model has hundreds of graphs, and the fault is the same for each.
    if kind not in _warned:
        _warned.add(kind)
        _LOG.warning(message)
