"""Which unit takes which choice: the least error that fits the bytes and milliseconds, as a mixed-integer program.

    min   sum_m sum_u errors[m][u, pick_u] / scale_m                x[u, c] = 1: unit u takes choice c
    s.t.  sum_c x[u, c] = 1
          sum bytes x <= budget;  sum errors[m] x <= cap_m          (epsilon-constraints, Haimes et al. 1971)
          sum milliseconds x + sum_e boundary_e y_e <= limit        y_e >= |q_a - q_b|, q_u = 1 on integers

That errors of single units add up is the usual model of mixed precision (HAWQ-V3, Yao et al. 2021, which solves it the
same way; MixDQ, Zhao et al. 2024). `refine` then corrects it with what the units' errors have in common.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from edgekit.errors import BudgetTooSmall
from edgekit.quant.problem import (
    BYTES,
    MS,
    Allocation,
    Bools,
    Limits,
    Pick,
    Problem,
    Row,
    boundary_total,
    evaluate,
    exceeded,
    row_of,
    rows_of,
    scales,
    score,
    uniform,
    within,
)

__all__ = [
    "Allocation",
    "Limits",
    "Pick",
    "Problem",
    "allocate",
    "boundary_total",
    "evaluate",
    "exceeded",
    "pareto",
    "scales",
    "score",
    "uniform",
]

SLACKS = (0.0, 4e-6, 4e-5, 4e-4)  # the solver keeps a row to 1e-6 of it; a plan over the limit is sought again, tighter
COARSE, FINE = 0.05, 1e-4  # gaps: of the first solve, which only finds the size of the answer, and of the answer


@dataclass(frozen=True, eq=False)
class _Found:
    pick: Pick
    total: float
    bound: float  # no pick has less


def _worthwhile(problem: Problem, rows: list[Row]) -> Bools:
    """Allowed choices that fit every limit with all other units at their least, and that no other choice dominates.

    One dominates another when it costs no more in anything and less in something (or comes first); where edges cost,
    both must agree on integers. No optimum is lost by leaving the others out.
    """
    allowed, before = problem.allowed, ~problem.allowed
    while allowed.any(1).all() and (allowed != before).any():
        before = allowed
        for row in rows:
            above, _, left = row.excess(before)
            allowed = allowed & (above <= left)
    timed = problem.bytes if problem.milliseconds is None else problem.milliseconds
    costs = np.stack([problem.bytes, timed, *problem.errors.values()])
    this, other = costs[:, :, :, None], costs[:, :, None, :]  # (table, unit, this, other)
    place = np.arange(len(problem.choices))
    beats = (this <= other).all(0) & ((this < other).any(0) | (place[:, None] < place)) & allowed[:, :, None]
    if problem.milliseconds is not None and problem.boundary_ms.any():
        beats &= problem.integer[:, None] == problem.integer
    return allowed & ~beats.any(1)


_SOLVING = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep HiGHS, which calls C's printf whatever its options say, off the process's stdout; one solve at a time.

    What anyone else writes meanwhile comes out after the solve: only lines of HiGHS are left out.
    """
    with _SOLVING, tempfile.TemporaryFile() as caught:
        _flush()
        saved = os.dup(1)
        os.dup2(caught.fileno(), 1)
        try:
            yield
        finally:
            _flush()
            os.dup2(saved, 1)
            os.close(saved)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"Highs"):
                    os.write(1, line)


def _flush() -> None:
    with suppress(AttributeError, ValueError, OSError):  # stdout may be None, closed or full
        sys.stdout.flush()
    ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)


def _keeping(problem: Problem, rows: list[Row], allowed: Bools, slack: float) -> LinearConstraint:
    """One choice per unit, y_e >= q_a - q_b and y_e >= q_b - q_a, every row under its limit; columns are x, then y."""
    (units, columns), edges = allowed.shape, np.array(problem.edges, np.int64).reshape(-1, 2)
    count = len(edges)
    signs, place = np.repeat([1.0, -1.0], count), np.tile(np.arange(count), 2)
    ends = sparse.csr_matrix((signs, (place, edges.T.ravel())), (count, units))
    change = ends @ sparse.kron(sparse.eye(units), problem.integer[None].astype(float), format="csr")
    one = sparse.kron(sparse.eye(units), np.ones((1, columns)))
    x = sparse.vstack([one, change, -change])
    y = sparse.vstack([sparse.csr_matrix((units, count)), -sparse.eye(count), -sparse.eye(count)])
    lines = np.array([row.line(problem, allowed) for row in rows]).reshape(-1, units * columns + count)
    most = [1.0 - slack if row.excess(allowed)[2] > 0 else 0.0 for row in rows]
    return LinearConstraint(
        sparse.vstack([sparse.hstack([x, y]), sparse.csr_matrix(lines)]).tocsc(),
        np.repeat([1.0, -np.inf], [units, 2 * count + len(rows)]),
        np.concatenate([np.ones(units), np.zeros(2 * count), most]),
    )


def _solve(problem: Problem, goal: Row, rows: list[Row], gap: float, seconds: float, slack: float) -> _Found | None:
    """One call of HiGHS, in parts of what each limit leaves above the least possible: all numbers are about 1."""
    allowed = _worthwhile(problem, [goal, *rows])
    if not allowed.any(1).all():
        return None
    units, columns = allowed.shape
    cost = goal.line(problem, allowed)
    kinds = np.arange(len(cost)) < allowed.size  # y is 0 or 1 by itself
    with _quiet():
        answer = milp(
            cost,
            constraints=_keeping(problem, rows, allowed, slack),
            integrality=kinds.astype(int),
            bounds=Bounds(0, np.append(allowed.ravel(), np.ones(len(cost) - allowed.size))),
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
    if answer.x is None:
        if answer.status == 1:
            raise TimeoutError
        return None
    pick = np.where(allowed, answer.x[: allowed.size].reshape(units, columns), -1).argmax(1)
    _, least, left = goal.excess(allowed)
    return _Found(pick, goal.total(problem, pick), least + max(answer.mip_dual_bound or 0.0, 0.0) * max(left, 0.0))


def _kept(problem: Problem, goal: Row, rows: list[Row], gap: float, seconds: float) -> _Found | None:
    """A solution whose own sums, not the solver's, are within every limit."""
    for slack in SLACKS:
        found = _solve(problem, goal, rows, gap, seconds, slack)
        if found is None or all(within(row.total(problem, found.pick), row.limit) for row in rows):
            return found
    return None


def _minimise(problem: Problem, goal: Row, rows: list[Row], gap: float, seconds: float) -> _Found | None:
    """The pick of least `goal` within `rows`, to a relative `gap`; None when there is none.

    Solved again in units of the answer before: a good plan's error is a millionth of the worst one's, and HiGHS stops
    at differences of 1e-6.
    """
    best: _Found | None = None
    most = float(goal.amount.max(1).sum()) + goal.fixed + goal.edges * float(problem.boundary_ms.sum())
    wanted = COARSE
    for _ in range(6):
        try:
            found = _kept(problem, replace(goal, limit=most), rows, wanted, seconds)
        except TimeoutError as why:
            if best is None:
                text = f"no plan was found in {seconds:.0f} s, nor proven impossible. Loosen a limit."
                raise BudgetTooSmall(text) from why
            break
        if found is None:
            break
        best = found if best is None or found.total < best.total else replace(best, bound=found.bound)
        least = goal.excess(problem.allowed)[1]
        if wanted == gap and found.total - least >= 0.1 * (most - least):
            break
        wanted, most = gap, best.total
    return best


def allocate(problem: Problem, limits: Limits, *, gap: float = FINE, seconds: float = 60.0) -> Allocation:
    """The pick of least score that keeps every limit; the same pick every time, unless a solve takes over `seconds`.

    Args:
        problem: what every choice costs.
        limits: what the plan must keep within.
        gap: stop when the score is proven to be this near the best, as a part of it.
        seconds: for one solve; then the best pick so far is taken, and its `gap` says how good it is.

    Raises:
        BudgetTooSmall: no pick keeps them; it names the limit, and the least that would do.
        BadRequest: a limit that cannot be meant.
    """
    began = time.perf_counter()
    rows = rows_of(problem, limits)
    weight = scales(problem)
    goal = Row("score", np.sum([table / weight[metric] for metric, table in problem.errors.items()], axis=0))
    found = _minimise(problem, goal, rows, gap, seconds)
    if found is None:
        raise _refusal(problem, rows, seconds)
    proven = (found.total - found.bound) / found.total if found.total > 0 else 0.0
    return replace(evaluate(problem, found.pick), gap=max(proven, 0.0), seconds=time.perf_counter() - began)


def pareto(
    problem: Problem, limits: Limits, points: int = 20, *, by: Literal["bytes", "milliseconds"] = "bytes"
) -> tuple[Allocation, ...]:
    """The best picks at budgets of `by` in even ratios, from the least possible to what more error would not use.

    The other limits are kept, and one in `by` is where the sweep ends. Cheapest first; each has a lower score than all
    before it.

    Raises:
        BudgetTooSmall: no pick keeps the limits.
        BadRequest: a limit that cannot be meant.
    """

    def budgeted(budget: float | None) -> Limits:
        return replace(limits, bytes=budget) if by == BYTES else replace(limits, milliseconds=budget)

    high = float(getattr(allocate(problem, limits), by))
    least = _minimise(problem, row_of(problem, by), rows_of(problem, budgeted(None)), FINE, 60.0)
    low = min(least.total, high) if least else high
    found: list[Allocation] = []
    for budget in np.geomspace(low, high, points) if low > 0 else np.linspace(low, high, points):
        with suppress(BudgetTooSmall):  # the least possible, less the rounding of it
            plan = allocate(problem, budgeted(float(budget)))
            if not found or score(problem, plan.errors) < score(problem, found[-1].errors):
                found = [one for one in found if getattr(one, by) < getattr(plan, by)] + [plan]
    return tuple(found)


_SAID = {
    BYTES: ("budget is", "the smallest plan needs", "Raise --budget or allow smaller choices (--protect fewer units)."),
    MS: ("budget is", "the fastest plan takes", "Raise --budget or allow faster choices (--protect fewer units)."),
}


def _refusal(problem: Problem, rows: list[Row], seconds: float) -> BudgetTooSmall:
    """Which limit is too small by itself; or else, how far each is missed when the others are kept."""
    for together in (False, True):
        said = []
        for row in rows:
            others = [other for other in rows if together and other is not row]
            found = _minimise(problem, replace(row, limit=math.inf), others, FINE, seconds)
            if found is not None and not within(found.total, row.limit):
                said.append(_sentence(problem, row, found, others))
        if said:
            return BudgetTooSmall((" Or: " if together else " And: ").join(said))
    asked = ", ".join(f"{row.name} {_figure(row.name, row.limit, math.floor)}" for row in rows)
    return BudgetTooSmall(f"no plan keeps all of these limits, though one keeps each: {asked}. Loosen two of them.")


def _sentence(problem: Problem, row: Row, found: _Found, others: list[Row]) -> str:
    cap = (f"cap on {row.name} is", "the most accurate plan has", "Raise --metric-cap or allow larger choices.")
    asked, needs, advice = _SAID.get(row.name, cap)
    names = Counter(problem.choices[choice] for choice in found.pick)
    kept = [f"{other.name} <= {_figure(other.name, other.limit, math.floor)}" for other in others]
    within_others = f" while {' and '.join(kept)}" if kept else ""
    return (
        f"{asked} {_figure(row.name, row.limit, math.floor)}; {needs} {_figure(row.name, found.total, math.ceil)}"
        f"{within_others} ({', '.join(f'{names[name]} x {name}' for name in problem.choices if names[name])}). {advice}"
    )


def _figure(name: str, value: float, toward: Callable[[float], int]) -> str:
    """Four digits, rounded so that a budget typed from them is never too small again."""
    sizes = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
    unit, size = next((row for row in sizes if abs(value) >= row[1]), sizes[-1])
    if name != BYTES:
        unit, size = "ms" * (name == MS), 1.0
    step = 10.0 ** (math.floor(math.log10(abs(value) / size)) - 3) if value else 1.0
    nudge = 1e-9 if toward is math.floor else -1e-9
    return f"{toward(value / size / step + nudge) * step:#.4g} {unit}".strip()
