"""From prepared parts to a study: sensitivity by probes and trials, bytes by arithmetic, time by running.

Probes (gradients, where torch is there) give every unit and choice at the cost of a few passes; trials (the engine
alone) are the truth they are held to, on a tenth of the units and on the most harmful ones. Where the two disagree, or
where there are no probes, everything is tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.errors import UnsupportedModel
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Unit
from edgekit.quant.latency import LatencyTable, boundaries, timed
from edgekit.quant.metrics import Metric
from edgekit.quant.prepare import Prepared, rounder
from edgekit.quant.scan import scan
from edgekit.quant.scores import Scores, merge, rank_correlation
from edgekit.quant.study import Row, Study
from edgekit.quant.targets import Target
from edgekit.runtime.backends import open_session

F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]
Progress = Callable[[str, float], None]
Probe = Callable[[Prepared, Sequence[Metric], Target, Progress], Scores]

AGREEMENT = 0.8  # rank correlation of probes and trials, below which probes are not believed
RANDOM_SHARE, WORST_SHARE = 0.10, 0.05  # of the units, that are tried even where probes are there
FEWEST_TRIED = 6
RANDOM_CHOICES = 3  # of a unit that is tried to check the probes; the most harmful ones are tried at all of theirs
SKETCH_PER_REQUEST = 512
BOUNDARY_ELEMENTS = 1 << 20  # of the tensor that a change of arithmetic is timed on


@dataclass(frozen=True)
class Sensitivity:
    """Scores of one part, and how far probes and trials agreed, by metric (none where nothing was compared)."""

    scores: Scores
    agreement: Mapping[str, float]
    trials: int


def measure_sensitivity(
    part: Prepared, target: Target, probe: Probe | None, work: Path, report: Progress
) -> Sensitivity:
    """Scores of every unit at every choice, in the metrics of the part's own workload.

    Args:
        part: what is measured.
        target: which choices there are, and how activations are rounded.
        probe: gradient probes, or None.
        work: folder in which finished trials are kept, so that a stopped measurement goes on.
        report: told what is done, and the share that is behind.
    """
    estimated = None
    if probe is not None:
        try:
            estimated = _probed(probe, part, target, work, report)
        except UnsupportedModel as why:
            report(f"no probes ({why})", 0.0)
    if estimated is None:
        found = scan_part(part, target, None, work, report)
        return Sensitivity(found, {}, int(found.known().sum()))
    chosen = _tried(estimated, part, target)
    found = scan_part(part, target, chosen, work, report)
    agreement = {name: rank_correlation(estimated, found, name) for name in found.metrics}
    if min(agreement.values()) < AGREEMENT:
        found = scan_part(part, target, None, work, report)
        return Sensitivity(found, agreement, int(found.known().sum()))
    return Sensitivity(merge(estimated, found), agreement, int(found.known().sum()))


def _probed(probe: Probe, part: Prepared, target: Target, work: Path, report: Progress) -> Scores:
    """Probe scores, from `work` if these runs of this graph were ever probed there."""
    names = [metric.name for metric in part.workload.metrics]
    told = hashlib.sha256(repr((target.name, names, sorted(part.found.ranges.items()), part.units)).encode())
    for call in part.calls:
        told.update(repr(sorted(call.gain.items())).encode())
        for name in sorted(call.feeds):
            told.update(np.ascontiguousarray(call.feeds[name]).tobytes())
    file = work / f"{part.part}.probe-{told.hexdigest()[:16]}.npz"
    if file.is_file():
        return Scores.load(file)
    found = probe(part, part.workload.metrics, target, report)
    beside = file.with_suffix(".new")
    found.save(beside)
    beside.replace(file)
    return found


def scan_part(
    part: Prepared,
    target: Target,
    only: Collection[tuple[str, str]] | None = None,
    work: Path | None = None,
    report: Progress | None = None,
    at: Mapping[str, str] | None = None,
) -> Scores:
    """Try units at choices (`only` these pairs of them, or all), the others as they are or as `at` says."""
    return scan(
        part.workload,
        part.part,
        part.model(),
        part.units,
        part.found.ranges,
        target,
        only=only,
        at=at,
        progress=report,
        store_dim=SKETCH_PER_REQUEST,
        store=rounder(part),
        store_name=part.rounding,
        cache=None if work is None else work / f"{part.part}.scan",
    )


def all_choices(part: Prepared, target: Target, units: Collection[str]) -> set[tuple[str, str]]:
    """Every choice of some units, as `scan_part` takes them."""
    return {(unit.id, name) for unit in part.units if unit.id in units for name in target.allowed(unit)}


def _tried(estimated: Scores, part: Prepared, target: Target) -> set[tuple[str, str]]:
    """A random tenth of the units at a few choices, and all choices of those whose worst is worst in some metric."""
    total = len(part.units)
    generator = np.random.default_rng(0)
    chosen = set()
    for at in generator.choice(total, min(total, max(FEWEST_TRIED, round(RANDOM_SHARE * total))), replace=False):
        names = [name for name in target.allowed(part.units[at]) if name != "fp32"]
        few = generator.permutation(len(names))[:RANDOM_CHOICES]
        chosen |= {(part.units[at].id, names[each]) for each in few}
    for name in estimated.metrics:
        worst = np.nan_to_num(estimated.errors(name)).max(axis=1)
        most = np.argsort(-worst)[: max(1, round(WORST_SHARE * total))]
        chosen |= all_choices(part, target, {estimated.units[each] for each in most})
    return chosen


def study_of(
    parts: Sequence[tuple[Prepared, Sensitivity]],
    metrics: Sequence[str],
    target: Target,
    table: LatencyTable,
    bundle_bytes: int,
    report: Progress,
) -> Study:
    """Put all parts in one set of tables.

    Args:
        parts: prepared and measured.
        metrics: names, of the finished output.
        target: what they are planned for.
        table: measures time.
        bundle_bytes: of the unquantized bundle.
        report: told what is done, and the share that is behind.
    """
    blocks = [
        _block(part, found, metrics, target, table, _shared(report, number, len(parts)))
        for number, (part, found) in enumerate(parts)
    ]
    names = tuple(name for name in CHOICES if any(name in block.choices for block in blocks))
    rows = tuple(row for block in blocks for row in block.rows)
    fp32 = sum(int(np.nansum(block.bytes[:, block.choices.index("fp32")])) for block in blocks)
    # a few random projections order the units well; what two of them have in common they do not show
    scanned = all(found.scores.method == "scan" for _, found in parts)
    edges: list[tuple[int, int]] = []
    costs: list[float] = []
    start = 0
    for block in blocks:
        edges += [(a + start, b + start) for a, b in block.edges]
        costs += block.boundary_ms
        start += len(block.rows)
    return Study(
        target=target.name,
        rows=rows,
        choices=names,
        errors={
            name: _stacked([_aligned(block.errors[name], block.choices, names) for block in blocks]) for name in metrics
        },
        bytes=_stacked([_aligned(block.bytes, block.choices, names) for block in blocks]),
        milliseconds=_stacked([_aligned(block.milliseconds, block.choices, names) for block in blocks]),
        fixed_bytes=max(0, bundle_bytes - fp32),
        fixed_ms=sum(block.fixed_ms for block in blocks),
        edges=tuple(edges),
        boundary_ms=tuple(costs),
        vectors={name: _vectors(blocks, name, names) for name in metrics} if scanned else {},
        facts={
            "agreement": {part.part: dict(found.agreement) for part, found in parts},
            "trials": {part.part: found.trials for part, found in parts},
            "method": {part.part: found.scores.method for part, found in parts},
            "runs": {part.part: part.runs for part, _ in parts},
            "spread": {f"{part.part}/{name}": value for part, _ in parts for name, value in _widest(part).items()},
            "rewrites": {part.part: [f"{each.kind} {each.node}" for each in part.rewrites] for part, _ in parts},
        },
    )


@dataclass(frozen=True, eq=False)
class _Block:
    """One part's rows of the study."""

    rows: tuple[Row, ...]
    choices: tuple[str, ...]
    errors: Mapping[str, F64]
    vectors: Mapping[str, F32]
    bytes: F64
    milliseconds: F64
    fixed_ms: float
    edges: tuple[tuple[int, int], ...]
    boundary_ms: list[float]


def _block(
    part: Prepared, found: Sensitivity, metrics: Sequence[str], target: Target, table: LatencyTable, report: Progress
) -> _Block:
    scores = found.scores
    choices = scores.choices
    groups = _groups(part.units)
    times = table.measure(part.model(), part.units, part.found.shapes, report)
    times = times[:, [list(CHOICES).index(name) for name in choices]] * part.runs
    size = np.array([[_bytes(unit, name, target) for name in choices] for unit in part.units])
    vectors, errors = {}, {}
    for name in metrics:
        own, scale = part.account(name)
        whole = scores.vectors[own] * np.float32(np.sqrt(scale))
        vectors[name] = np.stack([whole[list(group)].sum(0) for group in groups])
        errors[name] = np.square(vectors[name].astype(np.float64)).sum(-1)
    edges = tuple((_row_of(groups, a), _row_of(groups, b)) for a, b in boundaries(part.units))
    edges = tuple((a, b) for a, b in edges if a != b)
    costs = [table.boundary(part.found.shapes[part.units[groups[b][0]].data]) * part.runs / 2 for _, b in edges]
    milliseconds = np.stack([times[list(group)].sum(0) for group in groups])
    integer = np.array([CHOICES[name].activation != "float" for name in choices])
    for (a, b), cost in zip(edges, costs, strict=True):
        for row in (a, b):
            milliseconds[row, integer] = np.maximum(milliseconds[row, integer] - cost, 0)
    whole_ms = _whole(part) * part.runs
    fixed = max(0.0, whole_ms - float(np.nansum(milliseconds[:, choices.index("fp32")])))
    return _Block(
        rows=tuple(_row(part, group) for group in groups),
        choices=choices,
        errors=errors,
        vectors=vectors,
        bytes=np.stack([size[group[0]] + 0 * size[list(group)].sum(0) for group in groups]),
        milliseconds=milliseconds,
        fixed_ms=fixed,
        edges=edges,
        boundary_ms=costs,
    )


def _groups(units: Sequence[Unit]) -> tuple[tuple[int, ...], ...]:
    """Units by the weights they share, in the graph's order."""
    found: dict[str, list[int]] = {}
    for at, unit in enumerate(units):
        found.setdefault(unit.origin, []).append(at)
    return tuple(tuple(group) for group in found.values())


def _row_of(groups: Sequence[Sequence[int]], unit: int) -> int:
    return next(at for at, group in enumerate(groups) if unit in group)


def _row(part: Prepared, group: Sequence[int]) -> Row:
    units = [part.units[at] for at in group]
    first = units[0]
    return Row(part.part, tuple(unit.id for unit in units), units[-1].role, first.params, (first.n, first.k))


def _bytes(unit: Unit, name: str, target: Target) -> float:
    """NaN where the choice is not allowed."""
    return float(target.choice(name).weight.bytes(unit.n, unit.k)) if name in target.allowed(unit) else np.nan


def _whole(part: Prepared) -> float:
    """Milliseconds of one run of the unquantized part."""
    return timed(open_session(part.path, "cpu", planned=False), part.deployed.feeds).median


def _aligned(table: F64, own: Sequence[str], names: Sequence[str]) -> F64:
    out = np.full((len(table), len(names)), np.nan)
    for at, name in enumerate(own):
        out[:, names.index(name)] = table[:, at]
    return out


def _stacked(tables: Sequence[F64]) -> F64:
    return np.concatenate(tables)


def _vectors(blocks: Sequence[_Block], metric: str, names: Sequence[str]) -> F32:
    """Side by side: errors of two parts are not known to add or to cancel, so they share no dimension."""
    widths = [block.vectors[metric].shape[-1] for block in blocks]
    out = np.zeros((sum(len(block.rows) for block in blocks), len(names), sum(widths)), np.float32)
    row = column = 0
    for block, width in zip(blocks, widths, strict=True):
        for at, name in enumerate(block.choices):
            out[row : row + len(block.rows), names.index(name), column : column + width] = block.vectors[metric][:, at]
        row, column = row + len(block.rows), column + width
    return out


def _widest(part: Prepared) -> dict[str, float]:
    """The values whose range changes most from step to step."""
    worst = sorted(part.found.spread.items(), key=lambda item: -item[1])[:3]
    return {name: round(value, 2) for name, value in worst}


def _shared(report: Progress, number: int, of: int) -> Progress:
    return lambda what, share: report(what, (number + share) / of)
