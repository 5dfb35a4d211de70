"""Local search on what the units' errors have in common: |sum_u e_u|^2 in place of sum_u |e_u|^2.

`allocate` adds squared errors as if no two units erred the same way. With each unit's error vector kept (of the
outputs, or a random projection of them, which keeps products: Johnson and Lindenstrauss 1984), the error of a whole
pick is the squared length of the vectors' sum. It has no linear form, so a pick of `allocate` is improved by steps: one
unit changes its choice, or two change together, as long as that lowers the sum and no limit is broken.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.quant.problem import (
    F64,
    ROUNDING,
    Allocation,
    Bools,
    Limits,
    Pick,
    Problem,
    boundary_total,
    evaluate,
    exceeded,
    scales,
)

F32 = npt.NDArray[np.float32]
ENOUGH = 1e-6  # the least a step must gain, as a part of what there is: below it, the rounding of float32 would decide
BLOCK = 16  # units whose products are made at once
KEPT = 10**8  # products that are kept from round to round, four bytes each (half of them are made)


def predicted(vectors: Mapping[str, F32], pick: npt.ArrayLike) -> dict[str, float]:
    """Error of a whole pick by metric: the squared length of the sum of its units' vectors (U, C, D)."""
    chosen = np.asarray(pick, np.int64)
    units = np.arange(len(chosen))
    sums = {metric: table[units, chosen].sum(0, dtype=np.float64) for metric, table in vectors.items()}
    return {metric: float(total @ total) for metric, total in sums.items()}


def refine(
    problem: Problem, limits: Limits, vectors: Mapping[str, F32], pick: npt.ArrayLike, *, rounds: int = 20
) -> Allocation:
    """A pick no single change and no exchange between two units improves, reached from `pick` by steps that do.

    The objective is that of `allocate` with `predicted` errors. Bytes and milliseconds are kept at every step. A cap
    holds for the predicted error: where the start is above one, steps that bring it down come first, whatever they do
    to the rest, and no step raises it; if none suffices, the result is still above it. No step is left to chance.

    Args:
        problem: as given to `allocate`.
        limits: as given to `allocate`.
        vectors: by metric, (U, C, D), the error vectors; those of choices that are not allowed are not read.
        pick: within the bytes and milliseconds of `limits`.
        rounds: passes over all pairs of units, at most.

    Returns:
        The pick with its predicted errors.

    Raises:
        BadRequest: vectors of other metrics or shapes than the problem's, or a pick that is over a limit.
    """
    began = time.perf_counter()
    if set(vectors) != set(problem.errors):
        raise BadRequest(f"vectors of {sorted(vectors)} do not fit a problem measured by {sorted(problem.errors)}")
    for metric, table in vectors.items():
        if table.ndim != 3 or table.shape[:2] != problem.allowed.shape:
            raise BadRequest(f"{metric} vectors have shape {table.shape}; {problem.allowed.shape} must come first")
        if not np.isfinite(table[problem.allowed]).all():
            raise BadRequest(f"{metric} vectors of allowed choices are not all finite")
    start = evaluate(problem, pick)
    if over := [name for name in exceeded(problem, limits, start.pick) if name not in limits.caps]:
        raise BadRequest(
            f"the pick to refine is over its limit of {' and '.join(over)}; start within, as allocate does"
        )
    walk = _Walk(problem, limits, vectors, start.pick)
    for _ in range(rounds):
        walk.refresh()
        while walk.change_one():
            pass
        # not any(): every unit has its turn
        if not sum([walk.change_two(unit) for unit in range(len(start.pick))]):
            break
    final = evaluate(problem, walk.pick)
    return replace(final, errors=predicted(vectors, walk.pick), seconds=time.perf_counter() - began)


class _Walk:
    """A pick on its way, with the running sum of its vectors and every vector's product with that sum.

    For units u and w that leave a and b for c and d, with s the sum, x = v_uc - v_ua and y = v_wd - v_wb:
    |s + x + y|^2 - |s|^2 = (2 s.x + |x|^2) + (2 s.y + |y|^2) + 2 x.y, the changes of each alone and a product.
    """

    def __init__(self, problem: Problem, limits: Limits, vectors: Mapping[str, F32], pick: Pick) -> None:
        self.problem, self.limits, self.pick = problem, limits, pick.copy()
        self.units = np.arange(len(pick))
        self.edges = np.array(problem.edges, np.int64).reshape(-1, 2)
        weight = scales(problem)
        self.caps = {metric: cap / weight[metric] for metric, cap in limits.caps.items()}
        self.tables: dict[str, F32] = {
            metric: np.where(problem.allowed[:, :, None], table, 0).astype(np.float32)
            / np.float32(weight[metric] ** 0.5)
            for metric, table in vectors.items()
        }
        self.grams = {metric: table @ table.transpose(0, 2, 1) for metric, table in self.tables.items()}  # (U, C, C)
        self.kept: dict[int, dict[str, F32]] = {}  # by first unit of a block
        self.refresh()

    def refresh(self) -> None:
        """Everything afresh, without what rounding has added."""
        self.sums = {m: table[self.units, self.pick].sum(0, dtype=np.float64) for m, table in self.tables.items()}
        self.values = {metric: float(total @ total) for metric, total in self.sums.items()}
        self.dots = {m: table @ self.sums[m].astype(np.float32) for m, table in self.tables.items()}
        self._look()

    def change_one(self) -> bool:
        """Change the unit that gains most; whether there was one."""
        fits = self.problem.allowed.copy()
        for added, room, _ in self.spending:
            fits &= added <= room
        best = self._best(self.alone, fits)
        return best is not None and self._step([divmod(best, fits.shape[1])])

    def change_two(self, unit: int) -> bool:
        """Change a unit together with the later one that gains most; whether there was one."""
        later = slice(unit + 1, None)
        if unit + 1 == len(self.pick):
            return False
        allowed = self.problem.allowed
        fits = allowed[unit][:, None, None] & allowed[later]  # (C, units after, C)
        for added, room, timed in self.spending:
            both = added[unit][:, None, None] + added[later]
            fits &= (both + self._meeting(unit) if timed else both) <= room
        if not fits.any():
            return False
        changes: dict[str, F32] = {}
        for metric, raw in self._products(unit).items():
            product = raw - raw[self.pick[unit]]
            product -= np.take_along_axis(product, self.pick[None, later, None], 2)
            changes[metric] = self.alone[metric][unit][:, None, None] + self.alone[metric][later] + 2 * product
        best = self._best(changes, fits)
        if best is None:
            return False
        mine, other, its = (int(place) for place in np.unravel_index(best, fits.shape))
        return self._step([(unit, mine), (unit + 1 + other, its)])

    def _products(self, unit: int) -> dict[str, F32]:
        """Products of a unit's vectors with those of later units (C, units after, C), made for a block of units."""
        first = unit - unit % BLOCK
        if first not in self.kept:
            if len(self.dots) * self.problem.allowed.size**2 > KEPT:
                self.kept.clear()
            self.kept[first] = {
                metric: np.tensordot(table[first : first + BLOCK], table[first:], (2, 2))
                for metric, table in self.tables.items()
            }
        return {metric: block[unit - first][:, unit - first + 1 :] for metric, block in self.kept[first].items()}

    def _over(self, values: Mapping[str, Any]) -> Any:
        """How far metrics are above their caps, added."""
        return sum((np.maximum(values[metric] - cap, 0.0) for metric, cap in self.caps.items()), 0.0)

    def _best(self, changes: Mapping[str, F32], fits: Bools) -> int | None:
        """Place of the change to make, if one is worth making: towards the caps first, then down the objective."""
        if self.caps:
            over = self._over(self.values)
            after = self._over({metric: self.values[metric] + changes[metric] for metric in self.caps})
            nearest = int(np.where(fits, after, np.inf).argmin())
            if fits.flat[nearest] and after.flat[nearest] < over * (1 - ENOUGH):
                return nearest
            fits = fits & (after <= over)
        total = np.where(fits, sum(changes.values()), np.inf)
        best = int(total.argmin())
        return best if total.flat[best] < -ENOUGH * sum(self.values.values()) else None

    def _step(self, moves: list[tuple[int, int]]) -> bool:
        """Take the moves if, computed anew in float64, they are a gain."""
        shift = {m: np.zeros(table.shape[2]) for m, table in self.tables.items()}
        for metric, table in self.tables.items():
            for unit, choice in moves:
                shift[metric] += table[unit, choice].astype(np.float64) - table[unit, self.pick[unit]]
        sums = {metric: total + shift[metric] for metric, total in self.sums.items()}
        values = {metric: float(total @ total) for metric, total in sums.items()}
        over, before = self._over(values), self._over(self.values)
        lower = sum(values.values()) < sum(self.values.values()) * (1 - ENOUGH)
        if not (over < before * (1 - ENOUGH) or (over <= before and lower)):
            return False
        for unit, choice in moves:
            self.pick[unit] = choice
        self.sums, self.values = sums, values
        for metric, table in self.tables.items():
            self.dots[metric] += table @ shift[metric].astype(np.float32)
        self._look()
        return True

    def _look(self) -> None:
        """What changing one unit alone adds, (U, C): to each metric, and to what has a limit beside what is left."""
        at, places = self.pick[:, None], np.arange(self.problem.allowed.shape[1])
        self.alone: dict[str, F32] = {}
        for metric, gram in self.grams.items():
            dots, length = self.dots[metric], gram[:, places, places]
            gone = np.take_along_axis(2 * dots - length, at, 1)
            self.alone[metric] = 2 * (dots - gram[self.units, self.pick]) + length - gone
        self.spending: list[tuple[F64, float, bool]] = []
        limits, timed = self.limits, self.problem.milliseconds
        if limits.bytes is not None:
            self._spend(self.problem.bytes, limits.bytes - self.problem.fixed_bytes, None)
        if limits.milliseconds is not None and timed is not None:
            self._spend(timed, limits.milliseconds, self._boundaries())

    def _spend(self, table: F64, limit: float, edges: F64 | None) -> None:
        own = table[self.units, self.pick]
        added, total = table - own[:, None], float(own.sum())
        if edges is not None:
            added, total = added + edges, total + self.problem.fixed_ms + boundary_total(self.problem, self.pick)
        self.spending.append((added, limit - total + limit * ROUNDING / 2, edges is not None))

    def _boundaries(self) -> F64:
        """Milliseconds that edges add when one unit changes (U, C)."""
        integer = self.problem.integer.astype(int)
        this, other = self.edges.T.ravel(), self.edges[:, ::-1].T.ravel()
        cost = np.zeros((len(self.pick), 2))  # of a unit on floats, on integers, its neighbours being as they are
        np.add.at(cost, (this, 1 - integer[self.pick[other]]), np.tile(self.problem.boundary_ms, 2))
        whole: F64 = cost[:, integer]
        return whole - np.take_along_axis(whole, self.pick[:, None], 1)

    def _meeting(self, unit: int) -> F64:
        """Milliseconds that both ends of an edge changing add beyond each changing alone (C, units after, C)."""
        on, was = self.problem.integer, self.problem.integer[self.pick]
        extra = np.zeros((len(on), len(self.pick) - unit - 1, len(on)))
        for at in np.flatnonzero((self.edges.min(1) == unit) & (self.problem.boundary_ms > 0)):
            other = int(self.edges[at].max())
            apart = (on[:, None] != on).astype(float) + float(was[unit] != was[other])
            alone = (on != was[other])[:, None].astype(float) + (on != was[unit])
            extra[:, other - unit - 1] += self.problem.boundary_ms[at] * (apart - alone)
        return extra
