"""Reports: counting, merging, JSON, complaints, and the printed form at every width."""

from __future__ import annotations

import io
import json
import pickle
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from rich.console import Console

from dsv4fuse import clock, render
from dsv4fuse.options import Options
from dsv4fuse.report import Break, FusionError, Report, Site

WHY = "The weight is fp32 while the activation is bf16 [wanted bf16]; cast the weight once."


def site(fusion="norm_rope_cache", status="taken", module="model.layers.0.attn", **more) -> Site:
    values = {"file": "/src/model.py", "line": 12, "reason": "It is fused."} | more
    return Site(fusion, status, module, **values)


@pytest.fixture
def report() -> Report:
    sites = [site(module=f"model.layers.{i}.attn", detail={"M": i}) for i in range(43)]
    sites += [
        site("clamp_swiglu_quant", "declined", "model.layers.3.mlp", reason="Inductor is faster."),
        site("inverse_rope_quant", "near-miss", "model.layers.4.attn", reason=WHY, line=99),
        site("inverse_rope_quant", "near-miss", "model.layers.5.attn", reason=WHY, line=99),
    ]
    return Report(sites, [Break("print() breaks the graph.", "/src/model.py", 7)], 2, ["A note."])


def test_counts_only_taken(report):
    assert report.counts() == {"norm_rope_cache": 43}
    assert len(report.with_status("near-miss", "declined")) == 3


def test_a_site_is_immutable_and_hashable():
    assert len({site(detail={"a": [1]}), site(detail={"a": [1]})}) == 1
    with pytest.raises(AttributeError):
        site().line = 3
    with pytest.raises(ValueError, match="near-miss"):
        site(status="took")


def test_merging_numbers_the_graphs_on(report):
    other = Report([site(graph=0), site(graph=1)], list(report.breaks), 2, ["A note.", "B"], 1.5)
    merged = report + other
    assert [s.graph for s in merged.sites[-2:]] == [2, 3]
    assert merged.graphs == 4 and merged.seconds == 1.5
    assert merged.breaks == report.breaks and merged.notes == ["A note.", "B"]
    assert len(report.sites) == 46 and other.sites[0].graph == 0, "the operands are left alone"
    report += other
    assert report == merged


def test_json_round_trip(report):
    again = Report.from_json(report.to_json())
    assert again == report and again.sites[7].detail == {"M": 7}
    assert pickle.loads(pickle.dumps(report)) == report


def test_json_takes_any_detail():
    detail = {"dtype": torch.bfloat16, "shape": torch.Size([2, 3]), "rules": {"b", "a"}, (1,): 2}
    again = Report.from_json(Report([site(detail=detail)]).to_json(indent=1)).sites[0].detail
    assert again == {"dtype": "torch.bfloat16", "shape": [2, 3], "rules": ["a", "b"], "(1,)": 2}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{}", '{"format": 0}', '{"format": 1}', '{"format": 1, "sites": [{}]}']
    + ['{"format": 1, "sites": [{"fusion": "a", "status": "b"}]}', "\x00\xff", "1"],
)
def test_damaged_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        Report.from_json(text)


def test_met_expectations_pass(report):
    report.check(Options())
    report.check(Options(expect={"norm_rope_cache": 43, "inverse_rope_quant": 0}))


def test_missed_expectation_names_count_and_reason(report):
    with pytest.raises(FusionError) as caught:
        report.check(Options(expect={"inverse_rope_quant": 1, "norm_rope_cache": 44}))
    message = str(caught.value)
    assert "Expected 1 site of 'inverse_rope_quant' to be fused, but 0 were." in message
    assert f"2 near-miss, first at /src/model.py:99: {WHY}" in message
    assert "Expected 44 sites of 'norm_rope_cache' to be fused, but 43 were." in message
    assert caught.value.report is report


def test_expectation_of_a_fusion_never_seen():
    with pytest.raises(FusionError, match="No other place in the graph resembles it"):
        Report().check(Options(expect={"x": 1}))


def test_too_many_is_an_error_as_well(report):
    with pytest.raises(FusionError, match="but 43 were"):
        report.check(Options(expect={"norm_rope_cache": 42}))


def test_strict_complains_once_per_place(report):
    with pytest.raises(FusionError) as caught:
        report.check(Options(strict=True))
    message = str(caught.value)
    assert message.count(WHY) == 1 and "(2 sites)" in message and "drop strict=True" in message
    assert "Inductor is faster" not in message, "a declined site is a choice, not a defect"
    Report([site(), site(status="declined")]).check(Options(strict=True))
    with pytest.raises(FusionError, match="fails the check"):
        Report([site(status="rejected")]).check(Options(strict=True))


def test_folding_is_for_print_only(report):
    assert len(report.sites) == 46
    rows = render.fold(report.sites)
    assert [(r.module, r.count) for r in rows] == [
        ("model.layers.{0..42}.attn", 43),
        ("model.layers.3.mlp", 1),
        ("model.layers.{4,5}.attn", 2),
    ]


@pytest.mark.parametrize(
    ("modules", "folded"),
    [
        (["a.0", "a.2", "a.10", "a.11", "a.12"], ["a.{0,2,10..12} 5"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0,1}.b.{0,1} 4"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.2"], ["a.0.b.{0,1} 2", "a.1.b.{0,2} 2"]),
        (["a[0].b", "a[1].b", "a[2].b"], ["a[{0..2}].b 3"]),
        (["0.a", "1.a"], ["{0,1}.a 2"]),
        (["a.0", "a.0", "a.1", "a.1"], ["a.{0,1} 4"]),
        (["conv2d", "conv3d", "", "{0}.1", "{0}.2"], ["conv2d 1", "conv3d 1", " 1", "{0}.{1,2} 2"]),
    ],
)
def test_folding_names_only_modules_that_are_there(modules, folded):
    rows = render.fold([site(module=m) for m in modules])
    assert [f"{r.module} {r.count}" for r in rows] == folded


def test_different_reasons_and_lines_are_not_folded():
    rows = render.fold([site(module="a.0"), site(module="a.1", line=13), site(module="a.2")])
    assert [(r.module, r.count) for r in rows] == [("a.{0,2}", 2), ("a.1", 1)]


def test_plain_text_is_one_row_a_line_with_nothing_cut(report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    text = str(report)
    line = next(x for x in text.splitlines() if WHY in x)
    assert line.startswith("near-miss") and "/src/model.py:99" in line
    assert "model.layers.{4,5}.attn ×2" in line
    assert "norm_rope_cache     43 taken" in text
    assert "graph break at /src/model.py:7: print() breaks the graph." in text
    assert "note: A note." in text and "\x1b" not in text
    assert all(x == x.rstrip() for x in text.splitlines())


def test_a_reason_of_several_lines_stays_one_row():
    assert "one two" in str(Report([site(reason="one\n  two")]))


def test_piped_print_is_the_plain_text(report):
    out = io.StringIO()
    report.print(out)
    assert out.getvalue() == str(report) + "\n"


def test_print_survives_an_ascii_pipe(report):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    report.print(out)
    assert b"model.layers.{4,5}.attn x2" in raw.getvalue()


@pytest.mark.parametrize("width", [20, 40, 80, 100, 119, 120, 160, 240])
def test_terminal_of_any_width(report, monkeypatch, width):
    out = io.StringIO()

    def console(**kwargs):
        return Console(**(kwargs | {"force_terminal": True, "width": width, "no_color": True}))

    monkeypatch.setattr(render, "Console", console)
    report.print(out)
    lines = re.sub(r"\x1b\[\d+m", "", out.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    # Nothing is lost, whatever the wrapping did: compare the columns without blanks.
    assert "".join(WHY.split()) in squeeze(lines, "The weight is", width)
    assert "norm_rope_cache" in "".join(lines)
    assert ("status" in "".join(lines)) is (width > 100)


def squeeze(lines: list[str], start: str, width: int) -> str:
    """The text of the column in which ``start`` stands, down to the end, without blanks."""
    if width < 40:
        return "".join("".join(lines).split())
    row, column = next((i, x.index(start)) for i, x in enumerate(lines) if start in x)
    return "".join("".join(x[column:] for x in lines[row:]).split())


def test_long_paths_lose_folders_not_names():
    path = "transformers/models/deepseek_v4/modeling.py:412"
    assert render._fit(path, 100) == path
    assert render._fit(path, 40) == "…/models/deepseek_v4/modeling.py:412"
    assert render._fit(path, 3) == "…/modeling.py:412"


@given(
    st.lists(st.tuples(*[st.text("ab/.x é", max_size=70)] * 3), min_size=1, max_size=4),
    st.integers(20, 200),
)
def test_columns_never_lose_text(rows, width):
    cells = [("taken", "f", *row) for row in rows]
    widths = render._widths(cells, width)
    if widths is not None:
        assert sum(widths) + 4 * render._GAP <= width
        for row in cells:
            assert all(len(c) <= w for c, w in zip(row[:3], widths[:3], strict=True))
            assert len(render._fit(row[3], widths[3])) <= widths[3]


def test_empty_report():
    assert str(Report()) == "dsv4fuse: 0 of 0 sites fused in 0 graphs, 0 breaks, 0.00 s"


def test_paths_are_shortened_to_the_library(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert render.short(str(tmp_path / "a" / "m.py"), 3) == "a/m.py:3"
    monkeypatch.syspath_prepend("/venv/site-packages")
    assert render.short("/venv/site-packages/lib/m.py", 0) == "lib/m.py"
    assert render.short("/elsewhere/m.py", 1) == "/elsewhere/m.py:1"
    assert render.short("", 0) == ""


def test_the_seconds_of_each_step_are_its_own(monkeypatch):
    now = iter((0.0, 1.0, 4.0, 5.0, 7.0, 9.0))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    with clock.collecting() as spent:
        with clock.step("outer"):
            with clock.step("inner"):
                pass
        with clock.step("outer"):
            pass
    assert dict(spent) == {"outer": 4.0, "inner": 3.0}
    monkeypatch.undo()
    with clock.step("outside"):  # of a collection: nothing is kept
        pass
    one = Report(seconds=9.0, spent=spent)
    both = Report.from_json((one + one).to_json())
    assert both.spent == {"outer": 8.0, "inner": 6.0}
    assert "9.00 s (outer 4.00, inner 3.00)" in str(one)
    older = json.loads(one.to_json())
    del older["spent"]
    assert Report.from_json(json.dumps(older)).spent == {}
