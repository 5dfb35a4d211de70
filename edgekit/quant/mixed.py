"""A float bundle becomes a mixed-precision one: prepare, measure, decide, make, verify, repair, judge.

    measured = measure_bundle(bundle, options, work, report, probe)     # minutes; kept under `work`, resumed from there
    result = quantize(bundle, measured, options, staging, report)       # seconds to minutes

Everything that ships is in `staging` when this returns: graphs, tokenizers, and `report/` with the plan, the study and
what was measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgekit.bundle.graphfile import read_graph
from edgekit.bundle.manifest import Manifest, Part, PrecisionRecord, TensorSpec
from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest, KernelsMissing
from edgekit.quant.allocate import Allocation
from edgekit.quant.budget import Budget
from edgekit.quant.latency import LatencyTable
from edgekit.quant.measure import Probe, Sensitivity, all_choices, measure_sensitivity, scan_part, study_of
from edgekit.quant.plan import Error, PartChoices, PrecisionPlan, encode_plan
from edgekit.quant.prepare import Prepared
from edgekit.quant.scores import Scores
from edgekit.quant.study import Study
from edgekit.quant.targets import Target
from edgekit.quant.verify import Made, Verified, held_out_error, judge, make, time_parts
from edgekit.quant.workload import Workload, reference_of

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
Progress = Callable[[str, float], None]

PLAN_FILE, STUDY_FILE = "report/plan.json", "report/study.npz"
SURPRISE = 2.0  # times the predicted error, beyond which the plan is repaired
REPAIRS = 2
TRIES = 4  # at a byte budget, of which real graphs take a little more than weights alone
SUSPECTS = 10  # units measured again, at the quantized point
RIVALS = ("w8a8", "w8a16", "w4a16-32", "w4a16-64", "w4a16-128")


@dataclass(frozen=True)
class MixedOptions:
    """What was asked of mixed precision.

    Attributes:
        budget: sizes, times and caps.
        protect: patterns of units that keep their floats.
        plan: choices to take as they are, instead of deciding.
        threads: of the inference engine.
    """

    budget: Budget = field(default_factory=Budget)
    protect: tuple[str, ...] = ()
    plan: PrecisionPlan | None = None
    threads: int = 0


@dataclass(frozen=True, eq=False)
class Measured:
    """Everything that was measured of a bundle, and what it takes to make and verify a plan."""

    study: Study
    parts: tuple[Prepared, ...]
    target: Target
    workload: Workload
    held_out: Workload
    calibration: str
    refresh: Callable[[Prepared, Sequence[Made]], Prepared] = lambda part, _: part
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished plan: its graphs lie in the staging folder."""

    manifest: Manifest
    plan: PrecisionPlan
    made: tuple[Made, ...]
    verified: Verified
    rivals: Mapping[str, Mapping[str, float]]


def measure_parts(
    bundle: Bundle,
    parts: Sequence[Prepared],
    metrics: Sequence[str],
    target: Target,
    work: Path,
    report: Progress,
    probe: Probe | None,
    threads: int = 0,
) -> Study:
    """The study of prepared parts; finished trials and timings are kept under `work`."""
    found: list[tuple[Prepared, Sensitivity]] = []
    for number, part in enumerate(parts):
        told = _within(report, f"{part.part}: ", 0.9 * number / len(parts), 0.9 / len(parts))
        found.append((part, measure_sensitivity(part, target, probe, work, told)))
    table = LatencyTable(target, work / "latency.json", threads=threads)
    size = sum(file.bytes for file in bundle.manifest.files)
    return study_of(found, metrics, target, table, size, _within(report, "", 0.9, 0.1))


def quantize(bundle: Bundle, measured: Measured, options: MixedOptions, staging: Path, report: Progress) -> Outcome:
    """Decide, make, verify, repair and judge; fill `staging`.

    Raises:
        BudgetTooSmall: no plan fits. PlanRefused: the gate. KernelsMissing: the engine fuses less than planned.
        BadRequest: the given plan is not for this model.
    """
    study = measured.study
    references = reference_of(measured.held_out)
    for attempt in range(REPAIRS + 1):
        study, found, plan, made = _made_to_fit(bundle, measured, study, options, staging, report)
        report("verifying on held-out requests", 0.4)
        errors = held_out_error(measured.held_out, made, references)
        surprised = any(errors[name] > SURPRISE * max(found.errors[name], 1e-9) for name in errors)
        if options.plan is not None or not surprised or attempt == REPAIRS:
            break
        report("repairing: measuring the largest shares again", 0.6)
        study = _repaired(measured, study, found)
    report("timing", 0.7)
    medians, spreads = time_parts(made)
    verified = Verified(errors, medians, spreads)
    report("comparing with one choice for everything", 0.8)
    rivals = _rivals(measured, study, found, references, staging)
    plan = msgspec.structs.replace(plan, errors=_errors(found, errors))
    manifest = _compose(bundle, measured, plan, made, staging)
    gates = judge(
        verified,
        made,
        caps=options.budget.caps,
        bytes_now=_bytes_that_run(bundle, made),
        bytes_most=_most_bytes(options.budget, study),
        may_be_slower=plan.milliseconds is None or _slower_by_choice(options, study),
        rivals=rivals,
    )
    record = msgspec.structs.replace(manifest.precision, gates=(*manifest.precision.gates, *gates))
    return Outcome(msgspec.structs.replace(manifest, precision=record), plan, made, verified, rivals)


def _made_to_fit(
    bundle: Bundle, measured: Measured, study: Study, options: MixedOptions, staging: Path, report: Progress
) -> tuple[Study, Allocation, PrecisionPlan, tuple[Made, ...]]:
    """Decide and make; what graphs take beside their weights is known once they are made, and then counts."""
    for number in range(1, TRIES + 1):
        report("deciding", 0.0)
        found = _found(study, options)
        plan = _plan(measured, study, options, found)
        report("writing graphs", 0.1)
        made = _make_all(measured, plan, staging / "graphs")
        over = _bytes_that_run(bundle, made) - int(found.bytes)
        found = replace(found, bytes=found.bytes + over)
        real = replace(study, fixed_bytes=study.fixed_bytes + over)
        most = _most_bytes(options.budget, real)
        if options.plan is not None or most is None or found.bytes <= most:
            break
        study = replace(study, fixed_bytes=study.fixed_bytes + number * over)  # another plan may take more again
    return real, found, msgspec.structs.replace(plan, bytes=int(found.bytes)), made


def _bytes_that_run(bundle: Bundle, made: Sequence[Made]) -> int:
    """Of the bundle with new parts in it; its report is not counted."""
    old = [bundle.manifest.parts[each.part.part] for each in made]
    gone = {path for part in old for path in (part.graph, *part.data)}
    kept = sum(file.bytes for file in bundle.manifest.files if file.path not in gone)
    return kept + sum(each.bytes for each in made)


def _found(study: Study, options: MixedOptions) -> Allocation:
    if options.plan is None:
        return study.decide(options.budget, options.protect)
    problem = study.problem()
    chosen = {part: choices.units for part, choices in options.plan.parts.items()}
    return study.whole(problem, study.pick_of(chosen))


def _plan(measured: Measured, study: Study, options: MixedOptions, found: Allocation) -> PrecisionPlan:
    chosen = study.choices_of(found.pick)
    parts = {
        part.part: PartChoices(
            units=chosen.get(part.part, {}),
            ranges=_ranges(part, chosen.get(part.part, {})),
            rewrites=part.rewrites,
        )
        for part in measured.parts
    }
    budget = options.budget
    asked = {name: getattr(budget, name) for name in ("bytes", "bits", "milliseconds", "times")}
    method = ", ".join(f"{part}: {how}" for part, how in study.facts.get("method", {}).items())
    return PrecisionPlan(
        target=study.target,
        parts=parts,
        budgets={name: value for name, value in asked.items() if value is not None},
        caps=dict(budget.caps),
        bytes=int(found.bytes),
        milliseconds=found.milliseconds,
        errors=tuple(Error(name, predicted=value) for name, value in found.errors.items()),
        calibration=measured.calibration,
        method=method,
    )


def _ranges(part: Prepared, chosen: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    from edgekit.quant.choices import CHOICES

    names = [
        name
        for unit in part.units
        if CHOICES[chosen.get(unit.id, "fp32")].activation == "static"
        for name in (unit.data, unit.output)
    ]
    return {name: part.found.ranges[name] for name in dict.fromkeys(names) if name in part.found.ranges}


def _errors(found: Allocation, measured: Mapping[str, float]) -> tuple[Error, ...]:
    return tuple(Error(name, found.errors.get(name), value) for name, value in measured.items())


def _make_all(measured: Measured, plan: PrecisionPlan, folder: Path) -> tuple[Made, ...]:
    """Lower every part, in the order they run: what a later one holds of an earlier one is taken from its new graph."""
    made: list[Made] = []
    for part in measured.parts:
        fresh = measured.refresh(part, made)
        made.append(make(fresh, plan.parts[part.part].units, measured.target, folder))
    return tuple(made)


def _repaired(measured: Measured, study: Study, found: Allocation) -> Study:
    """The study with the largest shares of this plan's error measured again, where the other units now stand."""
    rows = np.arange(len(study.rows))
    shares = np.zeros(len(rows))
    for table in study.errors.values():
        taken = np.nan_to_num(table[rows, found.pick])
        shares += taken / max(float(taken.sum()), 1e-30)
    worst = [study.rows[at] for at in np.argsort(-shares)[:SUSPECTS]]
    errors = {name: table.copy() for name, table in study.errors.items()}
    for part in measured.parts:
        chosen = study.choices_of(found.pick).get(part.part, {})
        suspects = {row.units[0] for row in worst if row.part == part.part and len(row.units) == 1}
        if suspects:
            pairs = all_choices(part, measured.target, suspects)
            scores = scan_part(part, measured.target, pairs, at=chosen)
            for name, table in errors.items():
                _enter(table, study, part.part, suspects, scores, part.entered(name, scores))
    return replace(study, errors=errors, vectors={})


def _enter(table: F64, study: Study, part: str, units: Collection[str], scores: Scores, fresh: F64) -> None:
    """Write new errors (U, C) of some units over the study's."""
    for at, row in enumerate(study.rows):
        if row.part == part and row.units[0] in units:
            values = fresh[scores.units.index(row.units[0])]
            for column, name in enumerate(study.choices):
                if name in scores.choices and np.isfinite(value := values[scores.choices.index(name)]):
                    table[at, column] = value


def _rivals(
    measured: Measured, study: Study, found: Allocation, references: Sequence[Array], staging: Path
) -> dict[str, dict[str, float]]:
    """The measured errors of the best plan with one choice for everything that is no larger than this one."""
    from edgekit.quant.allocate import evaluate, uniform

    problem = study.problem()
    smaller = {}
    for name in RIVALS:
        if name in study.choices:
            plain = evaluate(problem, uniform(problem, name))
            if plain.bytes <= found.bytes * 1.001 and not np.array_equal(plain.pick, found.pick):
                smaller[name] = plain
    if not smaller:
        return {}
    name = min(smaller, key=lambda each: sum(smaller[each].errors.values()))
    folder = staging.parent / f"{staging.name}.rival"
    try:
        chosen = study.choices_of(smaller[name].pick)
        made: list[Made] = []
        for part in measured.parts:
            made.append(make(measured.refresh(part, made), chosen.get(part.part, {}), measured.target, folder))
        return {name: held_out_error(measured.held_out, made, references)}
    except KernelsMissing:
        return {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _most_bytes(budget: Budget, study: Study) -> float | None:
    most = [budget.bytes] if budget.bytes is not None else []
    if budget.bits is not None:
        most.append(budget.bits / 8 * study.params + study.fixed_bytes)
    return min(most) if most else None


def _slower_by_choice(options: MixedOptions, study: Study) -> bool:
    """Whether size was asked for that no plan as fast as the floats has."""
    problem = study.problem(options.protect)
    limits = study.limits(options.budget, problem)
    plain = study.whole(problem, study.pick_of({}))
    return limits.milliseconds is None or (plain.milliseconds is not None and limits.milliseconds > plain.milliseconds)


def _compose(bundle: Bundle, measured: Measured, plan: PrecisionPlan, made: Sequence[Made], staging: Path) -> Manifest:
    """Copy what stays, describe what is new."""
    manifest = bundle.manifest
    parts = dict(manifest.parts)
    for each in made:
        parts[each.part.part] = _described(manifest.parts[each.part.part], each, staging)
    kept = {path for name, part in manifest.parts.items() if parts[name] is part for path in (part.graph, *part.data)}
    graphs = {path for part in manifest.parts.values() for path in (part.graph, *part.data)}
    for entry in manifest.files:
        if entry.path not in graphs or entry.path in kept:
            target = staging / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.root / entry.path, target)
    report = staging / PLAN_FILE
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_bytes(encode_plan(plan))
    (staging / STUDY_FILE).write_bytes(measured.study.encode())
    record = PrecisionRecord(requested="mixed", gates=manifest.precision.gates)
    return msgspec.structs.replace(manifest, parts=parts, files=(), precision=record)


def _described(part: Part, made: Made, staging: Path) -> Part:
    graph = read_graph(made.path)
    data = made.path.with_name(f"{made.path.name}.data")
    known = {spec.name for spec in part.outputs}
    guards = tuple(
        TensorSpec(each.name, each.dtype, tuple(each.shape or ()))  # type: ignore[arg-type]
        for each in graph.outputs
        if each.name not in known
    )
    return msgspec.structs.replace(
        part,
        graph=made.path.relative_to(staging).as_posix(),
        data=(data.relative_to(staging).as_posix(),) if data.exists() else (),
        outputs=(*part.outputs, *guards),
        precision="mixed",
    )


def check_patterns(study: Study, patterns: Sequence[str]) -> None:
    """Raise BadRequest for a pattern that names no unit."""
    for pattern in patterns:
        if not any(fnmatch(row.name, pattern) or fnmatch(row.units[0], pattern) for row in study.rows):
            raise BadRequest(f"--protect {pattern!r} names no unit")


def _within(report: Progress, before: str, start: float, length: float) -> Progress:
    return lambda what, share: report(before + what, start + length * share)
