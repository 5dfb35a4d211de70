"""Gradient probes in a process of their own: `python -m edgekit.export.probe_worker FOLDER`.

The folder holds the task, the recorded runs and, in the end, the scores; torch's memory goes back with the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgekit import errors
from edgekit.errors import EdgekitError, MemoryLimit
from edgekit.quant.graph import find_units, load_graph
from edgekit.quant.measure import Probe, Progress
from edgekit.quant.metrics import Metric, metric_called
from edgekit.quant.pictures import Call
from edgekit.quant.prepare import Prepared
from edgekit.quant.scores import Scores
from edgekit.quant.targets import Target, get_target

TASK, CALLS, SCORES = "task.json", "calls.npz", "scores.npz"
MEMORY = 4 << 30  # bytes for activations, where no cap was given
LOG_LINES = 8
LARGE, CALLS_LARGE = 200_000_000, 4  # weights from which a run takes minutes
CALLS_MOST = 8  # recorded runs that are differentiated; with 8 probes each, a squared length is off by a fifth


class ProbeTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a child is to estimate."""

    graph: str
    target: str
    metrics: tuple[str, ...]
    ranges: dict[str, tuple[float, float]]
    gains: tuple[dict[str, float], ...]
    inputs: tuple[tuple[str, ...], ...]
    max_bytes: int


def probe_apart(max_memory: int | None) -> Probe:
    """A probe that runs in a child process, within `max_memory` bytes."""

    def probe(part: Prepared, metrics: Sequence[Metric], target: Target, report: Progress) -> Scores:
        with tempfile.TemporaryDirectory(prefix="probing-") as folder:
            return _run(Path(folder), part, metrics, target, report, max_memory)

    return probe


def _run(
    folder: Path, part: Prepared, metrics: Sequence[Metric], target: Target, report: Progress, max_memory: int | None
) -> Scores:
    arrays: dict[str, Any] = {}
    calls = _few(part)
    for number, call in enumerate(calls):
        arrays |= {f"{number}/{name}": value for name, value in call.feeds.items()}
    np.savez(folder / CALLS, **arrays)
    weights = sum(unit.params for unit in part.units) * 4
    task = ProbeTask(
        graph=str(part.path),
        target=target.name,
        metrics=tuple(metric.name for metric in metrics),
        ranges=part.found.ranges,
        gains=tuple(dict(call.gain) for call in calls),
        inputs=tuple(tuple(call.feeds) for call in calls),
        max_bytes=MEMORY if max_memory is None else max(max_memory - 2 * weights, MEMORY // 16),
    )
    (folder / TASK).write_bytes(msgspec.json.encode(task))
    package = str(Path(errors.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": path},
        ) as child,
    ):
        try:
            assert child.stdout is not None
            failed = _listen(child.stdout, report)
        except BaseException:
            child.kill()
            raise
        status = child.wait()
        if failed is not None:
            raise getattr(errors, failed["error"], EdgekitError)(failed["message"])
        if status in (-9, 137):
            raise MemoryLimit(f"the system killed the probes of {part.part}, as it does when memory runs out")
        if status != 0:
            log.seek(0)
            tail = "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_LINES:])
            raise EdgekitError(f"the probes of {part.part} ended with status {status}:\n{tail}")
    return Scores.load(folder / SCORES)


def _few(part: Prepared) -> tuple[Call, ...]:
    """Whole requests, as many as there is time for, and one at least: every step weighs the same."""
    runs = max(1, round(part.runs))
    most = CALLS_MOST if sum(unit.params for unit in part.units) < LARGE else CALLS_LARGE
    return part.calls[: max(1, most // runs) * runs]


def _listen(lines: Any, report: Progress) -> dict[str, str] | None:
    failed = None
    for line in lines:
        event = json.loads(line)
        if "error" in event:
            failed = event
        else:
            report(event["what"], event["share"])
    return failed


def main(folder: Path) -> int:
    """Do the task that lies in a folder; progress and failures go to stdout as JSON lines."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        out.write(msgspec.json.encode(event) + b"\n")

    try:
        _do(folder, tell)
    except EdgekitError as why:
        tell(error=type(why).__name__, message=str(why))
        return why.exit_code
    except MemoryError as why:
        tell(error="MemoryLimit", message=f"probes: {why or 'out of memory'}")
        return MemoryLimit.exit_code
    return 0


def _do(folder: Path, tell: Any) -> None:
    from edgekit.export.probes import probe_scores

    task = msgspec.json.decode((folder / TASK).read_bytes(), type=ProbeTask)
    model, target = load_graph(Path(task.graph)), get_target(task.target)
    units = find_units(model)
    with np.load(folder / CALLS, allow_pickle=False) as stored:
        calls = [
            Call({name: stored[f"{number}/{name}"] for name in names}, {}, gain)
            for number, (names, gain) in enumerate(zip(task.inputs, task.gains, strict=True))
        ]
    scores = probe_scores(
        model,
        units,
        {unit.id: target.allowed(unit) for unit in units},
        calls,
        [metric_called(name) for name in task.metrics],
        target=target,
        ranges=task.ranges,
        max_bytes=task.max_bytes,
        progress=lambda what, share: tell(what=what, share=share),
    )
    scores.save(folder / SCORES)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
