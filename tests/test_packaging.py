"""The package as a wheel, as an editable install and from the checkout, each beside the Hugging
Face library ``kernels``, whose name our top-level folder shares and must never take.

Everything is built from a copy and installed into temporary places: neither the checkout nor
the environment of the test run changes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

import dsv4fuse

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "Makefile",
         "constraints.txt")  # fmt: skip
PACKAGED = ("dsv4fuse", "kernels", "patterns")
FOLDERS = (*PACKAGED, "docs", "examples", "tests")

# Imports all submodules of both packages, then the library, and looks at where each came from.
PROBE = """
import importlib, json, os, pkgutil, sys
home, expected = sys.argv[1], json.loads(sys.argv[2])
import dsv4fuse
assert os.path.realpath(dsv4fuse.__file__).startswith(home), dsv4fuse.__file__
for package, stems in expected.items():
    module = importlib.import_module(package)
    for path in module.__path__:
        assert os.path.realpath(path).startswith(home), (package, list(module.__path__))
    assert sorted(m.name for m in pkgutil.iter_modules(module.__path__)) == stems, package
    for stem in stems:
        importlib.import_module(f"{package}.{stem}")
import kernels
assert hasattr(kernels, "get_kernel") and hasattr(kernels, "use_kernel_forward_from_hub")
ours = tuple(os.path.join(home, *part, "kernels", "") for part in [(), ("dsv4fuse",)])
assert not os.path.realpath(kernels.__file__).startswith(ours), kernels.__file__
print("fine")
"""


def stems(root: pathlib.Path) -> dict[str, list[str]]:
    return {
        f"dsv4fuse.{name}": sorted(p.stem for p in (root / name).glob("*.py"))
        for name in ("kernels", "patterns")
    }


def run(*command: object, cwd: pathlib.Path, path: tuple[object, ...] = ()) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_", "PIP_REQ"))}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def probe(python: object, home: pathlib.Path, root: pathlib.Path, cwd: pathlib.Path, *path) -> None:
    arguments = (os.path.realpath(home), json.dumps(stems(root)))
    assert run(python, "-c", PROBE, *arguments, cwd=cwd, path=path).endswith("fine\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """A copy of what the build reads, since setuptools writes build/ and egg-info beside it."""
    checkout = pathlib.Path(__file__).resolve().parents[1]
    target = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(checkout / name, target / name)
    for name in FOLDERS:
        shutil.copytree(
            checkout / name, target / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return target


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> pathlib.Path:
    """A new environment that sees the libraries of this one but installs into itself.

    Not --system-site-packages: in a run from a venv that would show the base Python's libraries.
    A .pth line adds the folders without reading their .pth files, so that an editable install of
    dsv4fuse in this environment is not seen in the new one.
    """
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    scripts = "Scripts" if os.name == "nt" else "bin"
    new = home / scripts / ("python.exe" if os.name == "nt" else "python")
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = pathlib.Path(run(new, "-c", code, cwd=home).strip())
    ours = dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
    (site / "libraries.pth").write_text("".join(f"{folder}\n" for folder in ours))
    return new


def test_no_init_where_it_would_shadow(checkout):
    for name in ("kernels", "patterns"):
        assert not (checkout / name / "__init__.py").exists()


def test_wheel_holds_everything_and_nothing_else(source, wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {n for n in names if n.endswith(".py")}
    expected = {p.relative_to(source).as_posix() for p in (source / "dsv4fuse").rglob("*.py")}
    for name in ("kernels", "patterns"):
        expected |= {f"dsv4fuse/{name}/{p.name}" for p in (source / name).glob("*.py")}
    assert modules == expected
    data = {"dsv4fuse/py.typed", "dsv4fuse/templates/report.html"}
    for name in ("kernels", "patterns"):
        data |= {f"dsv4fuse/{name}/{p.name}" for p in (source / name).glob("*.json")}
    assert data == {n for n in names if not n.endswith(".py") and ".dist-info/" not in n}
    assert {n.split("/")[0].split("-")[0] for n in names} == {"dsv4fuse"}
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_sdist_holds_what_tests_and_docs_need(source, tmp_path):
    flags = ("--sdist", "--no-isolation", "--outdir", tmp_path)
    run(sys.executable, "-m", "build", *flags, source, cwd=tmp_path)
    (made,) = tmp_path.glob("*.tar.gz")
    root = f"dsv4fuse-{dsv4fuse.__version__}"
    assert made.name == f"{root}.tar.gz"
    with tarfile.open(made) as archive:
        names = {n.removeprefix(f"{root}/") for n in archive.getnames()}
    wanted = {
        p.relative_to(source).as_posix()
        for folder in FOLDERS for p in (source / folder).rglob("*") if p.is_file()
    }  # fmt: skip
    wanted = {n for n in wanted if ".egg-info/" not in n}
    assert wanted | set(FILES) <= names


def test_wheel_has_the_packages_version(wheel, checkout):
    assert wheel.name.startswith(f"dsv4fuse-{dsv4fuse.__version__}-")
    assert f"## {dsv4fuse.__version__}\n" in (checkout / "CHANGELOG.md").read_text()


def test_wheel_registers_the_backend(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "[torch_dynamo_backends]\ndsv4fuse = dsv4fuse.backend:dsv4fuse" in text


def test_installed_wheel(source, wheel, tmp_path):
    target = tmp_path / "target"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    probe(sys.executable, target, source, tmp_path, target)
    code = "from dsv4fuse import Report; print(Report().to_html())"
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=(target,)).endswith("</html>\n")


def test_installed_wheel_beside_a_stray_pyproject(source, wheel, tmp_path):
    # Some wheels drop a pyproject.toml into site-packages; that must not make it a checkout.
    target = tmp_path / "target"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    (target / "pyproject.toml").write_text("")
    library = importlib.util.find_spec("kernels")
    assert library is not None and library.origin is not None
    (target / "kernels").symlink_to(pathlib.Path(library.origin).parent)
    (target / "patterns").mkdir()
    probe(sys.executable, target, source, tmp_path, target)


@pytest.mark.parametrize("mode", ["plain", "strict", "compat"])
def test_editable_install(source, python, tmp_path, mode):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    extra = () if mode == "plain" else ("--config-settings", f"editable_mode={mode}")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall")
    run(*pip, "install", *flags, *extra, "-e", source, cwd=tmp_path)
    home = source
    for cwd in (tmp_path, source):
        probe(python, home, source, cwd)
    code = (
        "import importlib.metadata as m; "
        "(p,) = m.entry_points(group='torch_dynamo_backends', name='dsv4fuse'); print(p.value)"
    )
    assert run(python, "-c", code, cwd=tmp_path).strip() == "dsv4fuse.backend:dsv4fuse"


def test_from_the_checkout_without_any_install(checkout):
    # python -c puts the working directory first on sys.path: the case that shadows.
    probe(sys.executable, checkout, checkout, checkout)


def test_transformers_imports_its_model_from_the_checkout(checkout):
    code = "import transformers.models.deepseek_v4.modeling_deepseek_v4 as m; print(m.__name__)"
    assert "deepseek_v4" in run(sys.executable, "-c", code, cwd=checkout)


def test_import_is_cheap_and_typed(checkout):
    code = "import sys, dsv4fuse; print('torch' in sys.modules, dsv4fuse.__version__)"
    printed = run(sys.executable, "-c", code, cwd=checkout).strip()
    assert printed == f"False {dsv4fuse.__version__}"
    code = "import dsv4fuse\ntry: dsv4fuse.nope\nexcept AttributeError as e: print(e)"
    assert "no attribute 'nope'" in run(sys.executable, "-c", code, cwd=checkout)


def test_public_names_resolve():
    for name in dsv4fuse.__all__:
        assert getattr(dsv4fuse, name) is not None
    assert set(dsv4fuse.__all__) <= set(dir(dsv4fuse))
