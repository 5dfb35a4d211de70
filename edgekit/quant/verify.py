"""A plan as real graphs: lowered, opened, run on inputs it was not made on, timed beside the unquantized ones, judged.

The gate is the last word: a plan that breaks its budget or its caps, that runs slower than what it replaces, whose
integer kernels the engine did not build, or that one choice for everything would have beaten, does not ship.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.bundle.manifest import Gate
from edgekit.errors import PlanRefused
from edgekit.quant.fused import Fused, check_fused
from edgekit.quant.lower import lower
from edgekit.quant.metrics import errors
from edgekit.quant.prepare import Prepared, rounder
from edgekit.quant.targets import Target
from edgekit.quant.workload import Workload
from edgekit.runtime.backends import Session, open_session

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

CAPS = {"content": 0.02, "quality": 0.25, "nsr": 0.05, "kl": 0.1}  # error beyond which a result is another result
SLOWER = 1.05  # times the unquantized bundle's time; what two runs of the same graph may differ by
ROUNDS, MOST_ROUNDS, SECONDS = 5, 200, 2.0  # of timing a part: as many rounds as SECONDS have room for


@dataclass(frozen=True, eq=False)
class Made:
    """A part as it would ship.

    Attributes:
        path: the lowered graph.
        choices: by unit id.
        bytes: of graph and data.
        kernels: planned and found, None where the engine is not here.
    """

    part: Prepared
    path: Path
    choices: Mapping[str, str]
    bytes: int
    kernels: Fused | None


@dataclass(frozen=True, eq=False)
class Verified:
    """What was measured of a plan.

    Attributes:
        measured: error by metric, on held-out requests.
        milliseconds: by part, of one run: unquantized, and as planned; interleaved medians.
        spread: by part, interquartile ranges of the same.
    """

    measured: Mapping[str, float]
    milliseconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def make(part: Prepared, choices: Mapping[str, str], target: Target, folder: Path, name: str | None = None) -> Made:
    """Lower one part into `folder` as `<name>.onnx` (+ `.data`)."""
    folder.mkdir(parents=True, exist_ok=True)
    model = part.model()
    lower(model, part.units, choices, part.found.ranges, target, rounder(part))
    path = folder / f"{name or part.part}.onnx"
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=256)
    data = path.with_name(f"{path.name}.data")
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    kernels = check_fused(path, part.units, choices) if target.engine == "ort-cpu" else None
    return Made(part, path, choices, size, kernels)


def held_out_error(workload: Workload, made: Sequence[Made], references: Sequence[Array]) -> dict[str, float]:
    """Every metric of the finished output, all parts of a plan in place."""
    sessions = {each.part.part: open_session(each.path, "cpu", planned=False) for each in made}
    return errors(workload.metrics, references, workload.run(sessions))


def time_parts(made: Sequence[Made]) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Milliseconds of one run of every part, unquantized and planned in turn: medians, and interquartile ranges.

    The planned time is the unquantized one times the median ratio of neighbours, so that a machine that is slow for a
    while is slow for both.
    """
    medians, spreads = {}, {}
    for each in made:
        before, after = _in_turn(each)
        usual = float(np.median(before))
        medians[each.part.part] = (usual, usual * float(np.median(after / before)))
        spreads[each.part.part] = (_iqr(before), _iqr(after))
    return medians, spreads


def _in_turn(made: Made) -> tuple[F64, F64]:
    """Milliseconds (rounds,) of the unquantized and of the planned part."""
    feeds = made.part.deployed.feeds
    sessions = [open_session(path, "cpu", planned=False) for path in (made.part.path, made.path)]
    taken: list[list[float]] = []
    begin = time.perf_counter()
    while len(taken) <= ROUNDS or (len(taken) <= MOST_ROUNDS and time.perf_counter() - begin < SECONDS):
        taken.append([_one_run(session, feeds) for session in sessions])
    both = np.array(taken[1:])  # the first round warms up
    return both[:, 0], both[:, 1]


def _one_run(session: Session, feeds: Mapping[str, Array]) -> float:
    start = time.perf_counter()
    session.run(feeds)
    return 1e3 * (time.perf_counter() - start)


def _iqr(values: F64) -> float:
    low, high = np.quantile(values, (0.25, 0.75))
    return float(high - low)


def whole_time(verified: Verified, made: Sequence[Made]) -> tuple[float, float]:
    """Milliseconds of one generation, unquantized and planned."""
    runs = {each.part.part: each.part.runs for each in made}
    totals = [sum(pair[which] * runs[name] for name, pair in verified.milliseconds.items()) for which in (0, 1)]
    return totals[0], totals[1]


def judge(
    verified: Verified,
    made: Sequence[Made],
    *,
    caps: Mapping[str, float],
    bytes_now: int,
    bytes_most: float | None,
    may_be_slower: bool,
    rivals: Mapping[str, Mapping[str, float]],
) -> tuple[Gate, ...]:
    """Hold what was measured against what was asked.

    Args:
        verified, made: of the plan.
        caps: by metric; those of CAPS where none is given.
        bytes_now, bytes_most: of the bundle, and what it may have.
        may_be_slower: whether time was given up for size, knowingly.
        rivals: by name, the measured errors of plans with one choice for everything that are no larger.

    Raises:
        PlanRefused: it names every condition that fails, and by how much.
    """
    gates, failed = [], []
    for name, value in verified.measured.items():
        cap = caps.get(name, CAPS.get(name, np.inf))
        gates.append(Gate(f"{name}: error on held-out requests", value, cap))
        if not value <= cap:
            failed.append(f"{name} error {value:.3g} on held-out requests is over the limit of {cap:.3g}")
    if bytes_most is not None:
        gates.append(Gate("bytes of the bundle", float(bytes_now), bytes_most))
        if bytes_now > bytes_most:
            failed.append(f"the bundle has {bytes_now / 1e6:,.1f} MB, over its budget of {bytes_most / 1e6:,.1f} MB")
    before, after = whole_time(verified, made)
    if verified.milliseconds:
        gates.append(Gate("milliseconds of one generation against unquantized", after, SLOWER * before))
        if after > SLOWER * before and not may_be_slower:
            failed.append(
                f"it takes {after:,.1f} ms where the unquantized bundle takes {before:,.1f} ms, and is less exact; "
                f"--budget {math.ceil(10 * after / before) / 10:g}x says that it may"
            )
    for rival, theirs in rivals.items():
        if all(theirs[name] < value for name, value in verified.measured.items()):
            told = ", ".join(
                f"{name} {theirs[name]:.3g} against {value:.3g}" for name, value in verified.measured.items()
            )
            failed.append(f"{rival} everywhere is no larger and more exact on every metric ({told})")
    if failed:
        raise PlanRefused(
            f"the plan is refused: {'; '.join(failed)}. Raise --budget, loosen --metric-cap, or leave out --plan"
        )
    return tuple(gates)
