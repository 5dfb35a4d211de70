"""What was measured of a bundle, in tables: everything a plan is decided from, and nothing that needs a graph.

A study is written beside the bundle it led to, without its error vectors, so that another budget is solved in a moment.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.quant.allocate import Allocation, Limits, Problem, allocate, pareto, uniform
from edgekit.quant.budget import Budget
from edgekit.quant.choices import CHOICES
from edgekit.quant.refine import refine

F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]
Raw = bytes  # a table is called so, too
Pick = npt.NDArray[np.int64]

STUDY_FORMAT = 1
FLOATS = ("fp32", "bf16", "fp16")
SHARED = 0.3  # of what units' errors have in common on the calibration requests, that is taken to hold on others


@dataclass(frozen=True, eq=False)
class Row:
    """One decision: a unit, or several that share their stored weights."""

    part: str
    units: tuple[str, ...]
    role: str
    params: int
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        """`part/unit`, as plans, patterns and reports write it."""
        return f"{self.part}/{self.units[0]}"


@dataclass(frozen=True, eq=False)
class Study:
    """Tables of R rows and C choices; NaN where a choice is not allowed.

    Attributes:
        target: name in TARGETS.
        rows, choices: what the axes are.
        errors: by metric, (R, C), on the finished output.
        bytes: (R, C), of the weights as stored.
        milliseconds: (R, C), of all runs in one generation.
        fixed_bytes, fixed_ms: of everything that is no row.
        edges: pairs of rows with nothing between them, and what a change of arithmetic there costs.
        vectors: by metric, float32 (R, C, D); empty when the study was read back from a bundle.
        facts: what was measured, with what, on what: for reports.
    """

    target: str
    rows: tuple[Row, ...]
    choices: tuple[str, ...]
    errors: Mapping[str, F64]
    bytes: F64
    milliseconds: F64
    fixed_bytes: int
    fixed_ms: float
    edges: tuple[tuple[int, int], ...] = ()
    boundary_ms: tuple[float, ...] = ()
    vectors: Mapping[str, F32] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> int:
        """Weights that a choice is made for."""
        return sum(row.params for row in self.rows)

    def problem(self, protect: Sequence[str] = ()) -> Problem:
        """As the allocation takes it; rows that a pattern names keep their floats.

        Raises:
            BadRequest: a pattern that names nothing.
        """
        allowed = np.isfinite(self.bytes)
        for table in self.errors.values():
            allowed &= np.isfinite(table)
        for pattern in protect:
            named = [fnmatch(row.name, pattern) or fnmatch(row.units[0], pattern) for row in self.rows]
            if not any(named):
                raise BadRequest(f"--protect {pattern!r} names no unit; {self.rows[0].name!r} is what a unit is called")
            for column, choice in enumerate(self.choices):
                if choice not in FLOATS:
                    allowed[named, column] = False
        integer = np.array([CHOICES[name].activation != "float" for name in self.choices])
        return Problem(
            units=tuple(row.name for row in self.rows),
            choices=self.choices,
            errors=dict(self.errors),
            bytes=self.bytes,
            allowed=allowed,
            milliseconds=self.milliseconds,
            fixed_ms=self.fixed_ms,
            fixed_bytes=self.fixed_bytes,
            edges=self.edges,
            boundary_ms=np.array(self.boundary_ms),
            integer=integer,
        )

    def limits(self, budget: Budget, problem: Problem) -> Limits:
        """A budget in the problem's terms; what is left open is what uniform 8 bits would take.

        Without a budget, mixed precision is held to the size and the time of `w8a8` everywhere (`w8a16` where nothing
        can take that). A budget of one kind leaves the other to what the unquantized bundle takes.
        """
        if not budget.limits_size and not budget.limits_time:
            plain = self.whole(problem, uniform(problem, self.eight_bits))
            return Limits(plain.bytes, plain.milliseconds, budget.caps)
        most = self.whole(problem, uniform(problem, "fp32"))
        size = budget.bytes
        if budget.bits is not None:
            size = min(size if size is not None else np.inf, budget.bits / 8 * self.params + self.fixed_bytes)
        time = budget.milliseconds
        if budget.times is not None and most.milliseconds is not None:
            time = min(time if time is not None else np.inf, budget.times * most.milliseconds)
        return Limits(size, time if time is not None else most.milliseconds, budget.caps)

    @property
    def eight_bits(self) -> str:
        """The choice that "plain int8" means here."""
        return (
            "w8a8"
            if "w8a8" in self.choices and np.isfinite(self.bytes[:, self.choices.index("w8a8")]).any()
            else "w8a16"
        )

    @staticmethod
    def whole(problem: Problem, pick: Pick) -> Allocation:
        """What a pick costs."""
        from edgekit.quant.allocate import evaluate

        return evaluate(problem, pick)

    def decide(self, budget: Budget, protect: Sequence[str] = ()) -> Allocation:
        """The plan of least error within a budget.

        Raises:
            BudgetTooSmall: there is none. BadRequest: a pattern, or a metric, that names nothing.
        """
        problem = self.problem(protect)
        limits = self.limits(budget, problem)
        for name in budget.caps:
            if name not in self.errors:
                raise BadRequest(f"--metric-cap {name}: this study has {', '.join(self.errors)}")
        found = allocate(problem, limits)
        return refine(problem, limits, self._shrunk(), found.pick) if self.vectors else found

    def _shrunk(self) -> dict[str, F32]:
        """Vectors with the same lengths and SHARED times the products: each gets a dimension of its own.

        On few requests some errors cancel by chance. On an image model with eight, plans refined with the whole
        products were 13 to 14 % worse on held-out requests than unrefined ones, with 0.3 of them 6 to 13 % better.
        """
        found = {}
        units = np.arange(len(self.rows))
        for name, table in self.vectors.items():
            own = np.zeros((*table.shape[:2], len(self.rows)), np.float32)
            own[units, :, units] = np.sqrt((1 - SHARED) * self.errors[name])
            found[name] = np.concatenate([table * np.float32(np.sqrt(SHARED)), own], -1)
        return found

    def front(self, protect: Sequence[str] = (), points: int = 12) -> tuple[Allocation, ...]:
        """Plans that nothing beats, from the smallest to the most accurate."""
        return pareto(self.problem(protect), Limits(), points)

    def choices_of(self, pick: Pick) -> dict[str, dict[str, str]]:
        """A pick as part -> unit -> choice."""
        found: dict[str, dict[str, str]] = {}
        for row, column in zip(self.rows, pick, strict=True):
            for unit in row.units:
                found.setdefault(row.part, {})[unit] = self.choices[int(column)]
        return found

    def pick_of(self, parts: Mapping[str, Mapping[str, str]]) -> Pick:
        """The pick that part -> unit -> choice means; what is not named stays fp32.

        Raises:
            BadRequest: a unit or choice that does not exist here, or two choices for shared weights.
        """
        known = {(row.part, unit): at for at, row in enumerate(self.rows) for unit in row.units}
        pick = np.full(len(self.rows), self.choices.index("fp32"))
        said: dict[int, str] = {}
        for part, units in parts.items():
            for unit, choice in units.items():
                if (part, unit) not in known:
                    raise BadRequest(f"the plan names {part}/{unit}, which this model does not have")
                at = known[part, unit]
                if choice not in self.choices or not np.isfinite(self.bytes[at, self.choices.index(choice)]):
                    raise BadRequest(f"the plan makes {part}/{unit} {choice}, which {self.target} cannot run there")
                if said.setdefault(at, choice) != choice:
                    raise BadRequest(f"the plan makes {' and '.join(self.rows[at].units)} differ; they share weights")
                pick[at] = self.choices.index(choice)
        return pick

    def encode(self) -> Raw:
        """As bytes of an .npz, without vectors and without pickles."""
        told = {
            "format": STUDY_FORMAT,
            "target": self.target,
            "rows": [[row.part, row.units, row.role, row.params, row.shape] for row in self.rows],
            "choices": self.choices,
            "fixed_bytes": self.fixed_bytes,
            "fixed_ms": self.fixed_ms,
            "edges": self.edges,
            "boundary_ms": self.boundary_ms,
            "facts": self.facts,
        }
        tables = {f"error.{name}": table for name, table in self.errors.items()}
        file = io.BytesIO()
        tables |= {"bytes": self.bytes, "milliseconds": self.milliseconds}
        np.savez(file, allow_pickle=False, told=np.array(json.dumps(told)), **tables)
        return file.getvalue()


def decode_study(raw: bytes, where: str) -> Study:
    """Read what `Study.encode` wrote.

    Raises:
        BadRequest: not such bytes.
    """
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            told = json.loads(str(file["told"]))
            if told["format"] != STUDY_FORMAT:
                raise BadRequest(f"{where} has format {told['format']}; this edgekit reads {STUDY_FORMAT}")
            rows = (
                Row(part, tuple(units), role, params, tuple(shape)) for part, units, role, params, shape in told["rows"]
            )
            return Study(
                target=told["target"],
                rows=tuple(rows),
                choices=tuple(told["choices"]),
                errors={name.removeprefix("error."): file[name] for name in file.files if name.startswith("error.")},
                bytes=file["bytes"],
                milliseconds=file["milliseconds"],
                fixed_bytes=told["fixed_bytes"],
                fixed_ms=told["fixed_ms"],
                edges=tuple((a, b) for a, b in told["edges"]),
                boundary_ms=tuple(told["boundary_ms"]),
                facts=told["facts"],
            )
    except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError) as why:
        raise BadRequest(f"{where} holds no study ({why}); export with --precision mixed to make one") from why
