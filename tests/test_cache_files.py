"""The identity of the pass, and the report store: nothing that goes wrong there may surface."""

from __future__ import annotations

import ast
import errno
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys

import pytest

from dsv4fuse import cache
from dsv4fuse.options import Options
from dsv4fuse.report import Report, Site


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(cache, "_warned", set())
    return tmp_path / "inductor" / "dsv4fuse"


def report(n: int = 1) -> Report:
    return Report([Site("f", "taken", f"layers.{i}", "m.py", i) for i in range(n)], graphs=1)


def test_store_lies_in_the_inductor_cache(store):
    cache.save_report("a" * 32, report())
    assert [p.name for p in store.iterdir()] == ["a" * 32 + ".json"]
    assert cache.load_report("a" * 32) == report()
    assert cache.load_report("b" * 32) is None


@pytest.mark.parametrize("key", ["../../escape", "x/y", "", "é" * 500, "A", "a"])
def test_any_key_is_a_safe_file_name(store, key):
    cache.save_report(key, report(3))
    assert cache.load_report(key) == report(3)
    assert {p.parent for p in store.rglob("*.json")} == {store}


def test_a_second_save_replaces_the_first(store):
    cache.save_report("k", report(1))
    cache.save_report("k", report(2))
    assert cache.load_report("k") == report(2)
    assert len(list(store.iterdir())) == 1, "no temporary file is left"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b'{"format": 1}', b"[" * 100_000]
)
def test_damaged_files_are_none_and_warn_once(store, caplog, content):
    cache.save_report("k", report())
    next(store.iterdir()).write_bytes(content)
    with caplog.at_level(logging.WARNING, "dsv4fuse"):
        assert cache.load_report("k") is None
        assert cache.load_report("k") is None
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path, caplog):
    # A file where the folder should be: fails for root too, unlike missing write permission.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING, "dsv4fuse"):
        cache.save_report("k", report())
        cache.save_report("k", report())
        assert cache.load_report("k") is None
    assert [r.message for r in caplog.records if "TORCHINDUCTOR_CACHE_DIR" in r.message]
    assert len(caplog.records) <= 2, "one warning for saving, at most one for loading"


def test_read_only_folder(store, monkeypatch):
    # Raised, not provoked by permissions: root writes anywhere.
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(store))

    store.mkdir(parents=True)
    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", refuse)
    cache.save_report("k", report())
    assert cache.load_report("k") is None
    assert not list(store.iterdir())


def test_full_disk_leaves_the_old_report_and_no_rest(store, monkeypatch, caplog):
    cache.save_report("k", report(1))
    opened = os.fdopen

    class Full:
        def __init__(self, *args, **kwargs):
            self.file = opened(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "dsv4fuse"):
        patch.setattr(cache.os, "fdopen", Full)
        cache.save_report("k", report(2))
    assert "No space left" in caplog.text
    assert cache.load_report("k") == report(1)
    assert len(list(store.iterdir())) == 1


def _write_many(seed: int) -> None:
    for n in range(30):
        cache.save_report("k", report(1 + (seed + n) % 40))


def test_a_reader_never_sees_a_part():
    cache.save_report("k", report())
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    writers = [context.Process(target=_write_many, args=(seed,)) for seed in (0, 17)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers) or reads == 0:
        assert cache.load_report("k") is not None
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0


def test_source_hash_is_the_same_in_another_process(checkout):
    code = "from dsv4fuse.cache import source_hash; print(source_hash())"
    env = os.environ | {"PYTHONPATH": str(checkout), "PYTHONHASHSEED": "7"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == cache.source_hash() and len(cache.source_hash()) == 64


def test_source_hash_covers_all_three_packages(checkout):
    names = dict(cache._sources())
    for package, folder in [
        ("dsv4fuse", "dsv4fuse"),
        ("dsv4fuse.kernels", "kernels"),
        ("dsv4fuse.patterns", "patterns"),
    ]:
        on_disk = {p.name for p in (checkout / folder).glob("*.py")}
        assert on_disk == {
            name.rpartition("/")[2]
            for name in names
            if name.rpartition("/")[0] == package and name.endswith(".py")
        }


def test_source_hash_changes_with_name_content_and_split(tmp_path, monkeypatch):
    def digest(files: dict[str, str]) -> str:
        found = []
        for name, text in files.items():
            path = tmp_path / name
            path.write_text(text)
            found.append((name, path))
        with monkeypatch.context() as patch:
            patch.setattr(cache, "_sources", lambda: found)
            return cache.source_hash.__wrapped__()

    variants = [
        {"a.py": "x", "b.py": "y"},
        {"a.py": "xy", "b.py": ""},
        {"a.py": "x"},
        {"c.py": "x"},
        {"a.py": "x", "b.py": "z"},
    ]
    assert len({digest(v) for v in variants}) == len(variants)


def test_uuid_follows_options_and_extra():
    base = cache.pass_uuid(Options())
    assert base == cache.pass_uuid(Options()) and len(base) == 64
    extras = [None, "a", b"a", 1, 1.5, True, [1], (1, 2), {"a": 1}, {"a"}, {1: "a"}, {"1": "a"}]
    options = [Options(strict=True), Options(numerics="precise"), Options(exclude=("a",))]
    uuids = [cache.pass_uuid(Options(), e) for e in extras] + [cache.pass_uuid(o) for o in options]
    assert len(set(uuids)) == len(uuids)
    assert cache.pass_uuid(Options(), {"a": 1, "b": 2}) == cache.pass_uuid(
        Options(), {"b": 2, "a": 1}
    )


def test_uuid_refuses_what_it_cannot_identify():
    with pytest.raises(TypeError, match="type object"):
        cache.pass_uuid(Options(), {"pass": object()})


def test_uuid_follows_the_interpreter_switch_and_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    base = cache.pass_uuid(Options())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cache.pass_uuid(Options()) != base
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("torch.__version__", "2.99.0")
    assert cache.pass_uuid(Options()) != base


CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load"),
           ("jit", "load"), ("package", "PackageImporter")}  # fmt: skip


def _executable(text: str) -> list[str]:
    """What of a source could turn the bytes of a file into code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(a.name for a in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] * (node.func.id in CALLS)
        elif isinstance(node, ast.Attribute):
            base = node.value
            of = getattr(base, "id", getattr(base, "attr", ""))
            found += [f"{of}.{node.attr}"] * ((of, node.attr) in LOADERS)
        found += [n for n in names if n.partition(".")[0] in CODE]
    return found


def test_nothing_here_makes_code_of_data(checkout):
    """Caches, reports and measurements are JSON: whoever can write them can run nothing."""
    sources = [f for d in ("dsv4fuse", "kernels", "patterns") for f in (checkout / d).rglob("*.py")]
    assert len(sources) > 60
    found = {str(f): bad for f in sources if (bad := _executable(f.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "import dill as d", "import torch\ntorch.load(f)",
    "eval(x)", "exec(x)", "np.load(f, allow_pickle=True)", "__import__('pickle')",
])  # fmt: skip
def test_what_would_is_seen(text):
    assert _executable(text)


def test_a_pickle_is_no_report(store):
    """Not even one that is a report: it is not opened."""
    store.mkdir(parents=True)
    cache.save_report("k", report())
    file = next(store.glob("*.json"))
    marker = store / "ran"
    file.write_bytes(pickle.dumps(_Runs(str(marker))))
    assert cache.load_report("k") is None and not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists(), "the pickle does nothing, so this shows nothing"


class _Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_the_file_is_json(store):
    cache.save_report("k", report())
    assert json.loads(next(store.iterdir()).read_text())["sites"][0]["fusion"] == "f"
