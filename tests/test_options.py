"""Options: what is accepted, what is refused, and that the refusal says what to write."""

from __future__ import annotations

import dataclasses
import json
import pickle

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsv4fuse.options import CHOICES, OptionError, Options, disabled

KNOWN = ("norm_rope_cache", "clamp_swiglu_quant", "inverse_rope_quant")


def refusal(value) -> str:
    with pytest.raises(OptionError) as caught:
        Options.parse(value, KNOWN)
    message = str(caught.value)
    assert message.endswith((".", "?")), "the message is a sentence"
    assert len(message) < 600
    return message


def test_nothing_given_means_the_defaults():
    assert Options.parse(None, KNOWN) == Options() == Options.parse({}, KNOWN)
    assert Options().numerics == "faithful" and Options().verify and Options().fusions is None


def test_lists_and_sets_become_immutable():
    options = Options.parse(
        {"fusions": ["norm_rope_cache"], "exclude": {KNOWN[1]}, "expect": {KNOWN[0]: 3}},
        KNOWN,
    )
    assert options.fusions == ("norm_rope_cache",)
    assert options.exclude == (KNOWN[1],)
    hash(options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.verify = False
    assert pickle.loads(pickle.dumps(options)) == options


def test_the_callers_mapping_is_copied():
    expect = {KNOWN[0]: 3}
    options = Options(expect=expect)
    expect[KNOWN[0]] = 4
    assert options.expect == {KNOWN[0]: 3}


def test_unknown_option_lists_all_and_suggests():
    message = refusal({"numeric": "precise"})
    assert "'numeric'" in message and "Did you mean 'numerics'?" in message
    for field in dataclasses.fields(Options):
        assert repr(field.name) in message


def test_inductor_options_are_refused_with_the_way_out():
    assert "torch._inductor.config" in refusal({"max_autotune": True})


@pytest.mark.parametrize("option", ["fusions", "exclude"])
def test_unknown_fusion(option):
    message = refusal({option: ["Norm-Rope-Cach"]})
    assert option in message and "Did you mean 'norm_rope_cache'?" in message
    assert all(repr(name) in message for name in KNOWN)


def test_unknown_fusion_without_any_registered():
    with pytest.raises(OptionError, match="There is no fusion to name"):
        Options.parse({"fusions": ["x"]}, ())


def test_options_objects_are_checked_against_the_registry_too():
    assert "'nope'" in refusal(Options(fusions=("nope",)))
    assert "'nope'" in refusal({"expect": {"nope": 1}})


def test_expecting_what_is_switched_off():
    assert "switches that fusion off" in refusal({"exclude": [KNOWN[0]], "expect": {KNOWN[0]: 1}})
    Options.parse({"exclude": [KNOWN[0]], "expect": {KNOWN[0]: 0}}, KNOWN)


@pytest.mark.parametrize("option", CHOICES)
def test_choices(option):
    for value in CHOICES[option]:
        assert getattr(Options.parse({option: value}, KNOWN), option) == value
    message = refusal({option: CHOICES[option][0].upper()})
    assert f"Did you mean {CHOICES[option][0]!r}?" in message
    assert all(repr(value) in message for value in CHOICES[option])
    assert "NoneType" in refusal({option: None})


@pytest.mark.parametrize(
    ("given_value", "says"),
    [
        ({"verify": 1}, "True or False, not int (1)"),
        ({"strict": "false"}, "True or False, not str ('false')"),
        ({"fusions": "norm_rope_cache"}, "fusions=['norm_rope_cache']"),
        ({"exclude": None}, "list of names, not NoneType"),
        ({"exclude": {"norm_rope_cache": 1}}, "list of names, not dict"),
        ({"exclude": [3]}, "holds int (3)"),
        ({"expect": 3}, "map names of fusions to counts"),
        ({"expect": {"norm_rope_cache": True}}, "count of 0 or more"),
        ({"expect": {"norm_rope_cache": -1}}, "count of 0 or more"),
        ({"expect": {3: 3}}, "names as keys"),
        ({3: 3}, "no option 3"),
        ([("strict", True)], "must be a mapping"),
        ("strict", "must be a mapping"),
    ],
)
def test_wrong_types_and_values(given_value, says):
    assert says in refusal(given_value)


def test_constructor_checks_values_as_well():
    with pytest.raises(OptionError):
        Options(numerics="fast")
    with pytest.raises(TypeError):
        Options(numeric="faithful")


def test_wants():
    assert Options().wants("a")
    assert not Options(exclude=("a",)).wants("a")
    assert Options(fusions=("a",)).wants("a") and not Options(fusions=("a",)).wants("b")
    assert not Options(fusions=("a",), exclude=("a",)).wants("a")
    assert not Options(fusions=()).wants("a")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "fusions": st.none() | st.lists(st.sampled_from(KNOWN)),
            "verify": st.booleans(),
            "strict": st.booleans(),
            "autotune": st.booleans(),
            "expect": st.none() | st.dictionaries(st.sampled_from(KNOWN), st.just(0)),
            **{name: st.sampled_from(values) for name, values in CHOICES.items()},
        },
    )
)
def test_round_trip_through_json(mapping):
    options = Options.parse(mapping, KNOWN)
    again = Options.parse(json.loads(json.dumps(options.to_dict())), KNOWN)
    assert again == options and hash(again) == hash(options)
    assert list(again.to_dict()) == [field.name for field in dataclasses.fields(Options)]


def test_equal_sets_have_equal_texts():
    one, two = Options(exclude={"a", "b", "c"}), Options(exclude={"c", "b", "a"})
    assert json.dumps(one.to_dict()) == json.dumps(two.to_dict())


@pytest.mark.parametrize(
    ("value", "off"),
    [("1", True), ("true", True), ("yes", True), ("", False), ("0", False), (" False ", False)],
)
def test_environment_switch(monkeypatch, value, off):
    monkeypatch.setenv("DSV4FUSE_DISABLE", value)
    assert disabled() is off


def test_environment_switch_unset(monkeypatch):
    monkeypatch.delenv("DSV4FUSE_DISABLE", raising=False)
    assert disabled() is False
