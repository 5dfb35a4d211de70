"""Scores: what each choice of each unit does to the outputs, as one sketched error vector per metric.

Vectors are kept, not lengths alone, because errors of several units partly cancel or add: the metric of a mix is
|sum of its units' vectors|^2 to first order in each. A count sketch (Charikar, Chen, Farach-Colton 2002) makes them
short: every coordinate goes, with a random sign, to one of `dim` buckets. It is linear, and keeps lengths and inner
products in expectation; a squared length is off by about sqrt(2 / dim).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.quant.choices import CHOICES
from edgekit.quant.metrics import spearman

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Method = Literal["scan", "probe", "probe+scan"]

SCORES_FORMAT = 1
FEWEST = 3  # entries that a rank correlation can say anything about
_VECTORS = "vectors:"  # prefix of a metric's entry in the file


@dataclass(frozen=True, eq=False)
class Scores:
    """Error vectors of every unit at every choice.

    Attributes:
        units: ids, in the graph's order.
        choices: names of CHOICES; the second axis of every array.
        vectors: by metric, float32 (U, C, D) with a D of the metric's own; NaN where a choice is not allowed, was not
            measured, or gave no finite output.
        method: `scan` ran every choice; `probe` estimated them from gradients; `probe+scan` is a merge of both.
    """

    units: tuple[str, ...]
    choices: tuple[str, ...]
    vectors: Mapping[str, F32]
    method: Method

    def __post_init__(self) -> None:
        for name, array in self.vectors.items():
            if array.ndim != 3 or array.shape[:2] != (len(self.units), len(self.choices)):
                raise BadRequest(
                    f"scores of {name} have shape {array.shape}; {len(self.units)} units and {len(self.choices)} "
                    "choices need (units, choices, length)"
                )
        strange = [name for name in self.choices if name not in CHOICES]
        if strange or self.method not in get_args(Method):
            raise BadRequest(f"scores of {', '.join(strange) or self.method}, which this edgekit does not know")
        if len(set(self.units)) < len(self.units) or len(set(self.choices)) < len(self.choices):
            raise BadRequest("scores name a unit or a choice twice")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.vectors)

    def errors(self, metric: str) -> F64:
        """The error of every unit alone at every choice: (U, C), NaN where there is none.

        Raises:
            BadRequest: no such metric.
        """
        if metric not in self.vectors:
            raise BadRequest(f"no scores for {metric!r}; there are some for {', '.join(self.vectors)}")
        return _squares(self.vectors[metric])

    def known(self) -> npt.NDArray[np.bool_]:
        """Which entries every metric has: (U, C)."""
        finite = [np.isfinite(array).all(-1) for array in self.vectors.values()]
        return np.asarray(np.all(finite, axis=0), dtype=np.bool_)

    def save(self, path: Path) -> None:
        """Write an .npz without pickles."""
        arrays: dict[str, Array] = {_VECTORS + name: array for name, array in self.vectors.items()}
        with path.open("wb") as file:
            np.savez(
                file,
                format=np.array(SCORES_FORMAT),
                units=np.array(self.units, dtype=np.str_),
                choices=np.array(self.choices, dtype=np.str_),
                method=np.array(self.method),
                **arrays,  # type: ignore[arg-type]
            )

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            BadRequest: not such a file.
        """
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                if int(file["format"]) != SCORES_FORMAT:
                    raise BadRequest(f"{path} has format {int(file['format'])}; this edgekit reads {SCORES_FORMAT}")
                vectors = {
                    name.removeprefix(_VECTORS): file[name].astype(np.float32, casting="same_kind")
                    for name in file.files
                    if name.startswith(_VECTORS)
                }
                units, choices = (tuple(str(each) for each in file[name]) for name in ("units", "choices"))
                return cls(units, choices, vectors, str(file["method"]))  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as why:
            raise BadRequest(f"{path} holds no scores ({why}); delete it and measure again") from why


def sketch(vector: Array, dim: int, seed: int) -> F32:
    """A count sketch (dim,) of a vector; one that is no longer than `dim` stays itself."""
    flat = np.asarray(vector, dtype=np.float64).ravel()
    if flat.size <= dim:
        return flat.astype(np.float32)
    buckets, signs = _hashes(flat.size, dim, seed)
    return np.bincount(buckets, weights=flat * signs, minlength=dim).astype(np.float32)


def merge(probe: Scores, scan: Scores) -> Scores:
    """What was measured, and where nothing was, what the probes estimate, on the scale of the measurements.

    Probes are scaled by the median ratio of measured to estimated error, per metric and choice (over all choices where
    a choice has no entry in both). The two kinds of vector do not share a space: they are put side by side, so that
    sums keep the cross terms within a kind and have none between kinds.

    Raises:
        BadRequest: the scan knows units or metrics that the probes do not, or the other way round.
    """
    if set(scan.units) - set(probe.units) or set(scan.vectors) != set(probe.vectors):
        raise BadRequest("scores of different graphs or metrics cannot be merged")
    choices = tuple(name for name in CHOICES if name in probe.choices or name in scan.choices)
    merged: dict[str, F32] = {}
    for name in probe.vectors:
        estimated = _placed(probe, name, probe.units, choices)
        measured = _placed(scan, name, probe.units, choices)
        has = np.isfinite(measured).all(-1)
        ratios = _ratios(_squares(measured), _squares(estimated))
        estimated *= np.sqrt(ratios).astype(np.float32)[None, :, None]
        both = np.concatenate([estimated, np.zeros_like(measured)], -1)
        both[has] = np.concatenate([np.zeros_like(estimated), measured], -1)[has]
        merged[name] = both
    return Scores(probe.units, choices, merged, "probe+scan")


def rank_correlation(a: Scores, b: Scores, metric: str) -> float:
    """Spearman's correlation of two tables of errors, over the entries that both have and that are not zero.

    Raises:
        BadRequest: fewer than three such entries.
    """
    units = tuple(unit for unit in a.units if unit in set(b.units))
    choices = tuple(name for name in a.choices if name in b.choices)
    x, y = (_squares(_placed(each, metric, units, choices)) for each in (a, b))
    both = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    if both.sum() < FEWEST:
        raise BadRequest(f"{int(both.sum())} entries of {metric} in both scores; a rank correlation needs {FEWEST}")
    return spearman(x[both], y[both])


@lru_cache(maxsize=16)
def _hashes(size: int, dim: int, seed: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    rng = np.random.default_rng((seed, size, dim))
    return rng.integers(0, dim, size, dtype=np.int32), rng.integers(0, 2, size, dtype=np.int8) * np.int8(2) - np.int8(1)


def _placed(scores: Scores, metric: str, units: tuple[str, ...], choices: tuple[str, ...]) -> F32:
    """A metric's vectors in another order of units and choices; NaN for what there is not."""
    if metric not in scores.vectors:
        raise BadRequest(f"no scores for {metric!r}; there are some for {', '.join(scores.vectors)}")
    array = scores.vectors[metric]
    placed = np.full((len(units), len(choices), array.shape[-1]), np.nan, np.float32)
    rows = [(at, scores.units.index(unit)) for at, unit in enumerate(units) if unit in scores.units]
    for at, name in enumerate(choices):
        if name in scores.choices and rows:
            here, there = map(list, zip(*rows, strict=True))
            placed[here, at] = array[there, scores.choices.index(name)]
    return placed


def _squares(vectors: F32) -> F64:
    """Squared lengths, in float64, one unit at a time: (U, C, D) -> (U, C)."""
    total = np.empty(vectors.shape[:2])
    for row, wide in zip(total, (unit.astype(np.float64) for unit in vectors), strict=True):
        row[...] = np.einsum("cd,cd->c", wide, wide)
    return total


def _ratios(measured: F64, estimated: F64) -> F64:
    """Median of measured / estimated per choice: (U, C), (U, C) -> (C,)."""
    ratio = np.full(measured.shape, np.nan)
    np.divide(measured, estimated, out=ratio, where=np.isfinite(measured) & (measured > 0) & (estimated > 0))
    known = np.isfinite(ratio)
    overall = float(np.median(ratio[known])) if known.any() else 1.0
    return np.array(
        [np.median(column[has]) if has.any() else overall for column, has in zip(ratio.T, known.T, strict=True)]
    )
