"""A study: its tables as a problem, budgets as limits, decisions within them, and plans to picks and back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from edgekit.errors import BadRequest, BudgetTooSmall
from edgekit.quant.allocate import Limits, uniform
from edgekit.quant.budget import Budget, parse_budget
from edgekit.quant.choices import CHOICES
from edgekit.quant.study import FLOATS, Row, Study
from tests.quant.studies import NAMES, OF_CONV, made_up

STUDY = made_up()
SHARED = made_up(shared=True)


def fitting(study: Study, seed: int) -> np.ndarray:
    """A random pick of allowed choices."""
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(np.flatnonzero(row)) for row in study.problem().allowed])


# --------------------------------------------------------------------------------------------------- problem


def test_a_problem_is_the_tables() -> None:
    """Names, allowed pairs, bytes, times and the fixed rest are the study's own."""
    problem = STUDY.problem()
    assert problem.units == tuple(row.name for row in STUDY.rows)
    assert problem.units[0] == "text_encoder/block.0.proj"
    assert problem.choices == NAMES
    assert (problem.fixed_bytes, problem.fixed_ms) == (5000, 0.25)
    assert problem.edges == ((1, 2), (2, 3))
    for row, allowed in zip(STUDY.rows, problem.allowed, strict=True):
        assert {name for name, may in zip(NAMES, allowed, strict=True) if may} == set(
            OF_CONV if row.role == "conv" else NAMES
        )
    assert problem.integer.tolist() == [name == "w8a8" for name in NAMES]
    assert STUDY.params == sum(n * k for n, k in (row.shape for row in STUDY.rows))


def test_what_one_metric_lacks_is_not_allowed() -> None:
    """A choice whose error is unknown in any metric is not decided on."""
    table = STUDY.errors["quality"].copy()
    table[2, NAMES.index("w4a16-32")] = np.nan
    allowed = replace(STUDY, errors={**STUDY.errors, "quality": table}).problem().allowed
    assert not allowed[2, NAMES.index("w4a16-32")]
    assert allowed.sum() == STUDY.problem().allowed.sum() - 1


@pytest.mark.parametrize(
    ("patterns", "rows"),
    [
        (("text_encoder/*",), range(3)),
        (("*block.7.proj",), [7]),
        (("block.7.*",), [7]),
        (("block.?.proj", "unet/block.10*"), range(11)),
        (("*",), range(12)),
        ((), []),
    ],
)
def test_protected_rows_keep_their_floats(patterns: tuple[str, ...], rows: object) -> None:
    """By name or by `part/name`; the others may become what they might."""
    allowed, free = STUDY.problem(patterns).allowed, STUDY.problem().allowed
    floats = np.array([name in FLOATS for name in NAMES])
    for at in range(len(STUDY.rows)):
        wanted = free[at] & floats if at in list(rows) else free[at]  # type: ignore[call-overload]
        np.testing.assert_array_equal(allowed[at], wanted)


@pytest.mark.parametrize("pattern", ["nothing", "unet", "vae/*", "BLOCK.1.proj"])
def test_a_pattern_that_names_nothing_is_refused(pattern: str) -> None:
    """It shows what a unit is called; another pattern beside it does not help."""
    with pytest.raises(BadRequest, match=r"names no unit; 'text_encoder/block\.0\.proj'"):
        STUDY.problem(("*", pattern))


# --------------------------------------------------------------------------------------------------- limits


def totals(study: Study, name: str) -> tuple[float, float]:
    """Bytes and milliseconds of one choice wherever it may be taken, floats elsewhere, by hand."""
    column, first = NAMES.index(name), NAMES.index("fp32")
    size, time, integer = float(study.fixed_bytes), study.fixed_ms, []
    for at in range(len(study.rows)):
        taken = column if np.isfinite(study.bytes[at, column]) else first
        size, time = size + study.bytes[at, taken], time + study.milliseconds[at, taken]
        integer.append(CHOICES[NAMES[taken]].activation != "float")
    time += sum(cost for (a, b), cost in zip(study.edges, study.boundary_ms, strict=True) if integer[a] != integer[b])
    return size, time


def limits(study: Study, *texts: str) -> Limits:
    """Of a budget as typed."""
    return study.limits(parse_budget(texts), study.problem())


def test_without_a_budget_it_is_held_to_plain_int8() -> None:
    """The size and the time of `w8a8` everywhere."""
    size, time = totals(STUDY, "w8a8")
    asked = limits(STUDY)
    assert asked.bytes == pytest.approx(size)
    assert asked.milliseconds == pytest.approx(time)


def test_where_nothing_takes_int8_it_is_held_to_w8a16() -> None:
    """Language models in some places have weight-only choices alone."""
    size = STUDY.bytes.copy()
    size[:, NAMES.index("w8a8")] = np.nan
    size[:, NAMES.index("w8a16")] = np.array([CHOICES["w8a16"].weight.bytes(*row.shape) for row in STUDY.rows])
    errors = {name: np.nan_to_num(table) for name, table in STUDY.errors.items()}
    study = replace(STUDY, bytes=size, errors=errors, milliseconds=np.nan_to_num(STUDY.milliseconds))
    assert study.eight_bits == "w8a16"
    assert STUDY.eight_bits == "w8a8"
    assert limits(study).bytes == pytest.approx(totals(study, "w8a16")[0])


def test_a_budget_of_one_kind_leaves_the_other_open() -> None:
    """To the time of the unquantized bundle, or to any size."""
    _, time = totals(STUDY, "fp32")
    assert limits(STUDY, "40KB").bytes == 40_000
    assert limits(STUDY, "40KB").milliseconds == pytest.approx(time)
    assert limits(STUDY, "0.5x").bytes is None
    assert limits(STUDY, "0.5x").milliseconds == pytest.approx(time / 2)
    assert limits(STUDY, "1ms").milliseconds == 1.0
    assert limits(STUDY, "4bits").bytes == pytest.approx(STUDY.params / 2 + 5000)


def test_of_two_limits_of_a_size_the_smaller_counts() -> None:
    """Bytes and bits, milliseconds and a share."""
    both = limits(STUDY, "1KB", "4bits", "1ms", "1000x")
    assert (both.bytes, both.milliseconds) == (1000, 1.0)
    other = limits(STUDY, "1GB", "4bits", "1000ms", "0.001x")
    assert other.bytes == pytest.approx(STUDY.params / 2 + 5000)
    assert other.milliseconds == pytest.approx(totals(STUDY, "fp32")[1] / 1000)


def test_caps_are_carried_on() -> None:
    """With a budget and without."""
    for texts in ((), ("4bits",)):
        asked = STUDY.limits(parse_budget(texts, ["content=0.5"]), STUDY.problem())
        assert asked.caps == {"content": 0.5}


# --------------------------------------------------------------------------------------------------- decisions


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.floats(7, 30), protect=st.booleans())
def test_a_decision_is_within_its_budget(seed: int, bits: float, protect: bool) -> None:
    """Bits and time are kept, choices are allowed, protected rows are floats, errors are sums of the rows'."""
    study = made_up(6, seed)
    patterns = ("unet/block.4.proj",) if protect else ()
    try:
        found = study.decide(Budget(bits=bits), patterns)
    except BudgetTooSmall:
        least = np.where(study.problem(patterns).allowed, study.bytes, np.inf).min(1).sum()
        over = 8 * least / study.params > bits
        slow = totals(study, "fp32")[1]  # or the small ones are slow
        quick = np.where(study.problem(patterns).allowed, study.milliseconds, np.inf).min(1).sum() + study.fixed_ms
        assert over or quick > slow
        return
    assert 8 * (found.bytes - study.fixed_bytes) / study.params <= bits * (1 + 1e-9)
    assert study.problem(patterns).allowed[range(6), found.pick].all()
    assert not protect or NAMES[found.pick[4]] in FLOATS
    for name, table in study.errors.items():
        assert found.errors[name] == pytest.approx(table[range(6), found.pick].sum())


def test_a_decision_is_the_best_there_is() -> None:
    """Against every plan of four rows within the budget: none has a smaller sum of scaled errors."""
    study = replace(made_up(4, 3), edges=(), boundary_ms=())
    problem = study.problem()
    found = study.decide(Budget(bits=9.0))
    most = 9.0 / 8 * study.params + study.fixed_bytes
    slowest = totals(study, "fp32")[1]
    sums = []
    for pick in itertools.product(*(np.flatnonzero(row) for row in problem.allowed)):
        whole = study.whole(problem, np.array(pick))
        if whole.bytes <= most and whole.milliseconds is not None and whole.milliseconds <= slowest:
            sums.append(whole.errors["content"] + whole.errors["quality"] / 9)  # the study's own ratio
    assert found.errors["content"] + found.errors["quality"] / 9 == pytest.approx(min(sums), rel=1e-6)


def test_vectors_correct_a_decision() -> None:
    """Errors of two rows that cancel cost less together, which their sum does not tell."""
    rows = tuple(Row("unet", (name,), "linear", 1024, (32, 32)) for name in "abc")
    one, other = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 0.95]])
    vectors = np.stack([one, -one, other]).astype(np.float32)
    study = Study(
        target="cpu:any",
        rows=rows,
        choices=("fp32", "w8a16"),
        errors={"nsr": np.square(vectors).sum(-1)},
        bytes=np.tile([4096.0, 1056.0], (3, 1)),
        milliseconds=np.ones((3, 2)),
        fixed_bytes=0,
        fixed_ms=0.0,
        vectors={"nsr": vectors},
    )
    budget = Budget(bytes=4096 + 2 * 1056)
    assert study.choices_of(study.decide(budget).pick)["unet"] == {"a": "w8a16", "b": "w8a16", "c": "fp32"}
    plain = study.choices_of(replace(study, vectors={}).decide(budget).pick)["unet"]
    assert plain["c"] == "w8a16"


def test_what_cannot_be_decided_is_refused() -> None:
    """A size that nothing has, and a cap on a metric that was not measured."""
    with pytest.raises(BudgetTooSmall):
        STUDY.decide(Budget(bytes=5001))
    with pytest.raises(BadRequest, match="--metric-cap beauty: this study has content, quality"):
        STUDY.decide(Budget(caps={"beauty": 1.0}))


def test_a_cap_is_kept() -> None:
    """Half the error that was free to be made, at the same size."""
    free = STUDY.decide(Budget(bits=20.0)).errors["content"]
    assert STUDY.decide(Budget(bits=20.0, caps={"content": free * 1.5})).errors["content"] <= free * 1.5
    with pytest.raises(BudgetTooSmall):
        STUDY.decide(Budget(bits=8.5, caps={"content": 1e-12}))


def test_nothing_on_the_front_beats_another() -> None:
    """Bytes rise as errors fall, from the smallest that there is; protected rows are floats everywhere."""
    front = STUDY.front(points=6)
    sizes = [each.bytes for each in front]
    scores = [each.errors["content"] + each.errors["quality"] / 9 for each in front]
    assert 2 <= len(front) <= 6
    assert sizes == sorted(set(sizes))
    assert scores == sorted(scores, reverse=True)
    least = np.where(STUDY.problem().allowed, STUDY.bytes, np.inf).min(1).sum() + STUDY.fixed_bytes
    assert sizes[0] == least
    for each in STUDY.front(("unet/*",), points=4):
        assert {NAMES[column] for column in each.pick[3:]} <= set(FLOATS)


# --------------------------------------------------------------------------------------------------- picks


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), study=st.sampled_from([STUDY, SHARED]))
def test_a_pick_is_choices_and_back(seed: int, study: Study) -> None:
    """Every unit is named once, in its part, and the choices mean the same pick again."""
    pick = fitting(study, seed)
    parts = study.choices_of(pick)
    assert sum(map(len, parts.values())) == sum(len(row.units) for row in study.rows)
    for row, column in zip(study.rows, pick, strict=True):
        for unit in row.units:
            assert parts[row.part][unit] == NAMES[column]
    np.testing.assert_array_equal(study.pick_of(parts), pick)


def test_what_a_plan_does_not_name_stays_as_it_was() -> None:
    """fp32, whether a unit or a whole part is left out."""
    pick = STUDY.pick_of({"unet": {"block.4.proj": "w4a16-32"}})
    assert [NAMES[column] for column in pick] == ["fp32"] * 4 + ["w4a16-32"] + ["fp32"] * 7
    np.testing.assert_array_equal(STUDY.pick_of({}), uniform(STUDY.problem(), "fp32"))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"unet": {"block.99.proj": "fp16"}}, "unet/block.99.proj, which this model does not have"),
        ({"vae": {"block.1.proj": "fp16"}}, "vae/block.1.proj, which this model does not have"),
        ({"unet": {"block.3.proj": "w4a16-32"}}, "makes unet/block.3.proj w4a16-32, which cpu:any cannot run there"),
        ({"unet": {"block.4.proj": "fp8"}}, "makes unet/block.4.proj fp8, which cpu:any cannot run there"),
        (
            {"text_encoder": {"block.1.proj": "fp16", "block.1.tied": "fp32"}},
            "makes block.1.proj and block.1.tied differ; they share weights",
        ),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(parts: dict[str, dict[str, str]], said: str) -> None:
    """An unknown unit or part, a choice that it may not take, and shared weights in two precisions."""
    with pytest.raises(BadRequest) as caught:
        SHARED.pick_of(parts)
    assert said in str(caught.value)
