"""The command line: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import dsv4fuse
from dsv4fuse import doctor
from dsv4fuse.__main__ import FactoryError, app, build
from dsv4fuse.fusion import registry
from dsv4fuse.options import OptionError
from dsv4fuse.report import FusionError, Report, Site

FACTORIES = """
import torch
def good(): return torch.nn.Linear(2, 2), (torch.ones(1, 2),)
def good_kwargs(): return (lambda x, y: x + y), [1], {"y": 2}
def fails(): raise RuntimeError("no weights here")
def model_only(): return torch.nn.Linear(2, 2)
def four(): return 1, 2, 3, 4
def bare_tensor(): return torch.nn.Linear(2, 2), torch.ones(1, 2)
def not_a_model(): return 3, ()
def bad_kwargs(): return print, (), ()
number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    name = f"factories_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    (tmp_path / "needs_more.py").write_text("import surely_not_installed")
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for module in (name, "needs_more", "broken"):
        sys.modules.pop(module, None)


@pytest.fixture
def explained(monkeypatch):
    """Replaces dsv4fuse.explain: what it is called with, and the report it gives."""
    calls = []
    report = Report([Site("f", "taken", "m", "x.py", 1, "It is fused.")], graphs=1)

    def fake(model, *args, options=None, **kwargs):
        calls.append((model, args, kwargs, options))
        if options.get("expect"):
            raise FusionError("Expected 9 sites of 'f'.", report)
        if "nope" in options:
            raise OptionError("dsv4fuse has no option 'nope'.")
        return report

    monkeypatch.setitem(vars(dsv4fuse), "explain", fake)
    return calls


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})


def test_explain_prints_the_report(factories, explained):
    result = run("explain", f"{factories}:good")
    assert result.exit_code == 0, result.output
    assert "taken   f       m       x.py:1  It is fused." in result.output
    model, args, kwargs, options = explained[0]
    assert model(*args).shape == (1, 2) and kwargs == {} and options == {}


def test_explain_passes_kwargs_and_options_on(factories, explained):
    result = run("explain", f"{factories}:good_kwargs", "--options", '{"strict": false}')
    assert result.exit_code == 0, result.output
    assert explained[0][1:] == ((1,), {"y": 2}, {"strict": False})


def test_explain_writes_json(factories, explained, tmp_path):
    target = tmp_path / "report.json"
    assert run("explain", f"{factories}:good", "--json", str(target)).exit_code == 0
    assert Report.from_json(target.read_text()).counts() == {"f": 1}
    only = run("explain", f"{factories}:good", "--json", "-")
    assert json.loads(only.stdout)["sites"][0]["fusion"] == "f"
    missing = run("explain", f"{factories}:good", "--json", str(tmp_path / "no" / "r.json"))
    assert missing.exit_code == 2 and "could not be written" in missing.stderr


def test_a_missed_expectation_shows_the_report_and_exits_1(factories, explained):
    result = run("explain", f"{factories}:good", "--options", '{"expect": {"f": 9}}')
    assert result.exit_code == 1
    assert "It is fused." in result.stdout and "Expected 9 sites" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [("{", "is not JSON"), ("[]", "JSON object, not list"), ('{"nope": 1}', "no option 'nope'")],
)
def test_bad_options_exit_2(factories, explained, options, says):
    result = run("explain", f"{factories}:good", "--options", options)
    assert result.exit_code == 2 and says in result.stderr


@pytest.mark.parametrize("text", ["", "x", ":", "x:", ":x", "a/b.py:make"])
def test_bad_factory_form(text):
    result = run("explain", text)
    assert result.exit_code == 2
    assert "package.module:factory" in result.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no_such_module_here:make", "There is no module 'no_such_module_here'"),
        ("dsv4fuse.nothing:make", "There is no module 'dsv4fuse.nothing'"),
        ("needs_more:make", "imports 'surely_not_installed', which is not installed"),
        ("broken:make", "does not import"),
        ("{}:god", "Did you mean 'good'?"),
        ("{}:number", "is a int, not a function"),
        ("{}:fails", "no weights here"),
        ("{}:model_only", "but it returned Linear"),
        ("{}:four", "but it returned a tuple of 4"),
        ("{}:bare_tensor", "write (model, (x,))"),
        ("{}:not_a_model", "is not callable"),
        ("{}:bad_kwargs", "not a dict"),
    ],
)
def test_bad_factory_says_what_is_wrong(factories, text, says):
    with pytest.raises(FactoryError) as caught:
        build(text.format(factories))
    assert says in str(caught.value)


def test_no_traceback_of_ours_reaches_the_user(factories):
    result = run("explain", f"{factories}:fails")
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("dsv4fuse: The factory")


def test_doctor_in_a_process(checkout, tmp_path):
    env = os.environ | {"PYTHONPATH": str(checkout), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "dsv4fuse", "doctor"],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.stderr == "" or "Traceback" not in done.stderr, done.stderr
    names = {"python", "torch", "triton", "GPU", "C++ compiler", "transformers", "entry point"}
    for name in names:
        line = next(x for x in lines if x[7:].startswith(name))
        assert line[2:5] in ("yes", "no ")
        if line[2:5] == "no ":
            assert "fix: " in lines[lines.index(line) + 1]
    works = not any("no   torch" in x or "no   backend" in x for x in lines)
    assert done.returncode == (0 if works else 1), done.stdout
    assert lines[-1].startswith("dsv4fuse can") and works == ("cannot" not in lines[-1])


def test_each_no_of_the_doctor_has_a_fix():
    assert all(check.ok or check.fix for check in doctor.examine())


def test_doctor_survives_a_check_that_throws(monkeypatch):
    def _gpu():
        raise OSError("driver\nmissing")

    check = doctor._guarded(_gpu)
    assert not check.ok and check.found == "OSError: driver missing" and check.fix


def test_doctor_without_compilers(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    assert not doctor._cxx().ok and "eager" in doctor._cxx().fix
    assert not doctor._cc().ok
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX=no-such-compiler" in doctor._cxx().found


def test_doctor_reads_versions(monkeypatch):
    import torch

    assert doctor._torch().ok
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert not doctor._torch().ok and "older than 2.11" in doctor._torch().found
    missing = doctor._library("surely_not_installed", (1, 0), "Install it.")
    assert missing.found == "not installed" and not missing.ok


def test_doctor_says_why_a_fusion_has_no_kernel():
    check = doctor._fusion("surely_no_such_fusion")
    assert not check.ok and "no kernel" in check.found and check.fix


def test_verdicts():
    yes = [doctor.Check(n, True, "") for n in ("torch", "GPU", "triton", "C compiler")]
    assert "run its kernels" in doctor.verdict(yes)
    no_torch = doctor.Check("torch", False, "", "Install it.", required=True)
    assert doctor.verdict([no_torch]) == "dsv4fuse cannot work here: torch."
    assert "references" in doctor.verdict([doctor.Check("C++ compiler", True, "")])
    assert "eager" in doctor.verdict([])


def test_help_names_every_command_and_the_version_is_the_packages():
    shown = run("--help").stdout
    for command in ("explain", "bisect", "bench", "fusions", "doctor"):
        assert f"\n  {command} " in shown
        assert run(command, "--help").exit_code == 0
    assert run("--version").stdout == f"dsv4fuse {dsv4fuse.__version__}\n"


def test_fusions_are_listed():
    shown = run("fusions").stdout
    assert all(f"{name}\n" in shown for name in registry())
    assert "of Inductor's time" in shown


def test_the_tables_of_a_page_are_renewed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- fusions -->\nstale\n<!-- /fusions -->\nbehind\n")
    assert run("fusions", "--write", str(page)).exit_code == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nbehind\n") and "stale" not in text
    assert all(f"| `{name}` |" in text for name in registry())
    page.write_text("<!-- fusions -->")
    result = run("fusions", "--write", str(page))
    assert result.exit_code == 2 and "needs <!-- /fusions -->" in result.stderr
    assert run("fusions", "--write", str(tmp_path / "none.md")).exit_code == 2
