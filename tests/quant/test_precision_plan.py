"""A precision plan as a file: written and read back the same, and refused, with its place, where it cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from edgekit.errors import BadRequest
from edgekit.quant.choices import CHOICES
from edgekit.quant.plan import (
    PLAN_FORMAT,
    Error,
    PartChoices,
    PrecisionPlan,
    Rewrite,
    counts,
    encode_plan,
    parse_plan,
    read_plan,
)

NAMES = st.text(min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
REWRITES = st.builds(Rewrite, st.sampled_from(["bos", "shortcut", "smooth"]), NAMES, st.text(max_size=6))
PARTS = st.builds(
    PartChoices,
    units=st.dictionaries(NAMES, st.sampled_from(sorted(CHOICES)), max_size=5),
    ranges=st.dictionaries(NAMES, st.tuples(NUMBERS, NUMBERS), max_size=3),
    rewrites=st.lists(REWRITES, max_size=3).map(tuple),
    model=st.text(alphabet="0123456789abcdef", max_size=64),
)
PLANS = st.builds(
    PrecisionPlan,
    target=NAMES,
    parts=st.dictionaries(NAMES, PARTS, max_size=3),
    budgets=st.dictionaries(NAMES, NUMBERS, max_size=2),
    caps=st.dictionaries(NAMES, NUMBERS, max_size=2),
    bytes=st.integers(0, 2**50),
    milliseconds=st.none() | NUMBERS,
    errors=st.lists(st.builds(Error, NAMES, st.none() | NUMBERS, st.none() | NUMBERS), max_size=2).map(tuple),
    calibration=st.text(max_size=8),
    method=st.text(max_size=8),
    notes=st.lists(st.text(max_size=8), max_size=2).map(tuple),
)


def small() -> PrecisionPlan:
    """Two parts, every field in use."""
    return PrecisionPlan(
        target="cpu:vnni",
        parts={
            "unet": PartChoices(
                {"conv_in": "fp16", "to_q": "w8a8"},
                {"x": (-1.0, 2.0)},
                (Rewrite("bos", "to_k", "text"), Rewrite("shortcut", "skip")),
                "a" * 64,
            ),
            "text_encoder": PartChoices({"fc1": "w4a16-32"}),
        },
        budgets={"bytes": 1e6},
        caps={"content": 0.02},
        bytes=12345,
        milliseconds=1.5,
        errors=(Error("content", 0.1, 0.2), Error("quality", predicted=0.3)),
        calibration="c" * 64,
        method="unet: probe+scan",
        notes=("one", "two"),
    )


def raw(**changes: Any) -> bytes:
    """The small plan's JSON with some keys replaced."""
    return json.dumps(json.loads(encode_plan(small())) | changes).encode()


@settings(max_examples=100, deadline=None)
@given(plan=PLANS)
def test_a_plan_reads_back_as_it_was(plan: PrecisionPlan) -> None:
    """Every field, every digit, and the same bytes again."""
    written = encode_plan(plan)
    again = parse_plan(written, "it")
    assert again == plan
    assert encode_plan(again) == written


def test_a_person_can_read_and_change_it(tmp_path: Path) -> None:
    """A line for each unit; a line changed in an editor is a unit changed, and nothing else."""
    text = encode_plan(small()).decode()
    assert text.count('"to_q": "w8a8"') == 1
    assert text.endswith("}\n")
    path = tmp_path / "plan.json"
    path.write_text(text.replace('"to_q": "w8a8"', '"to_q": "fp16"'))
    plan = read_plan(path)
    assert plan.parts["unet"].units == {"conv_in": "fp16", "to_q": "fp16"}
    assert plan.parts["unet"].ranges == small().parts["unet"].ranges
    assert plan.parts["text_encoder"] == small().parts["text_encoder"]


def test_the_format_is_always_written() -> None:
    """Another edgekit must see which format it reads, also where its own default differs."""
    assert json.loads(encode_plan(PrecisionPlan("cpu", {})))["format"] == PLAN_FORMAT


def test_a_short_plan_is_enough() -> None:
    """Whoever writes one by hand names a target, parts and units; the rest has defaults."""
    plan = parse_plan(b'{"target": "trt", "parts": {"unet": {"units": {"a": "fp8"}}}}', "it")
    assert plan == PrecisionPlan("trt", {"unet": PartChoices({"a": "fp8"})})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "no precision plan"),
        (b"\xff\xfe", "no precision plan"),
        (b"[]", "no precision plan"),
        (b'{"target": "cpu"}', "parts"),
        (raw()[:-3], "no precision plan"),
        (raw(format=PLAN_FORMAT + 1), f"has format {PLAN_FORMAT + 1}; this edgekit reads {PLAN_FORMAT}"),
        (raw(format=0), "format"),
        (raw(bytes="many"), "bytes"),
        (raw(colour="red"), "colour"),
        (raw(parts={"unet": {"units": {"a": "w3a16"}}}), "unet/a is to be 'w3a16'; known: fp32, fp16"),
        (raw(parts={"unet": {"units": {}, "rewrites": [{"kind": "magic", "node": "a"}]}}), "magic"),
        (raw(parts={"unet": {"units": {}, "ranges": {"x": [1.0]}}}), "ranges"),
    ],
)
def test_what_is_no_plan_is_refused(text: bytes, said: str) -> None:
    """It says which file, and what is wrong with it."""
    with pytest.raises(BadRequest) as caught:
        parse_plan(text, "some/plan.json")
    assert "some/plan.json" in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Neither a missing file nor a folder is a plan."""
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BadRequest, match=r"name a plan that `edgekit plan`") as caught:
            read_plan(path)
        assert str(path) in str(caught.value)


@given(units=st.dictionaries(NAMES, st.sampled_from(sorted(CHOICES)), max_size=12))
def test_units_are_counted_by_choice(units: dict[str, str]) -> None:
    """As one would count them, in the order of CHOICES, none that is not taken."""
    found = counts(units)
    assert sum(found.values()) == len(units)
    assert list(found) == [name for name in CHOICES if name in units.values()]
    for name, total in found.items():
        assert total == list(units.values()).count(name)
