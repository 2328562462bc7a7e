"""The report as a page: what stands on it, that nothing on it comes from elsewhere."""

from __future__ import annotations

import html.parser
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import dsv4fuse
from dsv4fuse import html as page
from dsv4fuse.__main__ import app
from dsv4fuse.report import Break, Report, Site

VOID = {"meta", "wbr", "br"}


def over_two(x):
    gate, up = x.float().chunk(2, dim=-1)
    below = 2 + torch.exp(-gate)  # differs
    return (gate / below * up).to(x.dtype)


class Page(html.parser.HTMLParser):
    """The text of a page, its tags and their attributes; unbalanced tags are an error."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(source)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


def report() -> Report:
    sites = [
        Site("swiglu", "taken", f"layers.{i}.mlp", __file__, 3, "It is <fused> & fine.",
             detail={"µs": {"inductor": 8.0, "ours": 2.0, "measured": "here"}})
        for i in range(3)
    ]  # fmt: skip
    sites.append(Site("swiglu", "declined", "head", "", 0, "Inductor is faster here."))
    sites.append(Site("router", "taken", "layers.0.gate", "gone.py", 9, "Top-k.", graph=1))
    breaks = [Break("A call of print.", __file__, 5)]
    return Report(sites, breaks, graphs=2, notes=["Something to note."], seconds=1.5)


def test_what_stands_on_it():
    shown = Page(report().to_html())
    for words in ("4 of 5 sites fused in 2 graphs, 1 break", "layers.{0..2}.mlp", "×3", "Graph 1",
                  "It is <fused> & fine.", "8.00 µs", "2.00 µs", "A call of print.", "gone.py:9",
                  "Something to note.", "from __future__ import annotations"):  # fmt: skip
        assert words in shown.text, words
    assert dsv4fuse.__version__ in shown.text and "To look at" not in shown.text


def test_nothing_comes_from_elsewhere():
    source = report().to_html()
    shown = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(shown.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in shown.attributes}
    assert not any(name.startswith("on") for name, _ in shown.attributes)
    assert not re.search(r"url\(|@import|https?:", source)


def test_bars_are_as_long_as_the_counts():
    router, swiglu = page.bars(report())
    assert swiglu.parts == (("taken", 3, 75.0), ("declined", 1, 25.0))
    assert router.parts == (("taken", 1, 25.0),)


def test_a_near_miss_quotes_the_users_line(tmp_path):
    found = dsv4fuse.explain(over_two, torch.randn(4, 64).bfloat16(), options={"select": "always"})
    file = tmp_path / "report.html"
    source = found.to_html(file)
    assert file.read_text(encoding="utf-8") == source
    (meant,) = set(re.findall(r'<span class="meant">(.*?)\n', source))  # above and in its graph
    assert meant.endswith("below = 2 + torch.exp(-gate)  # differs")
    shown = Page(source)
    assert "it wants 1 and finds 2" in shown.text
    assert "gate, up = x.float().chunk(2, dim=-1)" in shown.text, "the line before"


def test_quotes_that_cannot_be_made():
    assert page.quote("", 0) == () and page.quote("gone.py", 3) == ()
    assert page.quote(__file__, 10**6) == () and page.quote(__file__, 0) == ()
    first, *_ = page.quote(__file__, 1)
    assert first.meant and first.number == 1


def test_a_quote_has_no_common_indentation():
    lines = inspect.getsource(over_two).splitlines()
    at = inspect.getsourcelines(over_two)[1] + 3
    quoted = page.quote(__file__, at)
    assert quoted[2].text == lines[3].strip() and quoted[2].meant
    assert len(quoted) == 3, "blank lines behind it are left out"


def test_an_empty_report():
    assert "No place in any graph" in Page(Report().to_html()).text


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(vars(dsv4fuse), "explain", lambda *args, **kwargs: report())
    monkeypatch.setattr("dsv4fuse.__main__.build", lambda factory: (F.silu, (), {}))
    file = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["explain", "a.b:c", "--html", str(file)])
    assert result.exit_code == 0 and "It is <fused>" in Page(file.read_text()).text
    missing = CliRunner().invoke(app, ["explain", "a.b:c", "--html", str(tmp_path / "no" / "r")])
    assert missing.exit_code == 2 and "could not be written" in missing.stderr


@pytest.mark.parametrize("path", ["a.b.c", "x/y.py:3", "layers.{0..3}.mlp", "<a>&.b"])
def test_breakable_paths_keep_their_text(path):
    assert Page(f"<p>{page._breakable(path)}</p>").text == path
