"""The refinement lowers the length of the summed error vectors, step by step, and never leaves the limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest, BudgetTooSmall
from edgekit.quant.allocate import Allocation, Limits, Problem, allocate, evaluate, score
from edgekit.quant.refine import predicted, refine
from tests.quant.allocation_problems import (
    F32,
    every_pick,
    keeps,
    random_limits,
    random_pick,
    random_problem,
    random_vectors,
)

SEEDS = st.integers(0, 2**32 - 1)
Vectors = Mapping[str, F32]


def objective(problem: Problem, vectors: Vectors, pick: npt.ArrayLike) -> float:
    """What a refinement lowers."""
    return score(problem, predicted(vectors, pick))


def start_of(rng: np.random.Generator, problem: Problem, limits: Limits) -> Allocation:
    """The allocation, or where there is none, any pick and the limits dropped."""
    try:
        return allocate(problem, limits)
    except BudgetTooSmall:
        return evaluate(problem, random_pick(rng, problem))


def within_budgets(limits: Limits, plan: Allocation) -> bool:
    """Whether bytes and milliseconds are kept."""
    return keeps(replace(limits, caps={}), plan)


def one_or_two_changes(problem: Problem, pick: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Every pick that differs from this one in at most two units, plainly."""
    return [other for other in every_pick(problem) if (other != pick).sum() <= 2]


# ------------------------------------------------------------------------------------------------ the sum


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_prediction_is_the_length_of_the_sum(seed: int) -> None:
    """Vector by vector: add, then square."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 5, 3, holes=True)
    vectors = random_vectors(rng, problem, 12)
    pick = random_pick(rng, problem)
    for metric, value in predicted(vectors, pick).items():
        total = np.zeros(12)
        for unit, choice in enumerate(pick):
            total = total + vectors[metric][unit, choice].astype(np.float64)
        assert value == pytest.approx(float((total**2).sum()), rel=1e-12)


def test_without_common_directions_both_sums_agree() -> None:
    """Vectors at right angles: the prediction is the sum of squares that `allocate` minimises."""
    rng = np.random.default_rng(0)
    problem = random_problem(rng, 6, 3)
    vectors = {
        metric: (np.eye(6)[:, None, :] * np.sqrt(table)[:, :, None]).astype(np.float32)
        for metric, table in problem.errors.items()
    }
    plan = allocate(problem, random_limits(rng, problem))
    assert predicted(vectors, plan.pick) == pytest.approx(plan.errors, rel=1e-5)


# ------------------------------------------------------------------------------------------------ steps


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.booleans(), st.booleans(), st.booleans())
def test_it_never_gets_worse_nor_leaves_the_limits(seed: int, timed: bool, edges: bool, holes: bool) -> None:
    """From the allocation of thirty units: the objective does not rise, budgets and what is allowed are kept."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 30, 4, edges=edges, holes=holes)
    limits = random_limits(rng, problem, timed=timed)
    vectors = random_vectors(rng, problem, 24)
    try:
        start = allocate(problem, limits)
    except BudgetTooSmall:
        return
    final = refine(problem, limits, vectors, start.pick)
    assert objective(problem, vectors, final.pick) <= objective(problem, vectors, start.pick)
    assert within_budgets(limits, final)
    assert problem.allowed[np.arange(30), final.pick].all()
    assert final.errors == predicted(vectors, final.pick)
    assert final.bytes == evaluate(problem, final.pick).bytes


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.booleans(), st.booleans())
def test_no_single_change_and_no_exchange_is_left(seed: int, edges: bool, holes: bool) -> None:
    """Six units: of all picks that differ in one or two units and keep the limits, none is better, by trying all."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 6, 3, edges=edges, holes=holes)
    limits = random_limits(rng, problem, timed=edges)
    vectors = random_vectors(rng, problem, 8)
    try:
        start = allocate(problem, limits)
    except BudgetTooSmall:
        return
    final = refine(problem, limits, vectors, start.pick)
    near = one_or_two_changes(problem, final.pick)
    best = min(objective(problem, vectors, p) for p in near if within_budgets(limits, evaluate(problem, p)))
    assert objective(problem, vectors, final.pick) <= best * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.booleans())
def test_two_units_end_at_the_best_pick(seed: int, edges: bool) -> None:
    """With two units every pick is one exchange away: from any start, the result equals trying all."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 2, 5, edges=edges, holes=True)
    vectors = random_vectors(rng, problem, 6)
    start = evaluate(problem, random_pick(rng, problem))
    limits = Limits(start.bytes * 1.1, (start.milliseconds or 0.0) * 1.05)
    final = refine(problem, limits, vectors, start.pick)
    fitting = [pick for pick in every_pick(problem) if within_budgets(limits, evaluate(problem, pick))]
    best = min(objective(problem, vectors, pick) for pick in fitting)
    assert objective(problem, vectors, final.pick) == pytest.approx(best, rel=1e-5)


def test_small_problems_nearly_always_end_at_the_best_pick() -> None:
    """Forty problems of five units: at least 36 equal trying all, and the mean is within two parts in a hundred."""
    ratios = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, 5, 3)
        vectors = random_vectors(rng, problem, 16)
        limits = random_limits(rng, problem)
        final = refine(problem, limits, vectors, allocate(problem, limits).pick)
        fitting = [pick for pick in every_pick(problem) if within_budgets(limits, evaluate(problem, pick))]
        best = min(objective(problem, vectors, pick) for pick in fitting)
        ratios.append(objective(problem, vectors, final.pick) / best)
    assert sum(ratio < 1 + 1e-5 for ratio in ratios) >= 36
    assert np.mean(ratios) < 1.02


def test_common_directions_are_worth_knowing() -> None:
    """Forty units whose errors share a direction: at the same bytes, a fifth less error than the scalar sum."""
    gains = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, 40, 5)
        limits = Limits(bytes=float(problem.bytes.min(1).sum() * 1.5))
        vectors = random_vectors(rng, problem, 64, shared=1.5)
        plain = allocate(problem, limits)
        final = refine(problem, limits, vectors, plain.pick)
        gains.append(objective(problem, vectors, final.pick) / objective(problem, vectors, plain.pick))
    assert max(gains) <= 1
    assert np.mean(gains) < 0.8


def two_that_cancel() -> tuple[Problem, Vectors]:
    """Errors of 8 bits are opposite in two units, so that both at 8 bits have none; the budget allows no half way."""
    table = np.array([[0.0, 1.0], [0.0, 1.0]])
    vectors = {"nsr": np.array([[[0.0], [1.0]], [[0.0], [-1.0]]], np.float32)}
    problem = Problem(("a", "b"), ("fp32", "w8a8"), {"nsr": table}, np.array([[4.0, 1], [4, 1]]), np.ones((2, 2), bool))
    return problem, vectors


def test_two_opposite_errors_are_taken_together() -> None:
    """Neither may be left alone at 8 bits without harm, and half way is a step up: the exchange finds both."""
    problem, vectors = two_that_cancel()
    final = refine(problem, Limits(bytes=5), vectors, [0, 1])
    np.testing.assert_array_equal(final.pick, [1, 1])
    assert final.errors == {"nsr": 0.0}


def test_an_exchange_trades_bytes() -> None:
    """With no byte to spare, a unit goes up only as another of its size goes down."""
    vectors = {"nsr": np.array([[[0.0, 0], [0, 3]], [[0, 0], [0, 1]]], np.float32)}
    table = (vectors["nsr"] ** 2).sum(2).astype(np.float64)
    problem = Problem(("a", "b"), ("fp32", "w8a8"), {"nsr": table}, np.array([[4.0, 1], [4, 1]]), np.ones((2, 2), bool))
    np.testing.assert_array_equal(refine(problem, Limits(bytes=5), vectors, [1, 0]).pick, [0, 1])


def test_a_boundary_between_both_ends_of_an_exchange() -> None:
    """Two neighbours go to integers together where one alone would pay for the boundary and break the limit."""
    problem, vectors = two_that_cancel()
    timed = replace(
        problem,
        milliseconds=np.array([[2.0, 1.0], [2.0, 1.0]]),
        edges=((1, 0),),
        boundary_ms=np.array([5.0]),
        integer=np.array([False, True]),
    )
    biased = {"nsr": vectors["nsr"] + np.array([[[0.5], [0.0]], [[0.5], [0.0]]], np.float32)}
    final = refine(timed, Limits(milliseconds=4), biased, [0, 0])
    np.testing.assert_array_equal(final.pick, [1, 1])
    assert final.milliseconds == 2.0
    np.testing.assert_array_equal(refine(timed, Limits(milliseconds=1.9 + 5), biased, [1, 1]).pick, [1, 1])


def test_the_same_result_every_time() -> None:
    """Twice the same start, twice the same pick."""
    rng = np.random.default_rng(7)
    problem = random_problem(rng, 40, 4, edges=True)
    vectors = random_vectors(rng, problem, 32)
    limits = random_limits(rng, problem, timed=True)
    start = start_of(rng, problem, limits)
    free = Limits(start.bytes, start.milliseconds)
    first, second = (refine(problem, free, vectors, start.pick) for _ in range(2))
    np.testing.assert_array_equal(first.pick, second.pick)


def test_products_need_not_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many to keep, they are made again in every round, and the result is the same."""
    rng = np.random.default_rng(9)
    problem = random_problem(rng, 40, 4)
    vectors = random_vectors(rng, problem, 32)
    limits = random_limits(rng, problem)
    start = allocate(problem, limits).pick
    kept = refine(problem, limits, vectors, start)
    monkeypatch.setattr("edgekit.quant.refine.KEPT", 0)
    np.testing.assert_array_equal(refine(problem, limits, vectors, start).pick, kept.pick)


def test_no_round_is_no_change() -> None:
    """`rounds=0` gives the start with its predicted errors; so does a single unit at its best."""
    rng = np.random.default_rng(3)
    problem = random_problem(rng, 8, 3)
    vectors = random_vectors(rng, problem, 8)
    pick = random_pick(rng, problem)
    still = refine(problem, Limits(), vectors, pick, rounds=0)
    np.testing.assert_array_equal(still.pick, pick)
    assert still.errors == predicted(vectors, pick)
    single = random_problem(rng, 1, 3)
    np.testing.assert_array_equal(refine(single, Limits(), random_vectors(rng, single, 8), [2]).pick, [0])


# ------------------------------------------------------------------------------------------------ caps


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.booleans())
def test_a_cap_on_the_prediction_is_sought_and_then_kept(seed: int, holes: bool) -> None:
    """How far a start is above its cap never grows; once within, it stays within and the objective does not rise."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 12, 4, holes=holes)
    vectors = random_vectors(rng, problem, 16)
    start = evaluate(problem, random_pick(rng, problem))
    before = predicted(vectors, start.pick)
    cap = before["content"] * float(rng.uniform(0.2, 1.2))
    limits = Limits(bytes=start.bytes, caps={"content": cap})
    final = refine(problem, limits, vectors, start.pick)
    assert within_budgets(limits, final)
    assert max(final.errors["content"] - cap, 0) <= max(before["content"] - cap, 0) * (1 + 1e-12)
    if before["content"] <= cap:
        assert objective(problem, vectors, final.pick) <= objective(problem, vectors, start.pick)


def test_a_cap_is_reached_at_the_cost_of_the_other_metric() -> None:
    """A start above its cap is brought under it although the objective rises."""
    content = np.array([[[1.0], [0.1]], [[0.0], [0.0]]], np.float32)
    quality = np.array([[[0.0], [9.0]], [[0.0], [0.0]]], np.float32)
    vectors = {"content": content, "quality": quality}
    errors = {name: (table.astype(np.float64) ** 2).sum(2) for name, table in vectors.items()}
    errors["content"][1, 1] = 3.0  # beside which the content of the start weighs a quarter
    problem = Problem(("a", "b"), ("fp32", "w8a8"), errors, np.ones((2, 2)), np.ones((2, 2), bool))
    np.testing.assert_array_equal(refine(problem, Limits(), vectors, [0, 0]).pick[:1], [0])
    capped = refine(problem, Limits(caps={"content": 0.5}), vectors, [0, 0])
    assert capped.pick[0] == 1
    assert capped.errors["content"] == pytest.approx(0.01)
    assert capped.errors["quality"] == pytest.approx(81.0)


# ------------------------------------------------------------------------------------------------ refusals


def test_vectors_must_fit_the_problem() -> None:
    """Other metrics, other shapes and numbers that are none are refused; what is not allowed may be anything."""
    rng = np.random.default_rng(1)
    problem = random_problem(rng, 4, 3, holes=True)
    vectors = dict(random_vectors(rng, problem, 8))
    pick = random_pick(rng, problem)
    with pytest.raises(BadRequest, match="content"):
        refine(problem, Limits(), {"quality": vectors["quality"]}, pick)
    with pytest.raises(BadRequest, match=r"content vectors have shape \(3, 3, 8\)"):
        refine(problem, Limits(), vectors | {"content": vectors["content"][:3]}, pick)
    broken = vectors["content"].copy()
    broken[0, int(pick[0])] = np.nan
    with pytest.raises(BadRequest, match="content vectors of allowed choices are not all finite"):
        refine(problem, Limits(), vectors | {"content": broken}, pick)
    wild = {metric: np.nan_to_num(table, nan=1e30) for metric, table in vectors.items()}
    np.testing.assert_array_equal(
        refine(problem, Limits(), wild, pick).pick, refine(problem, Limits(), vectors, pick).pick
    )


BAD_STARTS = {
    "over the bytes": Limits(bytes=4.0),
    "over the time": Limits(milliseconds=1.0),
    "a cap on nothing": Limits(caps={"kl": 1.0}),
}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_the_start_keeps_the_limits(name: str) -> None:
    """A start over a budget, or a cap on a metric that is not there, is refused."""
    problem, vectors = two_that_cancel()
    timed = replace(problem, milliseconds=np.ones((2, 2)))
    with pytest.raises(BadRequest, match=r"start within|no metric kl"):
        refine(timed, BAD_STARTS[name], vectors, [0, 1])
    with pytest.raises(BadRequest, match="a limit in milliseconds needs units that were timed"):
        refine(problem, Limits(milliseconds=100.0), vectors, [0, 1])
