"""Around the allocation: fronts, uniform plans, problems that are none, and a silent solver."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest, BudgetTooSmall
from edgekit.quant import allocate as allocation
from edgekit.quant.allocate import Limits, Problem, allocate, evaluate, pareto, score, uniform
from edgekit.quant.choices import CHOICES
from tests.quant.allocation_problems import keeps, least_score, random_limits, random_problem

SEEDS = st.integers(0, 2**32 - 1)


def problem_of(**changes: Any) -> Problem:
    """Two units, three choices, one metric, one edge; two of the six pairs are not allowed."""
    plain: dict[str, Any] = {
        "units": ("body", "head"),
        "choices": ("fp32", "w8a8", "w4a16-32"),
        "errors": {"kl": np.array([[0.0, 0.1, np.nan], [0.0, np.nan, 0.4]])},
        "bytes": np.array([[4.0, 1, np.nan], [40, np.nan, 5]]),
        "allowed": np.array([[True, True, False], [True, False, True]]),
        "milliseconds": np.array([[1.0, 0.5, np.nan], [2, np.nan, 1]]),
        "edges": ((0, 1),),
        "boundary_ms": np.array([0.25]),
        "integer": np.array([False, True, False]),
    }
    return Problem(**(plain | changes))


# ------------------------------------------------------------------------------------------------ fronts


@settings(max_examples=8, deadline=None)
@given(SEEDS, st.sampled_from(["bytes", "milliseconds"]), st.booleans())
def test_a_front_rises_and_falls(seed: int, by: Any, capped: bool) -> None:
    """More of the budget and less error from plan to plan, every other limit kept, from the least to the best."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 25, 4, edges=True)
    limits = replace(random_limits(rng, problem, capped=capped), bytes=None)
    front = pareto(problem, limits, 7, by=by)
    used = [getattr(plan, by) for plan in front]
    scores = [score(problem, plan.errors) for plan in front]
    assert used == sorted(set(used))
    assert scores == sorted(set(scores), reverse=True)
    assert all(keeps(limits, plan) for plan in front)
    assert scores[-1] <= score(problem, allocate(problem, limits).errors) * (1 + 2e-4)
    if not capped and by == "bytes":
        assert used[0] == np.where(problem.allowed, problem.bytes, np.inf).min(1).sum()


def test_every_plan_of_a_front_is_the_best_of_its_size() -> None:
    """No pick of as many bytes has a lower score, by trying all."""
    problem = random_problem(np.random.default_rng(2), 6, 3)
    for plan in pareto(problem, Limits(), 6):
        best = least_score(problem, Limits(bytes=plan.bytes))
        assert best is not None
        assert score(problem, plan.errors) <= best * (1 + 2e-4)


def test_a_front_ends_at_its_limit() -> None:
    """A budget in what is swept is where the sweep ends; one that nothing meets is refused."""
    problem = random_problem(np.random.default_rng(4), 12, 4)
    budget = float(problem.bytes.mean(1).sum())
    assert max(plan.bytes for plan in pareto(problem, Limits(bytes=budget), 5)) <= budget
    with pytest.raises(BudgetTooSmall, match="smallest plan needs"):
        pareto(problem, Limits(bytes=1.0), 5)


def test_a_front_of_one() -> None:
    """Where every choice is as large, the front is the most accurate plan."""
    front = pareto(problem_of(bytes=np.full((2, 3), 7.0)), Limits(), 5)
    assert len(front) == 1
    np.testing.assert_array_equal(front[0].pick, [0, 0])


# ------------------------------------------------------------------------------------------------ uniform plans


def test_uniform_goes_up_where_a_choice_is_not_allowed() -> None:
    """The nearest row of CHOICES above the one asked for; the highest there is where nothing is above."""
    problem = problem_of()
    np.testing.assert_array_equal(uniform(problem, "w4a16-32"), [1, 2])
    np.testing.assert_array_equal(uniform(problem, "w8a8"), [1, 0])
    np.testing.assert_array_equal(uniform(problem, "fp32"), [0, 0])
    lowest = problem_of(allowed=np.array([[True, True, False], [False, False, True]]))
    np.testing.assert_array_equal(uniform(lowest, "w8a8"), [1, 2])


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_uniform_follows_the_table_whatever_the_columns(seed: int) -> None:
    """Columns in any order: what every unit gets equals a walk up the table, one row at a time."""
    rng = np.random.default_rng(seed)
    names = tuple(rng.permutation(list(CHOICES))[:5].tolist())
    allowed = rng.random((4, 5)) < 0.5
    allowed[np.arange(4), rng.integers(0, 5, 4)] = True
    ones = np.ones((4, 5))
    problem = Problem(("a", "b", "c", "d"), names, {"nsr": ones}, ones, allowed)
    wanted = names[0]
    order = list(CHOICES)
    for unit, got in enumerate(uniform(problem, wanted)):
        ranked = sorted(order.index(name) for name, may in zip(names, allowed[unit], strict=True) if may)
        above = [rank for rank in ranked if rank <= order.index(wanted)]
        assert names[got] == order[above[-1] if above else ranked[0]]


def test_uniform_knows_its_choices() -> None:
    """A choice nobody measured is refused."""
    with pytest.raises(BadRequest, match="nvfp4"):
        uniform(problem_of(), "nvfp4")


# ------------------------------------------------------------------------------------------------ values

BAD_PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "no unit": ({"units": ()}, "needs a unit"),
    "no metric": ({"errors": {}}, "a metric"),
    "a metric that is a budget": ({"errors": {"bytes": np.zeros((2, 3))}}, "no metric is called bytes"),
    "one row too few": ({"bytes": np.ones((1, 3))}, r"bytes has shape \(1, 3\)"),
    "a mask of another shape": ({"allowed": np.ones((3, 2), bool)}, "allowed"),
    "a flag too few": ({"integer": np.ones(2, bool)}, "integer"),
    "an edge without a price": ({"boundary_ms": np.zeros(0)}, "boundary_ms"),
    "an edge to nowhere": ({"edges": ((0, 2),)}, "edge"),
    "an edge to itself": ({"edges": ((1, 1),)}, "two different"),
    "a boundary that pays": ({"boundary_ms": np.array([-1.0])}, "boundaries"),
    "an endless rest": ({"fixed_ms": np.inf}, "fixed"),
    "nothing allowed": ({"allowed": np.array([[True] * 3, [False] * 3])}, "'head' has no allowed choice"),
    "an error that is no number": ({"allowed": np.ones((2, 3), bool)}, "kl error of unit 'body' at w4a16-32 is nan"),
    "a negative error": ({"errors": {"kl": np.full((2, 3), -1.0)}}, "kl error of unit 'body' at fp32 is -1.0"),
    "endless time": ({"milliseconds": np.full((2, 3), np.inf)}, "milliseconds of unit 'body' at fp32 is inf"),
}


@pytest.mark.parametrize("name", BAD_PROBLEMS)
def test_a_problem_is_checked_at_birth(name: str) -> None:
    """Shapes, numbers and edges that cannot be meant are refused, and the message says which."""
    changes, words = BAD_PROBLEMS[name]
    with pytest.raises(BadRequest, match=words):
        problem_of(**changes)


BAD_PICKS = {"too short": [0], "too long": [0, 0, 0], "below": [0, -1], "above": [0, 3], "not allowed": [0, 1]}


@pytest.mark.parametrize("name", BAD_PICKS)
def test_a_pick_is_one_allowed_choice_per_unit(name: str) -> None:
    """Anything else is refused."""
    with pytest.raises(BadRequest, match=r"pick|may not take w8a8"):
        evaluate(problem_of(), BAD_PICKS[name])


def test_a_pick_of_hand() -> None:
    """Bytes, milliseconds with the rest and the one boundary, and errors, added by hand; nothing is proven of it."""
    plan = evaluate(problem_of(fixed_ms=3.0), [1, 2])
    assert (plan.bytes, plan.milliseconds, plan.errors) == (6.0, 3 + 0.5 + 1 + 0.25, {"kl": 0.5})
    assert plan.gap == np.inf


def test_numbers_of_what_is_not_allowed_are_not_read() -> None:
    """NaN or 1e300 there: the same plan."""
    wild = {name: np.nan_to_num(getattr(problem_of(), name), nan=1e300) for name in ("bytes", "milliseconds")}
    limits = Limits(bytes=30, milliseconds=3)
    np.testing.assert_array_equal(allocate(problem_of(**wild), limits).pick, allocate(problem_of(), limits).pick)


# ------------------------------------------------------------------------------------------------ a silent solver


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither Python's nor C's stdout sees anything of a solve."""
    rng = np.random.default_rng(1)
    for size in (20, 60, 120):
        problem = random_problem(rng, size, 4, edges=True)
        allocate(problem, Limits(float(problem.bytes.mean(1).sum())))
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("", "")


def test_c_may_print_and_others_are_heard(capfd: pytest.CaptureFixture[str]) -> None:
    """A line that HiGHS prints with C's printf is dropped; what anybody else writes meanwhile comes out, in order."""
    c_library = ctypes.CDLL(None)
    c_library.printf(b"before\n")
    with allocation._quiet():
        c_library.printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n")
        sys.stdout.write("meanwhile\n")
        sys.stdout.flush()
        os.write(1, b"a bare write\n")
    os.write(1, b"after\n")
    assert capfd.readouterr().out.split("\n") == ["before", "meanwhile", "a bare write", "after", ""]


def test_stdout_comes_back_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    """An error inside a solve leaves the process its stdout, and the next solve its turn."""
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), allocation._quiet():
            raise ZeroDivisionError
    os.write(1, b"here\n")
    assert capfd.readouterr().out == "here\n"
