"""Random problems of allocation, and the slow, obvious ways of solving them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from edgekit.quant.allocate import Allocation, Limits, Problem, evaluate, scales, score

F32 = npt.NDArray[np.float32]
NAMES = ("fp32", "fp16", "w8a8", "w4a16-32", "w4a16-64", "w2a16-32")
BITS = np.array([32, 16, 8, 5, 4.5, 3])
TIME = np.array([1.0, 1.0, 0.6, 0.8, 0.8, 0.8])


def random_problem(
    rng: np.random.Generator, units: int, columns: int, *, edges: bool = False, holes: bool = False
) -> Problem:
    """Log-normal sizes and sensitivities; errors fall by four with every bit, as in real scans."""
    shape = (units, columns)
    size = np.exp(rng.normal(13, 1.5, units))[:, None]
    errors = {
        metric: np.exp(rng.normal(-6, 2, units))[:, None]
        * np.exp2(-2 * (BITS[:columns] - 4))
        * np.exp(rng.normal(0, 0.3, shape))
        for metric in ("content", "quality")
    }
    speed = np.exp(rng.normal(0, 1, units))[:, None] * TIME[:columns] * np.exp(rng.normal(0, 0.2, shape))
    allowed = rng.random(shape) < (0.8 if holes else 1.1)
    allowed[np.arange(units), rng.integers(0, columns, units)] = True
    pairs = tuple((unit, unit + 1) for unit in range(units - 1)) if edges else ()
    if edges and units > 3:
        pairs = (*pairs, (units - 1, 0))
    return Problem(
        units=tuple(f"unit{unit}" for unit in range(units)),
        choices=NAMES[:columns],
        errors={metric: np.where(allowed, table, np.nan) for metric, table in errors.items()},
        bytes=np.round(size * BITS[:columns] / 8),
        allowed=allowed,
        milliseconds=speed,
        fixed_ms=0.5,
        edges=pairs,
        boundary_ms=rng.random(len(pairs)) * 0.4,
        integer=np.arange(columns) == 2,
    )


def random_pick(rng: np.random.Generator, problem: Problem) -> npt.NDArray[np.int64]:
    """Any allowed choice for every unit."""
    return np.array([rng.choice(np.flatnonzero(row)) for row in problem.allowed])


def random_limits(rng: np.random.Generator, problem: Problem, *, timed: bool = False, capped: bool = False) -> Limits:
    """Limits that some of thirty random picks keep, one by one; all of them together may be too much."""
    some = [evaluate(problem, random_pick(rng, problem)) for _ in range(30)]

    def among(values: list[float]) -> float:
        return float(np.quantile(values, rng.uniform(0.05, 0.6)))

    return Limits(
        bytes=among([one.bytes for one in some]),
        milliseconds=among([one.milliseconds or 0.0 for one in some]) if timed else None,
        caps={"content": among([one.errors["content"] for one in some])} if capped else {},
    )


def keeps(limits: Limits, plan: Allocation) -> bool:
    """Whether a plan is within every limit, but for the rounding of sums."""
    pairs = [(plan.bytes, limits.bytes), (plan.milliseconds, limits.milliseconds)]
    pairs += [(plan.errors[metric], cap) for metric, cap in limits.caps.items()]
    return all(limit is None or (used is not None and used <= limit * (1 + 1e-12)) for used, limit in pairs)


def every_pick(problem: Problem) -> Iterator[npt.NDArray[np.int64]]:
    """All of them."""
    for pick in itertools.product(*(np.flatnonzero(row) for row in problem.allowed)):
        yield np.array(pick)


def plain_cost(problem: Problem, pick: npt.NDArray[np.int64]) -> Allocation:
    """`evaluate`, one addition after the other."""
    size = sum(float(problem.bytes[unit, choice]) for unit, choice in enumerate(pick))
    time = problem.fixed_ms
    assert problem.milliseconds is not None
    for unit, choice in enumerate(pick):
        time += float(problem.milliseconds[unit, choice])
    for (a, b), price in zip(problem.edges, problem.boundary_ms, strict=True):
        if problem.integer[pick[a]] != problem.integer[pick[b]]:
            time += float(price)
    errors = {m: sum(float(table[unit, c]) for unit, c in enumerate(pick)) for m, table in problem.errors.items()}
    return Allocation(pick, size, time, errors)


def least_score(problem: Problem, limits: Limits) -> float | None:
    """The best score there is, by trying every pick; None when no pick keeps the limits."""
    plans = (plain_cost(problem, pick) for pick in every_pick(problem))
    return min((score(problem, plan.errors) for plan in plans if keeps(limits, plan)), default=None)


def greedy(problem: Problem, budget: float) -> Allocation | None:
    """From the most accurate pick, the change of least error for the bytes it saves, until the budget is met."""
    weight = scales(problem)
    cost = sum(table / weight[metric] for metric, table in problem.errors.items())
    units = np.arange(len(problem.units))
    pick = np.where(problem.allowed, cost, np.inf).argmin(1)
    while problem.bytes[units, pick].sum() > budget:
        saved = problem.bytes[units, pick][:, None] - problem.bytes
        harm = cost - cost[units, pick][:, None]
        rate = np.where(problem.allowed & (saved > 0), harm / np.where(saved > 0, saved, 1), np.inf)
        if not np.isfinite(rate).any():
            return None
        unit, choice = np.unravel_index(rate.argmin(), rate.shape)
        pick[unit] = choice
    return evaluate(problem, pick)


def random_vectors(rng: np.random.Generator, problem: Problem, dim: int, shared: float = 0.8) -> Mapping[str, F32]:
    """Error vectors as long as the problem's errors say, that point in part one way, the same for all units or against.

    `shared` is the length of that part, beside 0.7 for what a unit's choices share and 0.5 for each choice's own.
    """
    found = {}
    for metric, table in problem.errors.items():
        units, columns = table.shape
        common = rng.normal(size=dim) * rng.choice([-1.0, 1.0], (units, 1, 1)) * shared
        way = common + 0.7 * rng.normal(size=(units, 1, dim)) + 0.5 * rng.normal(size=(units, columns, dim))
        way *= np.sqrt(table)[:, :, None] / np.linalg.norm(way, axis=2, keepdims=True)
        found[metric] = np.where(problem.allowed[:, :, None], way, np.nan).astype(np.float32)
    return found
