"""The measurements of a whole bundle, by its task: pictures on the deployed trajectory, text on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest
from edgekit.quant.calibrate import Calibration
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Unit, find_units, load_graph
from edgekit.quant.measure import Probe
from edgekit.quant.mixed import Measured, measure_parts
from edgekit.quant.moments import gathered_moments
from edgekit.quant.pictures import Call, PictureWorkload
from edgekit.quant.prepare import Prepared, prepare_pictures, rewrite
from edgekit.quant.refresh import refreshed
from edgekit.quant.requests import digest, picture_requests, trial_count
from edgekit.quant.targets import Target
from edgekit.quant.texts import MORE, TextWorkload, text_workloads

Progress = Callable[[str, float], None]


def measure_bundle(
    bundle: Bundle,
    target: Target,
    calibration: Path | None,
    work: Path,
    report: Progress,
    probe: Probe | None,
    threads: int = 0,
) -> Measured:
    """Measure everything a plan is decided from.

    Args:
        bundle: the unquantized bundle.
        target: what is planned for.
        calibration: prompts, pictures or text of the user's own.
        work: folder in which finished measurements are kept; a stopped one goes on from there.
        report: told what is done, and the share that is behind.
        probe: gradient probes, or None.
        threads: of the inference engine.

    Raises:
        BadRequest: the calibration cannot be used, or the target has no engine here to measure with.
    """
    check_measurable(target)
    work.mkdir(parents=True, exist_ok=True)
    if bundle.manifest.decoding is not None:
        return _measure_text(bundle, target, calibration, work, report, threads)
    chosen, held_out = picture_requests(bundle, calibration)
    workload = PictureWorkload(bundle, chosen, threads=threads)
    trials = workload.of(chosen[: trial_count(bundle)])
    parts = prepare_pictures(bundle, chosen, workload, trials, target, work, _span(report, 0.0, 0.25))
    metrics = [metric.name for metric in workload.metrics]
    workload.release()
    study = measure_parts(bundle, parts, metrics, target, work, _span(report, 0.25, 0.75), probe, threads)
    return Measured(
        study=study,
        parts=parts,
        target=target,
        workload=workload,
        held_out=workload.of(held_out),
        calibration=digest(chosen),
        refresh=lambda part, made: refreshed(bundle, workload, part, made, work),
    )


def check_measurable(target: Target) -> None:
    """Raise BadRequest for a target that nothing here can be measured for."""
    if target.engine not in ("ort-cpu", "openvino"):
        raise BadRequest(
            f"mixed precision for {target.name} is measured on that device, which this edgekit does not do yet; plan "
            "for cpu, or export for it in one precision"
        )


def _measure_text(
    bundle: Bundle, target: Target, calibration: Path | None, work: Path, report: Progress, threads: int
) -> Measured:
    """A decoder's weights alone change: its activations would have to be rounded alike whatever stands beside them."""
    every = target.allowed
    target = replace(target, allowed=lambda unit: _of_weights(every(unit)))
    report("reading text", 0.0)
    chosen, held_out, fed = text_workloads(bundle, calibration, more=MORE, threads=threads, work=work)
    path, rewrites, constants = rewrite(bundle, chosen.part, (), work)
    model = load_graph(path)
    units = find_units(model)
    report("calibrating", 0.1)
    moments, grams = gathered_moments(fed, model, units, work / f"{chosen.part}.moments", threads=threads)
    one = TextWorkload(bundle, [chosen.requests[0][:1]], threads=threads)
    part = Prepared(
        part=chosen.part,
        path=path,
        units=units,
        rewrites=rewrites,
        constants=constants,
        calls=(),
        deployed=Call(one.feeds[0], {}),
        runs=1.0,
        workload=chosen,
        scale={"kl": {"kl": 1.0}},
        found=_found(units, moments),
        grams=grams,
        rounding=f"gptq, fitted scales, of {fed.digest}",
    )
    study = measure_parts(bundle, (part,), ["kl"], target, work, _span(report, 0.1, 0.9), None, threads)
    return Measured(study, (part,), target, chosen, held_out, chosen.digest)


def _of_weights(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if CHOICES[name].activation == "float")


def _found(units: Sequence[Unit], moments: dict[str, np.ndarray]) -> Calibration:
    one_token = ((unit.data, unit.k) for unit in units if unit.op == "MatMul")
    shapes: dict[str, tuple[int, ...]] = {name: (1, 1, k) for name, k in one_token}
    return Calibration({}, {}, shapes, {}, moments)


def _span(report: Progress, start: float, length: float) -> Progress:
    return lambda what, share: report(what, start + length * share)
