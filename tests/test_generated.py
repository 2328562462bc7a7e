"""Generated programs are fused as stated and equal eager; generated mutants never pass for them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from dsv4fuse.kernels import _common as common
from dsv4fuse.patterns import norm_rope_cache
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dsv4fuse import catalog

from .generate import __main__ as runner
from .generate import _check, _draws, _mutants, _programs, _record, _ways, host_sync
from .generate._found import FOUND, FOUND_BETWEEN, FOUND_SIZES
from .generate._hand import Hand

# One example is one to three sequences; the profile "long" draws thousands.
FEW = settings(
    max_examples=max(6, settings.default.max_examples // 10),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """Fused ops run their references: what is tested here is which of them are put where."""
    monkeypatch.setattr(common, "INTERPRETED", False)


def _whole(outcome: _check.Outcome) -> None:
    assert not outcome.crash, f"{outcome.program}\n{outcome.crash}"
    assert not outcome.invalid, f"{outcome.program}\n{outcome.invalid}"
    assert not outcome.wrong, f"{outcome.program}\n{outcome.wrong}"
    assert not outcome.missed, f"{outcome.program}\n{outcome.missed}"


@pytest.mark.parametrize("name", list(_programs.families()))
def test_each_family(name):
    """The first choice of each piece: one site of every family, whatever else is drawn."""
    _whole(_check.check(_programs.families()[name](Hand(_first))))


def _first(strategy):
    return strategy.elements[0]


@pytest.mark.parametrize("name", [*FOUND, *FOUND_BETWEEN])
def test_what_was_found_once(name):
    family, words = {**FOUND, **FOUND_BETWEEN}[name]
    site = _programs.families()[family](Hand(_first, words))
    assert site.words.items() >= words.items()
    _whole(_check.check(_programs.joined([site], name in FOUND_BETWEEN)))


@pytest.mark.parametrize("name", FOUND_SIZES)
def test_one_graph_for_two_sizes(name):
    family, words = FOUND_SIZES[name]
    what = "rows" if "rows" in words else "S"
    _whole(_ways.two_sizes(*(
        _programs.families()[family](Hand(_first, {**words, what: size})) for size in ("3", "5")
    )))  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("way", _ways.WAYS)
@FEW
@given(st.data())
def test_every_way_in(way, data):
    _whole(_check.check(_programs.program(data.draw), _ways.WAYS[way]))


@FEW
@given(st.data())
def test_programs(data):
    outcome = _check.check(_programs.program(data.draw))
    assert not outcome.crash, f"{outcome.program}\n{outcome.crash}"
    assert not outcome.wrong, f"{outcome.program}\n{outcome.wrong}"


@FEW
@given(st.data())
def test_constants_of_the_host(data):
    outcome = host_sync.check(host_sync.constants(Hand(data.draw)))
    assert not outcome.wrong and not outcome.missed, outcome
    found = host_sync.mutant(data.draw)
    assert found is None or not (found.wrong or found.taken), found


@FEW
@given(st.data())
def test_mutants_of_pieces(data):
    two = _programs.mutant(data.draw)
    if two is not None:
        found = _mutants.of_pieces(*two)
        assert not found.wrong and not found.crash, found


@FEW
@given(st.data())
def test_mutants_of_graphs(data):
    """By the terms alone, and by the check on random inputs alone."""
    found = _mutants.of_graph(_programs.site(data.draw), data.draw)
    if found is not None:
        assert not found.wrong and not found.crash, found


def test_the_sign_of_a_nan_is_nobodys():
    """Where an eps is subtracted, rows are NaN, and bytes of them are stored: of either sign. Other
    bytes are told apart all the same."""
    words = {"seed": "8", "norm": "none_index", "norm eps": "0.25", "bytes": "pow2_reciprocal"}
    site = _programs.families()["norm_rope_cache: packed"](Hand(_first, words))
    every = _mutants.every(site, ("another operation",))
    found = next(m for m in every if m.edit.endswith("at add = aten.add.Tensor"))
    assert found.taken and not found.wrong and not found.crash, found
    reads = _check.Site("", {}, lambda x: x.view(torch.uint8), (torch.tensor([torch.nan]),), {})
    codes, negative, others = (torch.tensor([n, 1], dtype=torch.uint8) for n in (127, 255, 126))
    assert not _check.further_off(reads, [codes], [negative])
    assert "integers differ" in _check.further_off(reads, [codes], [others])
    none = dataclasses.replace(reads, inputs=(torch.ones(1),))
    assert "integers differ" in _check.further_off(none, [codes], [negative])


def test_a_mutant_of_what_nobody_wrote_is_none():
    """Lanes of an empty tensor in the place of what would be written to them: any bits at all."""
    words = {"rope": "real assignment_into_empty"}
    site = _programs.families()["norm_rope_cache: q or kv"](Hand(_first, words))
    found = list(_mutants.every(site, ("operands exchanged", "negated")))
    copies = [m for m in found if m.edit.startswith("operands exchanged at copy")]
    assert len(copies) == 2 and all(m.void for m in copies), copies
    assert sum(not m.void for m in found) > 5, found


# The check's own power, at edits that it must see whatever is drawn.
SEEN = ("negated", "lanes rolled", "another tensor", "operands exchanged")


@pytest.mark.parametrize("name", ["norm_quant: latent", "clamp_swiglu_quant: gate and up"])
def test_the_check_refuses_what_a_loose_matcher_would_take(name):
    """Every such edit at every node, forced on the original's fused op."""
    said = []
    site = _programs.families()[name](Hand(_first, {"quant": "yes", "clamp": "clamp"}))
    for found in _mutants.every(site, SEEN):
        if not found.void and found.forced:
            said.append((found.edit, found.forced))
    assert len(said) > 10 and {s for _, s in said} <= {"rejected", "equal"}, said
    assert sum(s == "rejected" for _, s in said) > 0.7 * len(said), said


def test_the_check_sees_a_rounding_that_the_fused_op_lacks():
    """The fused op is then nearer to exact arithmetic than the module: another function all the
    same."""
    site = _programs.families()["hyper_connections: head"](Hand(_first, {"dtype": "fp32"}))
    found = [m for m in _mutants.every(site, ("rounded",)) if not m.void and m.forced]
    said = [m.forced for m in found]
    assert len(said) > 5 and set(said) <= {"rejected", "equal"}, [(m.edit, m.forced) for m in found]
    assert said.count("rejected") > 0.7 * len(said), said


def test_a_write_of_the_last_row_alone_is_checked():
    """Of rows that indices choose the last may be written twice; of no other is it left out."""
    words = {"write": "one row from the end", "norm or none": "norm"}
    site = _programs.families()["norm_rope_cache: kv written"](Hand(_first, words))
    found = [m for m in _mutants.every(site, ("negated",)) if m.forced]
    assert found and {m.forced for m in found} <= {"rejected", "equal"}, found
    assert any(m.forced == "rejected" for m in found)


def test_an_op_that_refuses_its_arguments_refuses_the_mutant():
    """Where a product's operands lie, the op takes them or does not: neither is a crash."""
    words = {"dots": "matmul", "total": "matmul", "dtype": "fp16", "mask": "no mask"}
    site = _programs.families()["indexer: logits"](Hand(_first, words))
    found = [m for m in _mutants.every(site, ("rounded",)) if not m.void]
    assert len(found) > 5 and not any(m.crash for m in found), [m for m in found if m.crash]
    assert {m.forced for m in found} <= {"rejected", "equal"}, found


def test_two_ways_to_the_graph_are_one():
    """The light tracer shows the pass what torch.compile does."""
    for name in ("norm_rope_cache: kv written", "inv_rope_quant: in groups"):
        site = _programs.families()[name](Hand(_first))
        light, heavy = (_check.check(site, way) for way in (_check.fused, _ways.function))
        _whole(light), _whole(heavy)
        assert light.taken == heavy.taken


def test_a_wrong_program_is_counted():
    """What the runner calls wrong, missed and a crash."""
    site = _programs.families()["clamp_swiglu_quant: gate and up"](Hand(_first))
    tally = _draws.Tally()

    def off(fn, args):
        report, found = _check.fused(fn, args)
        return report, found + 1

    def dead(fn, args):
        raise ValueError("dead")

    _draws._add(tally, _check.check(site, off), 0)
    _draws._add(tally, _check.check(site, dead), 0)
    _draws._add(tally, _check.check(_check.stated(site, {"norm_quant": 1})), 0)
    assert tally.counts["wrong"] == tally.counts["crash"] == 1
    assert tally.counts["missed norm_quant"] == 1 and tally.counts["programs"] == 3


def test_a_lost_cache_write_is_missed(monkeypatch):
    """A site that is fused up to its write, and no further, is not what was stated."""
    site = _programs.families()["norm_rope_cache: kv written"](Hand(_first))
    other = _programs.families()["norm_rope_cache: q or kv"](Hand(_first))
    both = _programs.joined([site, site, other])
    outcome = _check.check(both)
    _whole(outcome)
    assert outcome.taken == both.counts == {"norm_rope_cache": 3}
    monkeypatch.setattr(norm_rope_cache, "with_write", lambda *_: None)
    outcome = _check.check(both)
    assert outcome.taken == {"norm_rope_cache": 1} and not outcome.wrong
    ((fusion, said),) = outcome.missed
    assert fusion == "norm_rope_cache" and said.startswith("1 of 3") and "rope" in said


def test_runs_are_kept_once(tmp_path):
    """The same seeds at the same commit replace what is kept of them; the table adds up."""
    file = tmp_path / "tests" / "generated.json"
    file.parent.mkdir()
    tally = _draws.Tally()
    site = _programs.families()["clamp_swiglu_quant: gate and up"](Hand(_first))
    _draws._add(tally, _check.check(site), 0)
    for tasks in (1, 1, 2):
        _record.keep(_record.row(tally, 0, tasks, 3.0), file)
    runs = json.loads(file.read_text())
    assert [r["seeds"] for r in runs] == [[0, 0], [0, 1]]
    assert "| 1 | 1 | 1 (100.00 %) | 0 |" in catalog.generated_table(tmp_path)


@pytest.mark.long
def test_the_runner(tmp_path, monkeypatch):
    record = tmp_path / "generated.json"
    monkeypatch.setattr(_record.keep, "__defaults__", (record,))
    path = tmp_path / "summary.json"
    arguments = ["--programs", "10", "--workers", "1", "--only", "clamp", "--keep"]
    arguments += ["--json", str(path)]
    done = CliRunner().invoke(runner.app, arguments)
    assert done.exit_code == 0, done.output
    (kept,) = json.loads(record.read_text())
    assert kept["programs"] == 10 and kept["seeds"] == [0, 0] and kept["bad"] == {}
    assert kept["taken"] == kept["sites"]
    counts = json.loads(path.read_text())["counts"]
    assert counts["programs"] == 10 and counts["mutants"] > 2
    assert counts["taken clamp_swiglu_quant"] == counts["sites clamp_swiglu_quant"] >= 10
