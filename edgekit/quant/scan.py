"""The scan: every choice of every unit is run, one at a time, and its error in the final outputs is kept as a vector.

It needs no gradients, and is what estimates from gradients are checked against. A scan that was killed goes on where it
was: results lie in a folder, one file per unit, under names that hash all they depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import BadRequest
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Unit, initializer
from edgekit.quant.lower.common import Store, rtn_store
from edgekit.quant.scores import F32, Scores, sketch
from edgekit.quant.targets import Target
from edgekit.quant.trial import TrialSession, open_trial
from edgekit.quant.trial_graph import Form, Range, ranges_of, rounding_of
from edgekit.quant.workload import Workload, reference_of

Array = npt.NDArray[Any]
Progress = Callable[[str, float], None]
Vectors = dict[str, F32]  # by metric, (D,)

CACHE_FORMAT = 1
SEED = 0  # of the sketches
PLAIN = "fp32"  # what has no error


def scan(
    workload: Workload,
    part: str,
    model: ir.Model,
    units: Sequence[Unit],
    ranges: Mapping[str, Range],
    target: Target,
    *,
    only: Collection[tuple[str, str]] | None = None,
    at: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    store_dim: int = 1024,
    cache: Path | None = None,
    form: Form | None = None,
    device: str = "cpu",
    threads: int = 0,
    store: Store = rtn_store,
    store_name: str = "rtn",
) -> Scores:
    """Measure the error vector of every unit at every choice that the target allows.

    Args:
        workload: what the errors are measured on; equal runs give equal outputs.
        part: the name of the graph in the workload.
        model, units: a normalised graph, the same function as that part, and its units.
        ranges: of activations, by value name.
        target: where the choices are to run.
        only: (unit id, choice) pairs to measure; the others are NaN. None is all.
        at: choices of the other units meanwhile, by unit id. A vector is then the difference to the unit's own plain
            weights at that point, so that the vectors of `at` still add up to its error, near it. Worth its runs where
            errors no longer add up from the plain graph: at the quantized point gradients differ too (mlx-lm).
        progress: told what runs, and the share that is done.
        store_dim: length of one request's sketch.
        cache: a folder for results; None keeps none.
        form: see `trial_model`; None takes the faster one.
        device, threads: see `open_session`.
        store: how weight matrices are rounded.
        store_name: what the cache knows `store` by; another rounding needs another name.

    Raises:
        BadRequest: `only` or `at` names what is not there, or a range is missing; no request, or a broken one.
        SessionFailed: the engine refused a graph or a run.
    """
    wanted = _wanted(units, target, only)
    base = [(unit, choice) for unit, choice in (at or {}).items() if choice != PLAIN]
    _check_ranges(units, wanted, ranges, target)
    _check_ranges(units, _wanted(units, target, base), ranges, target)
    tell = progress or (lambda *_: None)
    tell("running the reference", 0.0)
    references = reference_of(workload)
    cached = _Cache(
        cache, _facts(references, workload, ranges, target, store_dim, at, store_name), model, ranges, target
    )
    results = {unit.id: cached.read(unit) for unit in units if unit.id in wanted}
    left = [
        (unit, choices)
        for unit in units
        if (choices := [name for name in wanted.get(unit.id, ()) if name not in results[unit.id]])
    ]
    if left:
        form = form or ("override" if at else "delta")
        with tempfile.TemporaryDirectory(prefix="scanning-") as folder:
            session = open_trial(
                *(model, units, ranges, target, Path(folder)), form=form, device=device, threads=threads, store=store
            )
            measure = _Measure(session, workload, part, references, store_dim, dict(at or {}))
            for unit, done in measure.each(left, tell):
                results[unit.id] |= done
                cached.write(unit, results[unit.id])
    tell("scanned", 1.0)
    return _scores(units, target, results, wanted, _lengths(workload, references, store_dim))


def _wanted(
    units: Sequence[Unit], target: Target, only: Collection[tuple[str, str]] | None
) -> dict[str, tuple[str, ...]]:
    """The choices to run, by unit, plain weights aside."""
    possible = {unit.id: tuple(name for name in target.allowed(unit) if name != PLAIN) for unit in units}
    if only is None:
        return possible
    known = {(unit, name) for unit, names in possible.items() for name in (*names, PLAIN)}
    if strange := sorted(set(only) - known):
        unit, name = strange[0]
        raise BadRequest(f"{unit!r} cannot be {name!r} on {target.name}: no such unit, or not a choice of its")
    asked = {unit: tuple(name for name in names if (unit, name) in only) for unit, names in possible.items()}
    return {unit: names for unit, names in asked.items() if names}


def _check_ranges(
    units: Sequence[Unit], wanted: Mapping[str, Sequence[str]], ranges: Mapping[str, Range], target: Target
) -> None:
    for unit in units:
        for choice in wanted.get(unit.id, ()):
            needed = ranges_of(unit, rounding_of(CHOICES[choice], target, unit.op), target)
            if missing := [name for name in needed if name not in ranges]:
                raise BadRequest(f"{unit.id} cannot be tried at {choice}: no range of {', '.join(missing)}; calibrate")


class _Measure:
    """Trials one after the other, as vectors."""

    def __init__(
        self,
        session: TrialSession,
        workload: Workload,
        part: str,
        references: Sequence[Array],
        store_dim: int,
        at: dict[str, str],
    ) -> None:
        self.session, self.at = session, at
        self.workload, self.part, self.references, self.store_dim = workload, part, references, store_dim

    def each(
        self, left: Sequence[tuple[Unit, Sequence[str]]], tell: Progress
    ) -> Iterator[tuple[Unit, dict[str, Vectors]]]:
        """The results of one unit after the other."""
        total = sum(len(choices) for _, choices in left)
        count = 0
        for unit, choices in left:
            plain = self._plain(unit)
            done: dict[str, Vectors] = {}
            for choice in choices:
                tell(f"trying {unit.id} at {choice}", count / total)
                vectors = self.vectors({**self.at, unit.id: choice})
                done[choice] = {name: vector - plain.get(name, np.float32(0)) for name, vector in vectors.items()}
                count += 1
            yield unit, done

    def vectors(self, overrides: Mapping[str, str]) -> Vectors:
        """Sketched error vectors; their squared length is the mean error over requests. NaN if an output is broken."""
        try:
            self.session.set(overrides)
        except BadRequest:  # all that was asked for was checked before: weights that this type cannot hold
            return self._constant(np.nan)
        if self.session.plain:  # such as fp16 of weights that were trained in it
            return self._constant(0)
        outputs = self.workload.run({self.part: self.session})
        scale = np.float32(1 / np.sqrt(len(self.references)))
        found = {}
        for metric in self.workload.metrics:
            parts = [
                sketch(metric.vector(reference, output), self.store_dim, SEED)
                if np.isfinite(output).all()
                else np.full(min(metric.dim(reference), self.store_dim), np.nan, np.float32)
                for reference, output in zip(self.references, outputs, strict=True)
            ]
            whole = np.concatenate(parts) * scale
            found[metric.name] = whole if np.isfinite(whole).all() else np.full_like(whole, np.nan)
        return found

    def _constant(self, number: float) -> Vectors:
        lengths = _lengths(self.workload, self.references, self.store_dim)
        return {name: np.full(length, number, np.float32) for name, length in lengths.items()}

    def _plain(self, unit: Unit) -> Vectors:
        """The error where this unit alone is plain; none, if the others are."""
        others = {name: choice for name, choice in self.at.items() if name != unit.id and choice != PLAIN}
        return self.vectors(others) if others else {}


class _Cache:
    """One file per unit: the vectors of the choices that were run, under a hash of everything they follow from."""

    def __init__(
        self,
        folder: Path | None,
        facts: Mapping[str, Any],
        model: ir.Model,
        ranges: Mapping[str, Range],
        target: Target,
    ) -> None:
        self.folder, self.facts, self.model, self.ranges, self.target = folder, facts, model, ranges, target

    def read(self, unit: Unit) -> dict[str, Vectors]:
        """What is there; a file that is damaged holds nothing."""
        if self.folder is None:
            return {}
        found: dict[str, Vectors] = {}
        try:
            with self._path(unit).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                for name in file.files:
                    choice, _, metric = name.partition("|")
                    found.setdefault(choice, {})[metric] = file[name].astype(np.float32, casting="same_kind")
        except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile):
            return {}
        return {choice: vectors for choice, vectors in found.items() if set(vectors) == set(self.facts["metrics"])}

    def write(self, unit: Unit, results: Mapping[str, Vectors]) -> None:
        """Put a unit's results in its file, whole or not at all."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(unit)
        arrays = {f"{choice}|{metric}": array for choice, of in results.items() for metric, array in of.items()}
        draft = path.with_suffix(f".{os.getpid()}")
        with draft.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(draft, path)

    def _path(self, unit: Unit) -> Path:
        assert self.folder is not None
        needs = {
            name
            for choice in self.target.allowed(unit)
            for name in ranges_of(unit, rounding_of(CHOICES[choice], self.target, unit.op), self.target)
        }
        facts = {
            **self.facts,
            "unit": asdict(unit),
            "ranges": {name: list(self.ranges[name]) for name in sorted(needs) if name in self.ranges},
            "weights": _digest([initializer(self.model, unit.weight).numpy()]),
        }
        return self.folder / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]}.npz"


def _facts(
    references: Sequence[Array],
    workload: Workload,
    ranges: Mapping[str, Range],
    target: Target,
    store_dim: int,
    at: Mapping[str, str] | None,
    store_name: str,
) -> dict[str, Any]:
    """What all units' results follow from. The reference outputs stand for the bundle, the prompts and the seeds."""
    changed = {unit: choice for unit, choice in (at or {}).items() if choice != PLAIN}
    return {
        "format": CACHE_FORMAT,
        "references": _digest(references),
        "metrics": [metric.name for metric in workload.metrics],
        "target": [target.name, target.engine, target.code_bits, target.symmetric],
        "store": store_name,
        "sketch": [store_dim, SEED],
        "at": changed,
        "ranges at": sorted(ranges.items()) if changed else [],
    }


def _digest(arrays: Sequence[Array]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _lengths(workload: Workload, references: Sequence[Array], store_dim: int) -> dict[str, int]:
    return {
        metric.name: sum(min(metric.dim(reference), store_dim) for reference in references)
        for metric in workload.metrics
    }


def _scores(
    units: Sequence[Unit],
    target: Target,
    results: Mapping[str, Mapping[str, Vectors]],
    wanted: Mapping[str, Sequence[str]],
    lengths: Mapping[str, int],
) -> Scores:
    allowed = [set(target.allowed(unit)) for unit in units]
    choices = tuple(name for name in CHOICES if any(name in each for each in allowed))
    tables = {
        metric: np.full((len(units), len(choices), length), np.nan, np.float32) for metric, length in lengths.items()
    }
    for metric, table in tables.items():
        for row, unit in enumerate(units):
            if PLAIN in allowed[row]:
                table[row, choices.index(PLAIN)] = 0
            for choice in wanted.get(unit.id, ()):
                table[row, choices.index(choice)] = results[unit.id][choice][metric]
    return Scores(tuple(unit.id for unit in units), choices, tables, "scan")
