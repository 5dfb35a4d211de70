"""The allocation is the best there is: it equals trying everything, keeps every limit, and says which one it cannot."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest, BudgetTooSmall
from edgekit.quant.allocate import Limits, Problem, allocate, boundary_total, evaluate, scales, score
from tests.quant.allocation_problems import (
    greedy,
    keeps,
    least_score,
    plain_cost,
    random_limits,
    random_pick,
    random_problem,
)

SEEDS = st.integers(0, 2**32 - 1)


def small(**changes: Any) -> Problem:
    """Two units of 100 MB and 20 MB as fp16, a quarter of that in 4 bits; the second suffers four times as much."""
    plain: dict[str, Any] = {
        "units": ("body", "head"),
        "choices": ("fp16", "w8a8", "w4a16-32"),
        "errors": {"kl": np.array([[0.001, 0.01, 0.1], [0.004, 0.04, 0.4]])},
        "bytes": np.array([[100e6, 50e6, 25e6], [20e6, 10e6, 5e6]]),
        "allowed": np.ones((2, 3), bool),
        "milliseconds": np.array([[10.0, 6.0, 8.0], [2.0, 1.0, 1.5]]),
    }
    return Problem(**(plain | changes))


# ------------------------------------------------------------------------------------------------ the best plan


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_it_equals_trying_every_pick(seed: int, timed: bool, capped: bool, edges: bool, holes: bool) -> None:
    """Six units of three choices, any mix of limits, boundaries and gaps: the least score, or a refusal where none."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 6, 3, edges=edges, holes=holes)
    limits = random_limits(rng, problem, timed=timed, capped=capped)
    best = least_score(problem, limits)
    if best is None:
        with pytest.raises(BudgetTooSmall):
            allocate(problem, limits)
        return
    plan = allocate(problem, limits, gap=1e-6)
    assert keeps(limits, plan)
    assert problem.allowed[np.arange(6), plan.pick].all()
    assert score(problem, plan.errors) == pytest.approx(best, rel=3e-6)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.booleans(), st.booleans())
def test_it_keeps_every_limit_and_beats_greedy(seed: int, edges: bool, holes: bool) -> None:
    """Sixty units: budgets, caps and what is allowed hold exactly, and taking the cheapest bytes first is no better."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 60, 5, edges=edges, holes=holes)
    limits = replace(random_limits(rng, problem), milliseconds=None)
    assert limits.bytes is not None
    plan = allocate(problem, limits)
    simple = greedy(problem, limits.bytes)
    assert keeps(limits, plan)
    assert plan.gap <= 1e-4
    assert simple is None or score(problem, plan.errors) <= score(problem, simple.errors) * (1 + 1e-4)
    tight = replace(limits, milliseconds=plan.milliseconds, caps={"quality": plan.errors["quality"] * 1.5})
    again = allocate(problem, tight)
    assert keeps(tight, again)
    assert problem.allowed[np.arange(60), again.pick].all()
    assert score(problem, again.errors) <= score(problem, plan.errors) * (1 + 2e-4)


def test_the_gap_is_proven() -> None:
    """The best score is not below what `gap` leaves open."""
    rng = np.random.default_rng(5)
    problem = random_problem(rng, 6, 3)
    limits = random_limits(rng, problem, timed=True)
    plan = allocate(problem, limits, gap=0.05)
    best = least_score(problem, limits)
    assert best is not None
    assert best >= score(problem, plan.errors) * (1 - plan.gap) * (1 - 1e-6)


def test_errors_of_a_billionth_count() -> None:
    """The best of good plans is found although one choice is a trillion times as bad: the solver sees them as 1."""
    rng = np.random.default_rng(3)
    tiny = rng.uniform(1, 2, (6, 2)) * 1e-12
    errors = {"nsr": np.concatenate([tiny, np.ones((6, 1))], axis=1)}
    size = np.concatenate([rng.integers(2, 20, (6, 2)), np.ones((6, 1))], axis=1)
    names = tuple(f"u{unit}" for unit in range(6))
    problem = Problem(names, ("fp16", "w8a8", "w2a16-32"), errors, size, np.ones((6, 3), bool), size)
    limits = Limits(bytes=float(np.median(size[:, :2])) * 6)
    best = least_score(problem, limits)
    assert best is not None
    assert best < 1e-10
    assert score(problem, allocate(problem, limits).errors) == pytest.approx(best, rel=1e-4)


def test_no_metric_drowns_another() -> None:
    """Multiplying one metric by a million changes no choice: each is divided by its own worst case."""
    rng = np.random.default_rng(8)
    problem = random_problem(rng, 30, 4)
    limits = random_limits(rng, problem)
    louder = replace(problem, errors=problem.errors | {"content": problem.errors["content"] * 2.0**20})
    np.testing.assert_array_equal(allocate(problem, limits).pick, allocate(louder, limits).pick)
    assert scales(problem)["quality"] == pytest.approx(problem.errors["quality"].max(1).sum())


def test_a_dominated_choice_is_never_taken() -> None:
    """More bytes, more time and more error for nothing; and of two equal choices, the first."""
    problem = small(
        choices=("fp16", "w8a8", "w8a8-row", "w8a16"),
        errors={"kl": np.array([[0.0, 0.01, 0.01, 0.02], [0.0, 0.0, 0.0, 0.04]])},
        bytes=np.array([[100.0, 50, 50, 50], [20, 20, 20, 30]]),
        allowed=np.ones((2, 4), bool),
        milliseconds=np.array([[10.0, 6, 6, 6], [2, 1, 1, 2]]),
    )
    np.testing.assert_array_equal(allocate(problem, Limits(bytes=80)).pick, [1, 1])
    np.testing.assert_array_equal(allocate(problem, Limits()).pick, [0, 1])


def test_without_limits_nothing_is_given_up() -> None:
    """Every unit takes its most accurate choice, and the gap is none."""
    plan = allocate(small(), Limits())
    np.testing.assert_array_equal(plan.pick, [0, 0])
    assert (plan.bytes, plan.milliseconds) == (120e6, 12.0)
    assert plan.errors == {"kl": pytest.approx(0.005)}
    assert plan.gap == pytest.approx(0.0, abs=1e-12)


def test_a_limit_of_infinity_is_none() -> None:
    """What a caller computes as unlimited is not limited."""
    plan = allocate(small(), Limits(bytes=np.inf, milliseconds=np.inf))
    np.testing.assert_array_equal(plan.pick, [0, 0])


def test_the_same_pick_every_time() -> None:
    """Twice the same problem, twice the same pick."""
    rng = np.random.default_rng(11)
    problem = random_problem(rng, 80, 5, edges=True)
    limits = random_limits(rng, problem, timed=True)
    first, second = (allocate(problem, limits) for _ in range(2))
    np.testing.assert_array_equal(first.pick, second.pick)


def test_eight_hundred_units_are_no_trouble() -> None:
    """800 units of 4 choices with bytes, milliseconds and boundaries stay far below ten seconds of processor time."""
    problem = random_problem(np.random.default_rng(0), 800, 4, edges=True)
    assert problem.milliseconds is not None
    limits = Limits(problem.bytes[:, 0].sum() * 7 / 32, problem.milliseconds[:, 0].sum() * 0.85)
    began = time.process_time()
    plan = allocate(problem, limits)
    assert time.process_time() - began < 10
    assert keeps(limits, plan)
    assert plan.gap <= 1e-4


# ------------------------------------------------------------------------------------------------ boundaries


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_pick_costs_what_adding_says(seed: int) -> None:
    """Bytes, milliseconds with boundaries, and errors of any pick equal one addition after the other."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 7, 4, edges=True, holes=True)
    pick = random_pick(rng, problem)
    fast, slow = evaluate(problem, pick), plain_cost(problem, pick)
    assert fast.bytes == slow.bytes
    assert fast.milliseconds == pytest.approx(slow.milliseconds, rel=1e-12)
    assert fast.errors == pytest.approx(slow.errors, rel=1e-12)


def test_an_island_of_integers_is_not_worth_its_shores() -> None:
    """A unit that would gain 1 ms on integers stays on floats when each of its two boundaries costs 0.6 ms."""
    chain: dict[str, Any] = {
        "units": ("a", "b", "c"),
        "choices": ("fp32", "w8a8"),
        "errors": {"nsr": np.array([[0.0, 9.0], [0.0, 0.1], [0.0, 9.0]])},
        "bytes": np.ones((3, 2)),
        "allowed": np.ones((3, 2), bool),
        "milliseconds": np.array([[4.0, 1.0], [2.0, 1.0], [4.0, 1.0]]),
        "edges": ((0, 1), (2, 1)),
        "integer": np.array([False, True]),
    }
    free, dear = Problem(**chain, boundary_ms=np.zeros(2)), Problem(**chain, boundary_ms=np.full(2, 0.6))
    np.testing.assert_array_equal(allocate(free, Limits(milliseconds=9.5)).pick, [0, 1, 0])
    assert boundary_total(dear, np.array([0, 1, 0])) == 1.2
    assert 1 not in allocate(dear, Limits(milliseconds=10.1)).pick
    assert evaluate(dear, [0, 1, 0]).milliseconds == pytest.approx(10.2)
    plan = allocate(dear, Limits(milliseconds=9.5))  # one end alone: 1 + 2 + 4 + 0.6
    assert plan.milliseconds == pytest.approx(7.6)
    assert plan.pick.sum() == 1


def test_edges_need_no_times() -> None:
    """Where nothing was timed, an edge costs nothing and there are no milliseconds."""
    plan = allocate(small(milliseconds=None, edges=((0, 1),), boundary_ms=np.ones(1)), Limits(bytes=70e6))
    assert plan.milliseconds is None
    np.testing.assert_array_equal(plan.pick, [1, 0])


# ------------------------------------------------------------------------------------------------ refusals

REFUSALS = {
    "bytes": (
        Limits(bytes=28e6),
        r"^budget is 28\.00 MB; the smallest plan needs 30\.00 MB \(2 x w4a16-32\)\. Raise --budget or .*--protect",
    ),
    "milliseconds": (Limits(milliseconds=5), r"^budget is 5\.000 ms; the fastest plan takes 7\.000 ms \(2 x w8a8\)\. "),
    "a cap": (
        Limits(caps={"kl": 0.001}),
        r"^cap on kl is 0\.001000; the most accurate plan has 0\.005000 \(2 x fp16\)\. ",
    ),
    "two at once": (Limits(bytes=1, milliseconds=1), r"needs 30\.00 MB .* And: budget is 1\.000 ms; .* 7\.000 ms"),
    "together": (
        Limits(bytes=60e6, caps={"kl": 0.02}),
        r"needs 70\.00 MB while kl <= 0\.02000 \(1 x fp16, 1 x w8a8\).* Or: cap on kl .* has 0\.05000 while bytes <=",
    ),
    "a budget spent elsewhere": (Limits(bytes=-3e6), r"^budget is -3\.000 MB; the smallest plan needs 30\.00 MB"),
    "bytes against time": (
        Limits(bytes=30e6, milliseconds=8),
        r"55\.00 MB while .* Or: .* 9\.500 ms while bytes <= 30",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_the_limit_and_what_would_do(name: str) -> None:
    """Which limit, the least that would do, the plan that needs it, and what to change."""
    limits, words = REFUSALS[name]
    with pytest.raises(BudgetTooSmall, match=words) as caught:
        allocate(small(), limits)
    assert caught.value.exit_code == 2


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_the_least_that_is_named_will_do(seed: int) -> None:
    """Typing the figure of the message is never too small again."""
    problem = random_problem(np.random.default_rng(seed), 5, 4, holes=True)
    with pytest.raises(BudgetTooSmall) as caught:
        allocate(problem, Limits(bytes=1))
    number, unit = re.search(r"needs ([\d.]+) (\w+)", str(caught.value)).groups()  # type: ignore[union-attr]
    enough = float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert allocate(problem, Limits(bytes=enough)).bytes <= enough
    assert enough <= problem.bytes[problem.allowed].sum()


def test_exactly_the_smallest_is_enough() -> None:
    """A budget equal to the least possible, to the byte, is met."""
    plan = allocate(small(), Limits(bytes=30e6, milliseconds=9.5, caps={"kl": 0.5}))
    np.testing.assert_array_equal(plan.pick, [2, 2])


def test_out_of_time_is_not_impossible() -> None:
    """A solve that is stopped before it finds anything does not claim that there is nothing."""
    problem = random_problem(np.random.default_rng(0), 400, 5, edges=True)
    assert problem.milliseconds is not None
    limits = Limits(problem.bytes[:, 0].sum() / 4, problem.milliseconds[:, 0].sum() * 0.8)
    with pytest.raises(BudgetTooSmall, match="nor proven impossible"):
        allocate(problem, limits, seconds=1e-9)


BAD_LIMITS = {
    "a metric of another problem": (Limits(caps={"content": 1.0}), "content"),
    "no number": (Limits(bytes=float("nan")), "bytes"),
    "time without times": (Limits(milliseconds=1.0), "timed"),
}


@pytest.mark.parametrize("name", BAD_LIMITS)
def test_limits_that_cannot_be_meant(name: str) -> None:
    """They are refused by name, not solved."""
    limits, words = BAD_LIMITS[name]
    with pytest.raises(BadRequest, match=words):
        allocate(small(milliseconds=None), limits)
