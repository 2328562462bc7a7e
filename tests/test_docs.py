"""README.md and docs/: commands and snippets run as printed, tables and pictures are current."""

from __future__ import annotations

import ast
import inspect
import json
import pathlib
import re

import pytest
import typer

import dsv4fuse
from dsv4fuse import catalog
from dsv4fuse.__main__ import app
from dsv4fuse.bench import fusions, fusions_plot, models_plot, runs
from dsv4fuse.fusion import registry

from ._pages import Block, Sandbox, blocks, pages, plain

ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCKS = blocks(ROOT)
WORKED = "docs/adding-a-fusion.md"  # a page whose files go into a checkout of its own
MARKS = {"long": [pytest.mark.long], "gpu": [pytest.mark.gpu, pytest.mark.long]}
KNOWN = {"", "long", "gpu"}


def those(language: str, word: str | None = None) -> list[Block]:
    return [b for b in BLOCKS if b.language == language and b.page != WORKED
            and (word is None or b.word == word)]  # fmt: skip


def params(given: list[Block]) -> list[object]:
    return [pytest.param(b, id=b.name, marks=MARKS.get(b.word, [])) for b in given]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Sandbox:
    made = Sandbox(ROOT, tmp_path_factory.mktemp("docs"))
    (install,) = those("sh")[0].commands
    assert install == "pip install -e ."
    made.shell(install)
    return made


@pytest.fixture(scope="module")
def printed(sandbox) -> dict[str, tuple[str, str]]:
    """All short snippets in one process: most of what one takes is the import of torch."""
    return sandbox.python(those("python", ""))


def agrees(block: Block, output: str) -> None:
    assert plain(block.shown) in plain(output), f"{block.name} prints\n{output}"


pytestmark = pytest.mark.xdist_group("docs")


def test_every_block_is_known():
    for b in BLOCKS:
        known = b.word in KNOWN or b.word.startswith("file=") and b.page == WORKED
        assert b.language in ("sh", "python") and known, b.name
    assert len(those("sh")) > 5 and len(those("python", "")) > 5


@pytest.mark.slow
@pytest.mark.parametrize("block", params(those("sh")))
def test_commands(block, sandbox):
    agrees(block, "".join(sandbox.shell(command) for command in block.commands))


@pytest.mark.slow
@pytest.mark.parametrize("block", params(those("python", "")))
def test_snippets(block, printed):
    output, error = printed[block.name]
    assert not error, error
    agrees(block, output)


@pytest.mark.parametrize("block", params(those("python", "long")))
def test_long_snippets(block, sandbox):
    output, error = sandbox.python([block])[block.name]
    assert not error, error
    agrees(block, output)


@pytest.mark.long
def test_worked_example(tmp_path):
    own = [b for b in BLOCKS if b.page == WORKED]
    sandbox = Sandbox(ROOT, tmp_path)
    for block in own:
        if block.word.startswith("file="):
            path = sandbox.root / block.word.removeprefix("file=")
            assert not path.exists(), "it must be a new one"
            path.write_text(block.text)
    for block in own:
        if block.language == "sh" and block.word != "gpu":
            out = "".join(sandbox.shell(command) for command in block.commands)
            wanted = " passed" if "pytest" in block.text else "_squared_relu_kernel"
            assert wanted in out and "failed" not in out, out
        elif block.word == "long":
            output, error = sandbox.python([block])[block.name]
            assert not error, error
            agrees(block, output)


@pytest.mark.parametrize("page", pages(ROOT))
def test_page_is_current(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    again = f"python -m dsv4fuse fusions --write {page}"
    assert catalog.renewed(text, ROOT) == text, f"{page} is not current: {again}"


@pytest.mark.parametrize("page", [*pages(ROOT), "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target).exists(), target


def test_named_commands_exist():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages(ROOT))
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"python -m dsv4fuse ([a-z]+)", text)) <= set(commands)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("text", ["<!-- fusions -->\n", "<!-- nonsense -->\n<!-- /nonsense -->"])
def test_a_wrong_marker_is_an_error(text):
    with pytest.raises(catalog.MarkerError, match="needs <!-- /"):
        catalog.renewed(text, ROOT)


# Pictures ----------------------------------------------------------------------------------------

PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))


def made_of(path: pathlib.Path) -> str:
    """The digest of what a picture shows, from the files as they are now."""
    measured = ROOT / "kernels" / f"{path.stem}.json"
    if measured.exists():
        rows, _ = fusions.load(measured)
        return fusions_plot.made_of([r for r in rows if r.model == "flash"])
    (command,) = (c for b in those("sh") for c in b.commands if "--e2e" in c and path.name in c)
    files = re.findall(r"--from (\S+)", command)
    return models_plot.made_of([run for file in files for run in runs.load(ROOT / file)[0]])


@pytest.mark.parametrize("path", PICTURES, ids=lambda p: p.stem)
def test_picture_is_current(path):
    assert made_of(path) in path.read_text(), f"{path.name} is not current: make docs"


def test_every_measured_fusion_has_a_picture():
    measured = {name for name in registry() if catalog.variants(name)}
    assert measured | {"launches"} == {p.stem for p in PICTURES}


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("path", PICTURES, ids=lambda p: p.stem)
def test_picture_is_legible_on_light_and_dark(path):
    """A ratio of 3 on both, what WCAG asks of graphics; no ground of its own in between."""
    text = path.read_text()
    colours = set(re.findall(r"#[0-9a-f]{6}\b", text)) - {"#000000"}
    assert colours and "fill: #ffffff" not in text
    for colour in colours:
        for ground in (1.0, luminance("#0d1117")):
            bright, dark = sorted((luminance(colour), ground), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 3, colour


def test_what_inductor_launches_is_not_called_ours():
    profile = runs.Profile("inductor", families={"dsv4fuse": (4, 0.1), "Inductor": (5, 1.0)})
    assert models_plot.parts(profile, 0)["dsv4fuse"] == 0
    assert models_plot.parts(profile, 0)["others"] == 4


# Where fusions are taken -------------------------------------------------------------------------


@pytest.mark.long
def test_sites_are_current(sandbox):
    """What ``python -m examples.sites`` finds now is what is committed."""
    file = sandbox.root / "examples" / "results" / "sites.json"
    before = json.loads(file.read_text())["models"]
    sandbox.shell("python -m examples.sites")
    assert json.loads(file.read_text())["models"] == before


# Docstrings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_kernel_says_what_it_takes(path):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    for word in ("Math", "Shapes", "Dtypes", "Source"):
        assert f"\n{word}" in doc, word


@pytest.mark.parametrize("name", [n for n in dsv4fuse.__all__ if n not in ("__version__", "ops")])
def test_every_public_name_has_a_docstring(name):
    value = getattr(dsv4fuse, name)
    assert inspect.getdoc(value)
    if isinstance(value, type):
        own = {n: v for n, v in vars(value).items() if not n.startswith("_") and callable(v)}
        assert all(inspect.getdoc(v) for v in own.values()), own
