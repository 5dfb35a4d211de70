"""What an allocation is asked and what it answers: units, choices, what each pair costs, limits, a pick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.quant.choices import CHOICES, get_choice

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Pick = npt.NDArray[np.int64]  # (U,): a choice's place in Problem.choices, per unit
BYTES, MS = "bytes", "milliseconds"

ROUNDING = 1e-12  # of a limit: what the order of a sum may change


@dataclass(frozen=True, eq=False)
class Problem:
    """U units, C choices, and what each pair costs; the numbers of a pair that is not allowed are not read.

    Attributes:
        units: names, for people.
        choices: names in CHOICES.
        errors: by metric, (U, C), at least 0: of one unit alone at that choice.
        bytes: (U, C), of the unit's weights as stored.
        allowed: (U, C).
        milliseconds: (U, C), or None where nothing was timed; then edges cost nothing.
        fixed_ms, fixed_bytes: of everything that is no unit.
        edges: pairs of neighbouring units.
        boundary_ms: (E,), what an edge costs when one of its ends runs on integers and the other does not.
        integer: (C,), the choices that run on integers; by default none.
    """

    units: tuple[str, ...]
    choices: tuple[str, ...]
    errors: Mapping[str, F64]
    bytes: F64
    allowed: Bools
    milliseconds: F64 | None = None
    fixed_ms: float = 0.0
    fixed_bytes: float = 0.0
    edges: tuple[tuple[int, int], ...] = ()
    boundary_ms: F64 = field(default_factory=lambda: np.zeros(0))
    integer: Bools = field(default_factory=lambda: np.zeros(0, bool))

    def __post_init__(self) -> None:
        """Check every shape and number.

        Raises:
            BadRequest: it says which.
        """
        shape = (len(self.units), len(self.choices))
        fresh: dict[str, Any] = {
            "allowed": np.asarray(self.allowed, bool),
            "integer": np.asarray(self.integer, bool) if len(self.integer) else np.zeros(shape[1], bool),
            "boundary_ms": np.asarray(self.boundary_ms, np.float64),
        }
        if not self.units or not self.errors or {BYTES, MS} & set(self.errors):
            raise BadRequest(f"a problem needs a unit and a metric, and no metric is called {BYTES} or {MS}")
        wanted = {"allowed": shape, "integer": shape[1:], "boundary_ms": (len(self.edges),)}
        if wrong := {name: fresh[name].shape for name in wanted if fresh[name].shape != wanted[name]}:
            raise BadRequest(f"shapes {wrong} do not fit {shape[0]} units, {shape[1]} choices, {len(self.edges)} edges")
        if not (some := fresh["allowed"].any(1)).all():
            raise BadRequest(f"unit {self.units[int(np.argmin(some))]!r} has no allowed choice")
        if any(a == b or not 0 <= min(a, b) <= max(a, b) < shape[0] for a, b in self.edges):
            raise BadRequest(f"an edge joins two different units of 0 to {shape[0] - 1}")
        if not np.isfinite(rest := [*fresh["boundary_ms"], self.fixed_ms, self.fixed_bytes]).all() or min(rest) < 0:
            raise BadRequest("what boundaries and the fixed rest take must be finite and at least 0")
        tables = {metric: self._checked(table, f"{metric} error", fresh) for metric, table in self.errors.items()}
        fresh |= {"errors": tables, "bytes": self._checked(self.bytes, BYTES, fresh)}
        if self.milliseconds is not None:
            fresh["milliseconds"] = self._checked(self.milliseconds, MS, fresh)
        for name, value in fresh.items():
            object.__setattr__(self, name, value)

    def _checked(self, table: F64, what: str, fresh: Mapping[str, Any]) -> F64:
        values, allowed = np.asarray(table, np.float64), fresh["allowed"]
        if values.shape != allowed.shape:
            raise BadRequest(f"{what} has shape {values.shape}; units and choices need {allowed.shape}")
        if (bad := allowed & ~(np.isfinite(values) & (values >= 0))).any():
            unit, choice = map(int, np.argwhere(bad)[0])
            where = f"{self.units[unit]!r} at {self.choices[choice]}"
            raise BadRequest(f"{what} of unit {where} is {values[unit, choice]}; it must be finite and at least 0")
        return np.where(allowed, values, 0.0)


@dataclass(frozen=True)
class Limits:
    """What a plan must keep within; None is no limit. `caps` are the most summed error, by metric."""

    bytes: float | None = None
    milliseconds: float | None = None
    caps: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Allocation:
    """A pick and what it costs.

    Attributes:
        pick: (U,).
        bytes: of all units.
        milliseconds: of the whole, fixed rest and boundaries included; None where nothing was timed.
        errors: by metric, summed over units (by `refine`: of the summed vectors).
        gap: how far at most, as a part of it, the score lies above the best possible; inf where nothing is proven.
        seconds: taken to find it.
    """

    pick: Pick
    bytes: float
    milliseconds: float | None
    errors: dict[str, float]
    gap: float = math.inf
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Row:
    """One sum over units and the most it may be; milliseconds have a fixed rest and costs of edges."""

    name: str
    amount: F64
    limit: float = math.inf
    fixed: float = 0.0
    edges: bool = False

    def total(self, problem: Problem, pick: Pick) -> float:
        """Of a pick."""
        own = float(self.amount[np.arange(len(pick)), pick].sum()) + self.fixed
        return own + boundary_total(problem, pick) if self.edges else own

    def excess(self, allowed: Bools) -> tuple[F64, float, float]:
        """Above each unit's least (U, C), the sum of those, and what the limit leaves beyond that sum."""
        least = np.where(allowed, self.amount, np.inf).min(1)
        base = float(least.sum()) + self.fixed
        return np.where(allowed, self.amount - least[:, None], 0.0), base, self.limit * (1 + ROUNDING) - base

    def line(self, problem: Problem, allowed: Bools) -> F64:
        """Coefficients of x and y, in parts of what is left; an edge that costs more than that cannot be paid."""
        above, _, left = self.excess(allowed)
        left = left if left > 0 else 1.0
        return np.append(above / left, np.minimum(problem.boundary_ms / left, 2.0) * self.edges)


def within(total: float, limit: float) -> bool:
    """Whether a sum keeps a limit, up to the rounding of adding it."""
    return total <= limit * (1 + ROUNDING)


def boundary_total(problem: Problem, pick: Pick) -> float:
    """Milliseconds of all edges whose ends differ in whether they run on integers."""
    ends = problem.integer[pick][np.array(problem.edges, np.int64).reshape(-1, 2)]
    return float(problem.boundary_ms[ends[:, 0] != ends[:, 1]].sum())


def scales(problem: Problem) -> dict[str, float]:
    """What each metric is divided by before metrics are added: its error with every unit at its worst choice."""
    return {metric: float(table.max(1).sum()) or 1.0 for metric, table in problem.errors.items()}


def score(problem: Problem, errors: Mapping[str, float]) -> float:
    """What `allocate` minimises: the errors of all metrics, each in parts of its scale."""
    return sum(errors[metric] / scale for metric, scale in scales(problem).items())


def row_of(problem: Problem, name: str, limit: float = math.inf) -> Row:
    """The sum called `name`.

    Raises:
        BadRequest: milliseconds where nothing was timed.
    """
    if name == MS:
        if problem.milliseconds is None:
            raise BadRequest("a limit in milliseconds needs units that were timed")
        return Row(name, problem.milliseconds, limit, problem.fixed_ms, bool(problem.boundary_ms.any()))
    if name == BYTES:
        return Row(name, problem.bytes, limit, problem.fixed_bytes)
    return Row(name, problem.errors[name], limit)


def rows_of(problem: Problem, limits: Limits) -> list[Row]:
    """One sum per limit.

    Raises:
        BadRequest: a limit that cannot be meant.
    """
    named = {BYTES: limits.bytes, MS: limits.milliseconds, **limits.caps}
    asked = {name: limit for name, limit in named.items() if limit is not None and limit != math.inf}
    if unknown := set(asked) - {BYTES, MS, *problem.errors}:
        raise BadRequest(f"no metric {', '.join(sorted(unknown))} to cap; measured: {', '.join(problem.errors)}")
    if bad := [name for name, limit in asked.items() if not math.isfinite(limit)]:
        raise BadRequest(f"the limit of {', '.join(bad)} is no number")
    return [row_of(problem, name, limit) for name, limit in asked.items()]


def evaluate(problem: Problem, pick: npt.ArrayLike) -> Allocation:
    """What a pick costs.

    Raises:
        BadRequest: not one allowed choice per unit.
    """
    chosen = np.asarray(pick, np.int64)
    rows, columns = problem.allowed.shape
    if chosen.shape != (rows,) or chosen.min() < 0 or chosen.max() >= columns:
        raise BadRequest(f"a pick is {rows} numbers of choices, 0 to {columns - 1}")
    if not (fine := problem.allowed[np.arange(rows), chosen]).all():
        unit = int(np.argmin(fine))
        raise BadRequest(f"unit {problem.units[unit]!r} may not take {problem.choices[chosen[unit]]}")
    names = [BYTES, *([] if problem.milliseconds is None else [MS]), *problem.errors]
    totals = {name: row_of(problem, name).total(problem, chosen) for name in names}
    return Allocation(chosen, totals.pop(BYTES), totals.pop(MS, None), totals)


def exceeded(problem: Problem, limits: Limits, pick: Pick) -> list[str]:
    """Which limits an allowed pick does not keep: bytes, milliseconds, names of metrics.

    Raises:
        BadRequest: a limit that cannot be meant.
    """
    return [row.name for row in rows_of(problem, limits) if not within(row.total(problem, pick), row.limit)]


def uniform(problem: Problem, choice: str) -> Pick:
    """Every unit at `choice`, or at the nearest row of CHOICES above it that the unit may take, or at its highest.

    Raises:
        BadRequest: no such choice, here or in CHOICES.
    """
    if choice not in problem.choices:
        raise BadRequest(f"no unit may become {choice!r}; measured: {', '.join(problem.choices)}")
    order = list(CHOICES)
    rank = np.array([order.index(get_choice(name).name) for name in problem.choices])
    above = problem.allowed & (rank <= rank[problem.choices.index(choice)])
    pick: Pick = np.where(above, rank, -1).argmax(1)
    highest: Pick = np.where(problem.allowed, rank, len(order)).argmin(1)
    pick[~above.any(1)] = highest[~above.any(1)]
    return pick
