"""How wrong an output is: one error vector per request and metric, and the measures that are only reported.

A planner needs errors that add up. So a metric here is a linear map of the output error (linearised at the reference
where it is not linear by itself), scaled so that the squared length of its vector is the error of that request:

    error(request) = |A (output - reference)|^2,      A depends on the reference alone.

Vectors of several changed units add to first order, and so predict a mix; A's adjoint turns the same metric into a
gradient probe. Pictures are split in two, because what a viewer calls another picture is not what he calls a worse one:
`content` is the low band, on a grid of 8 x 8, `quality` all the rest. Language has `kl`, everything else `nsr`.

All arithmetic is float64: the error of a good choice is 1e-7 of the whole, which float32 does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

GRID = 8  # cells of the low band along height and width
SMALLEST_SIDE = 16  # of a picture; below it there is no high band to speak of
_FLOOR = 1e-9  # of the whole energy: a flat picture has no band to measure its high band against


class Metric(Protocol):
    """One way of measuring an error; all methods are of one request."""

    @property
    def name(self) -> str:
        """As plans and reports write it."""

    def vector(self, reference: Array, output: Array) -> F64:
        """The error vector (dim,): its squared length is the error, and it is linear in `output`."""

    def pull(self, reference: Array, v: F64) -> F64:
        """The adjoint of `vector`: (dim,) -> an array like the reference, with <vector(e), v> = <e, pull(v)>."""

    def dim(self, reference: Array) -> int:
        """Length of the error vector."""


@dataclass(frozen=True, slots=True)
class NoiseToSignal:
    """|error|^2 / |reference|^2."""

    name: str = "nsr"

    def vector(self, reference: Array, output: Array) -> F64:
        """See Metric."""
        return _difference(reference, output).ravel() / _length(_energy(reference), _energy(reference))

    def pull(self, reference: Array, v: F64) -> F64:
        """See Metric."""
        return v.reshape(reference.shape) / _length(_energy(reference), _energy(reference))

    def dim(self, reference: Array) -> int:
        """See Metric."""
        return reference.size


@dataclass(frozen=True, slots=True)
class Content:
    """The low band's error over the reference's low band.

    The low band is the orthogonal projection on pictures that are constant in every cell of a GRID x GRID grid over the
    last two axes. The vector holds its coordinates, cell sum / sqrt(cell area), of the same length as the projection.
    """

    name: str = "content"

    def vector(self, reference: Array, output: Array) -> F64:
        """See Metric."""
        return _cells(_difference(reference, output)).ravel() / self._scale(reference)

    def pull(self, reference: Array, v: F64) -> F64:
        """See Metric."""
        cells = v.reshape(*reference.shape[:-2], *_grid(reference.shape))
        return _spread(cells, reference.shape) / self._scale(reference)

    def dim(self, reference: Array) -> int:
        """See Metric."""
        return math.prod((*reference.shape[:-2], *_grid(reference.shape)))

    def _scale(self, reference: Array) -> float:
        return _length(_energy(_cells(_wide(reference))), _energy(reference))


@dataclass(frozen=True, slots=True)
class Quality:
    """The error that the low band does not see, over the reference's own high band."""

    name: str = "quality"

    def vector(self, reference: Array, output: Array) -> F64:
        """See Metric."""
        return _high(_difference(reference, output)).ravel() / self._scale(reference)

    def pull(self, reference: Array, v: F64) -> F64:
        """See Metric."""
        return _high(v.reshape(reference.shape)) / self._scale(reference)

    def dim(self, reference: Array) -> int:
        """See Metric."""
        return reference.size

    def _scale(self, reference: Array) -> float:
        return _length(_energy(_high(_wide(reference))), _energy(reference))


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || output) of logits (..., vocabulary), to second order, as a mean over tokens.

    With p = softmax(reference) and dz the change of logits, KL = 1/2 Var_p(dz) + O(dz^3): the Fisher information of a
    categorical distribution (Amari 1998).
    """

    name: str = "kl"

    def vector(self, reference: Array, output: Array) -> F64:
        """See Metric."""
        p = _softmax(_wide(reference))
        change = _difference(reference, output)
        change -= (p * change).sum(-1, keepdims=True)
        vector: F64 = (np.sqrt(p / 2) * change).ravel() / math.sqrt(_tokens(reference))
        return vector

    def pull(self, reference: Array, v: F64) -> F64:
        """See Metric."""
        p = _softmax(_wide(reference))
        weighed = np.sqrt(p / 2) * v.reshape(reference.shape)
        pulled: F64 = (weighed - p * weighed.sum(-1, keepdims=True)) / math.sqrt(_tokens(reference))
        return pulled

    def dim(self, reference: Array) -> int:
        """See Metric."""
        return reference.size


NSR, CONTENT, QUALITY, KL = NoiseToSignal(), Content(), Quality(), Divergence()
PICTURE_METRICS: tuple[Metric, ...] = (CONTENT, QUALITY)
LANGUAGE_METRICS: tuple[Metric, ...] = (KL,)
OTHER_METRICS: tuple[Metric, ...] = (NSR,)


def metrics_for(references: Sequence[Array], *, logits: bool = False) -> tuple[Metric, ...]:
    """The metrics that fit these reference outputs, each of one request and with a batch axis.

    Pictures and videos have channels as well, so four axes at least: an embedded text (batch, tokens, width) is none.
    `logits` have no shape that tells them from other arrays.
    """
    if logits:
        return LANGUAGE_METRICS
    pictures = references and all(each.ndim >= 4 and min(each.shape[-2:]) >= SMALLEST_SIDE for each in references)
    return PICTURE_METRICS if pictures else OTHER_METRICS


def metric_called(name: str) -> Metric:
    """The metric of a name. Raises BadRequest: there is none."""
    known = {metric.name: metric for metric in (*PICTURE_METRICS, *LANGUAGE_METRICS, *OTHER_METRICS)}
    if name not in known:
        raise BadRequest(f"no metric {name!r}; known: {', '.join(known)}")
    return known[name]


def errors(metrics: Sequence[Metric], references: Sequence[Array], outputs: Sequence[Array]) -> dict[str, float]:
    """Every metric's value: the mean of its error over the requests.

    Raises:
        BadRequest: another number of outputs than of references, or none, or another shape.
    """
    if len(references) != len(outputs) or not references:
        raise BadRequest(f"{len(outputs)} outputs to be measured against {len(references)} references")
    return {
        metric.name: float(np.mean([_energy(metric.vector(*pair)) for pair in zip(references, outputs, strict=True)]))
        for metric in metrics
    }


def ssim(reference: Array, output: Array, data_range: float, window: int | None = 7) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13) with a uniform window, as a mean; 1 is the same picture.

    Args:
        reference, output: pictures (..., height, width).
        data_range: the largest value less the smallest that a picture may have.
        window: side of the window; None is one window, the whole picture.
    """
    a, b = _wide(reference), _wide(output)
    middle = a.mean()  # variances are differences of squares: near zero they lose fewer digits
    a, b = a - middle, b - middle
    mean_a, mean_b = _windowed(a, window), _windowed(b, window)
    var_a = _windowed(a * a, window) - mean_a**2
    var_b = _windowed(b * b, window) - mean_b**2
    both = _windowed(a * b, window) - mean_a * mean_b
    mean_a, mean_b = mean_a + middle, mean_b + middle
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float(np.mean(light * (2 * both + c2) / (var_a + var_b + c2)))


def psnr_db(reference: Array, output: Array, data_range: float) -> float:
    """Peak signal-to-noise ratio in decibels; infinite for the same picture."""
    mean = float(np.mean(_difference(reference, output) ** 2))
    return math.inf if mean == 0 else 10 * math.log10(data_range**2 / mean)


def kl_tokens(reference: Array, output: Array) -> F64:
    """KL(reference || output) in nats at every token: logits (..., vocabulary) -> (tokens,)."""
    p, q = _log_softmax(_wide(reference)), _log_softmax(_wide(output))
    divergence: F64 = (np.exp(p) * (p - q)).sum(-1).ravel()
    return divergence


def kl_mean(reference: Array, output: Array) -> float:
    """Mean KL divergence per token, in nats."""
    return float(kl_tokens(reference, output).mean())


def kl_q99(reference: Array, output: Array) -> float:
    """The KL divergence that one token in a hundred exceeds, in nats."""
    return float(np.quantile(kl_tokens(reference, output), 0.99))


def top1_agreement(reference: Array, output: Array) -> float:
    """Share of tokens whose most likely successor is the same."""
    return float((reference.argmax(-1) == output.argmax(-1)).mean())


def perplexity(logits: Array, targets: Array) -> float:
    """exp of the mean negative log-likelihood: logits (..., vocabulary), targets (...) int."""
    scores = _log_softmax(_wide(logits))
    return float(np.exp(-np.take_along_axis(scores, np.asarray(targets)[..., None], -1).mean()))


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two lists, ties sharing their mean rank; NaN where one of them is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    length = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / length if length else math.nan


def _ranks(values: Array) -> F64:
    _, place, counts = np.unique(np.asarray(values).ravel(), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: F64 = (last - (counts - 1) / 2)[place]
    return ranks


def _wide(array: Array) -> F64:
    return np.asarray(array, dtype=np.float64)


def _difference(reference: Array, output: Array) -> F64:
    if reference.shape != output.shape:
        raise BadRequest(f"an output of shape {output.shape} cannot be compared with a reference of {reference.shape}")
    return _wide(output) - _wide(reference)


def _energy(array: Array) -> float:
    flat = _wide(array).ravel()
    return float(flat @ flat)


def _length(energy: float, whole: float) -> float:
    """What an error is divided by: never zero."""
    return math.sqrt(max(energy, _FLOOR * whole)) or 1.0


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    return min(GRID, shape[-2]), min(GRID, shape[-1])


def _edges(size: int) -> npt.NDArray[np.int64]:
    """Where the cells start along an axis, and its end; sides that 8 does not divide get cells of two sizes."""
    cells = min(GRID, size)
    return np.arange(cells + 1) * size // cells


def _areas(shape: tuple[int, ...]) -> F64:
    return np.outer(np.diff(_edges(shape[-2])), np.diff(_edges(shape[-1]))).astype(np.float64)


def _cells(array: F64) -> F64:
    """(..., H, W) -> (..., 8, 8): orthonormal coordinates of the low band."""
    rows = np.add.reduceat(array, _edges(array.shape[-2])[:-1], axis=-2)
    cells: F64 = np.add.reduceat(rows, _edges(array.shape[-1])[:-1], axis=-1) / np.sqrt(_areas(array.shape))
    return cells


def _spread(cells: F64, shape: tuple[int, ...]) -> F64:
    """The adjoint of `_cells`: coordinates back to a picture."""
    flat = cells / np.sqrt(_areas(shape))
    return np.repeat(np.repeat(flat, np.diff(_edges(shape[-2])), -2), np.diff(_edges(shape[-1])), -1)


def _high(array: F64) -> F64:
    return array - _spread(_cells(array), array.shape)


def _tokens(logits: Array) -> int:
    return math.prod(logits.shape[:-1])


def _log_softmax(logits: F64) -> F64:
    shifted = logits - logits.max(-1, keepdims=True)
    scores: F64 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return scores


def _softmax(logits: F64) -> F64:
    return np.exp(_log_softmax(logits))


def _windowed(array: F64, window: int | None) -> F64:
    """Means over every window that lies within the picture."""
    if window is None:
        whole: F64 = array.mean((-2, -1))
        return whole
    for axis in (-2, -1):
        count = array.shape[axis] - window + 1
        if count < 1:
            raise BadRequest(f"a window of {window} does not fit in a picture of {array.shape[-2:]}")
        array = np.asarray(sum(np.take(array, range(at, at + count), axis) for at in range(window)))
    return array / window**2
