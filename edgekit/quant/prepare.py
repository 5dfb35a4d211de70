"""Before anything is measured: which parts a bundle really runs, on what, and each part's graph ready for trials."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.bundle.store import Bundle
from edgekit.quant.calibrate import Calibration, calibrate
from edgekit.quant.choices import CHOICES, Choice
from edgekit.quant.graph import (
    F32,
    Unit,
    find_units,
    from_matrix,
    initializer,
    load_graph,
    normalised,
    to_matrix,
    weight_matrix,
)
from edgekit.quant.lower.common import Store, stored_name
from edgekit.quant.pictures import Call, CallsWorkload, PictureWorkload, denoisers
from edgekit.quant.plan import Rewrite
from edgekit.quant.requests import deployed as as_deployed
from edgekit.quant.rewrite import Constants, find_constant_rows, split_rows, split_shortcuts
from edgekit.quant.scores import Scores
from edgekit.quant.smooth import divide, smoothing_factors
from edgekit.quant.targets import Target
from edgekit.quant.weights import Stored, restore, store
from edgekit.quant.workload import Workload
from edgekit.runtime.backends import open_session
from edgekit.runtime.diffusion.pipeline import DrawRequest

Array = npt.NDArray[Any]
Progress = Callable[[str, float], None]

NBITS_ROUNDING = "search"  # of weights that meet floats: a row of ROUNDINGS
COARSER = "w8a16"  # to see how errors carry: weights alone, as no range is known yet
WORTH = 0.7  # of the rounding error must be all that is left for smoothing to be done


@dataclass(frozen=True, eq=False)
class Prepared:
    """One part, rewritten and calibrated.

    Attributes:
        part: its name in the bundle.
        path: the graph that is quantized: normalised, with exact rewrites.
        units: of that graph.
        rewrites, constants: what was rewritten, and the numbers to do it again.
        calls: recorded runs on the calibration requests, each with its gain.
        deployed: a run at the bundle's own size, one picture: what time is measured on.
        runs: how often one request runs it.
        workload: what its trials are measured by.
        scale: by metric of the finished sample, what an error of `workload` is multiplied by to be one of the sample.
        found: ranges and shapes of activations.
        grams: files with the second moments (k, k) of values, by name: weights that meet floats are then rounded by
            GPTQ, else by NBITS_ROUNDING.
        rounding: what finished trials know this rounding by, whatever it was calibrated on included.
    """

    part: str
    path: Path
    units: tuple[Unit, ...]
    rewrites: tuple[Rewrite, ...]
    constants: Constants
    calls: tuple[Call, ...]
    deployed: Call
    runs: float
    workload: Workload
    scale: Mapping[str, Mapping[str, float]]
    found: Calibration
    grams: Mapping[str, Path] = field(default_factory=dict)
    rounding: str = NBITS_ROUNDING

    def account(self, metric: str) -> tuple[str, float]:
        """The workload's own metric that stands for one of the finished sample, and what it is multiplied by."""
        ((own, scale),) = self.scale[metric].items()
        return own, scale

    def entered(self, metric: str, scores: Scores) -> npt.NDArray[np.float64]:
        """Errors (U, C) of the part's trials, as errors of the finished sample."""
        own, scale = self.account(metric)
        return scores.errors(own) * scale

    def model(self) -> ir.Model:
        """The graph, weights in their file."""
        return load_graph(self.path)


def prepare_pictures(
    bundle: Bundle,
    requests: Sequence[DrawRequest],
    workload: PictureWorkload,
    trials: PictureWorkload,
    target: Target,
    work: Path,
    report: Progress,
) -> tuple[Prepared, ...]:
    """Every part that the workload runs and that has units, ready to be measured.

    Args:
        bundle: the unquantized bundle.
        requests, workload: calibration requests, and what runs them.
        trials: runs those of them that a denoiser's trials are measured on.
        target: what is planned for; smoothing is for its 8-bit activations.
        work: folder for the graphs.
        report: told what is done, and the share that is behind.
    """
    names = [name for name in bundle.manifest.parts if bundle.manifest.parts[name].data]
    report("recording the trajectory", 0.0)
    before = workload.record(names)
    calls = before | {name: found for name, found in workload.record(names, whole=True).items() if not before[name]}
    once = workload.of([as_deployed(requests[0])]).record(names, whole=True)
    used = [name for name in names if calls[name]]
    metrics = [metric.name for metric in workload.metrics]
    prepared = []
    for number, name in enumerate(used):
        part_report = _within(report, name, number / len(used), 1 / len(used))
        part_report("rewriting", 0.0)
        path, rewrites, constants = rewrite(bundle, name, calls[name], work)
        units = find_units(load_graph(path))
        if not units:
            continue
        told, scale = _account(workload, name, calls[name], bundle, path if before[name] else None)
        workload.release()  # two of a large network are many gigabytes
        found = calibrate(load_graph(path), units, (*told, once[name][0]), part_report)
        if any("w8a8" in target.allowed(unit) for unit in units):
            found, smoothed, factors = _smoothed(path, units, (*told, once[name][0]), found, part_report)
            rewrites, constants = (*rewrites, *smoothed), replace(constants, factors=factors)
            units = find_units(load_graph(path))
        denoises = name in denoisers(bundle)
        own: Workload = trials if denoises else CallsWorkload(name, told, metrics)
        runs = len(told) / len(requests)
        prepared.append(Prepared(name, path, units, rewrites, constants, told, once[name][0], runs, own, scale, found))
    return tuple(prepared)


def rewrite(
    bundle: Bundle, part: str, calls: Sequence[Call], work: Path
) -> tuple[Path, tuple[Rewrite, ...], Constants]:
    """Normalise a part's graph, split what is exact to split, and write it under `work`."""
    model = normalised(load_graph(bundle.graph(part)))
    rewrites: list[Rewrite] = []
    rows = {}
    units = find_units(model)
    if any(unit.role == "cross_kv" for unit in units):
        for name in [str(value.name) for value in model.graph.inputs]:
            samples = [call.feeds[name] for call in calls if name in call.feeds]
            if samples and samples[0].ndim == 3:
                constant = find_constant_rows(samples)
                if constant.rows and constant.are_leading:
                    rows[name] = constant
        rewrites += split_rows(model, units, rows)
    rewrites += split_shortcuts(model, find_units(model))
    path = work / f"{part}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data")
    return path, tuple(rewrites), Constants(rows=rows)


def _smoothed(
    path: Path, units: tuple[Unit, ...], calls: Sequence[Call], found: Calibration, report: Progress
) -> tuple[Calibration, tuple[Rewrite, ...], Mapping[str, Array]]:
    """Smooth the norms for which 8 bits on both sides then lose less, and calibrate their outputs anew.

    What is lost of y = W x by rounding x in steps of d and w_ij in steps of e_i is, with independent errors,
    |W|^2 d^2 / 12 + sum_i e_i^2 / 12 sum_j E[x_j^2].
    """
    model = load_graph(path)
    factors = smoothing_factors(model, units, found.channel_max)
    kept = {
        name: s
        for name, s in factors.items()
        if _lost(model, units, found, name, s) < WORTH * _lost(model, units, found, name, np.ones_like(s))
    }
    if not kept:
        return found, (), {}
    done = divide(model, units, kept)
    ir.save(model, path, external_data=f"{path.name}.smooth.data")  # the old weights are read while these are written
    path.with_name(f"{path.name}.data").unlink()
    changed = [unit for unit in find_units(load_graph(path)) if unit.data in kept]
    again = calibrate(load_graph(path), changed, calls, report)
    merged = {
        name: {**getattr(found, name), **getattr(again, name)}
        for name in ("ranges", "spread", "shapes", "channel_max", "moments")
    }
    return Calibration(**merged), done, kept


def _lost(model: ir.Model, units: Sequence[Unit], found: Calibration, value: str, s: Array) -> float:
    """Energy of the rounding errors of every product that reads a norm's output, if it is divided by `s`."""
    step = 2 * (found.channel_max[value] / s).max() / 255
    moments = float((found.moments[value] / s**2).sum())
    lost = 0.0
    for unit in units:
        if unit.data == value and unit.op == "MatMul":
            weights = weight_matrix(model, unit) * s
            steps = np.abs(weights).max(1) / 127
            lost += float(np.square(weights).sum() * step**2 + np.square(steps).sum() * moments) / 12
    return lost


def _account(
    workload: PictureWorkload, part: str, calls: tuple[Call, ...], bundle: Bundle, path: Path | None
) -> tuple[tuple[Call, ...], Mapping[str, Mapping[str, float]]]:
    """The calls with their gains, and how a part's own errors are entered into the account of the finished sample.

    A denoiser's trials run to the sample themselves; of what comes before it (then `path` is its graph), what is left
    there of coarser weights says what is left of any error; what comes after (decoders, enlargers) makes the picture,
    and a relative error of it counts as one of the sample.
    """
    names = [metric.name for metric in workload.metrics]
    if part in denoisers(bundle):
        gains = workload.gains(part)
        told = tuple(replace(call, gain=gains[number % len(gains)]) for number, call in enumerate(calls))
        return told, {name: {name: 1.0} for name in names}
    left = dict.fromkeys(names, 1.0)
    if path is not None:
        with tempfile.TemporaryDirectory(prefix="coarser-") as folder:
            left = workload.carried(part, open_session(_coarser(path, Path(folder)), "cpu", planned=False))
    own = {metric.name for metric in CallsWorkload(part, calls, names).metrics}
    return calls, {name: {name if name in own else "nsr": left[name]} for name in names}


def _coarser(path: Path, folder: Path) -> Path:
    """A copy of a graph with its weights rounded to COARSER: an error of the kind that is to come, and a small one."""
    model = load_graph(path)
    for unit in find_units(model):
        value = model.graph.initializers[unit.weight]
        value.const_value = _rounded(initializer(model, unit.weight), unit)
    made = folder / path.name
    ir.save(model, made, external_data=f"{path.name}.data")
    return made


def _rounded(tensor: Any, unit: Unit) -> ir.LazyTensor:
    def make() -> Any:
        meant = restore(store(to_matrix(tensor.numpy(), unit), CHOICES[COARSER]))
        made = from_matrix(meant, unit, tuple(tensor.shape))
        return ir.tensor(made.astype(tensor.dtype.numpy()), name=unit.weight)

    return ir.LazyTensor(make, tensor.dtype, tensor.shape, name=unit.weight)


def _within(report: Progress, name: str, start: float, length: float) -> Progress:
    return lambda what, share: report(f"{name}: {what}", start + length * share)


def rounder(part: Prepared) -> Store:
    """Weights alone are rounded with the calibration inputs in mind; what meets integer activations, to nearest.

    Units that share their weights are rounded alike, for the inputs of all products among them: a table takes the codes
    that are best for the product it is tied to.
    """

    def rounded(matrix: F32, choice: Choice, code_bits: int, unit: Unit) -> Stored:
        if choice.activation != "float" or choice.is_float or unit.op == "Conv":
            return store(matrix, choice, code_bits=code_bits)
        name = stored_name(unit)
        data = [each.data for each in part.units if each.op == "MatMul" and stored_name(each) == name]
        rounding, moments = NBITS_ROUNDING, [part.found.moments.get(each) for each in data]
        if data and all(each in part.grams for each in data):
            rounding, moments = "gptq", [np.load(part.grams[each], mmap_mode="r") for each in data]
        known = [each for each in moments if each is not None]
        importance = np.asarray(sum(known[1:], known[0])) if known else None
        return store(matrix, choice, code_bits=code_bits, importance=importance, rounding=rounding)

    return rounded
