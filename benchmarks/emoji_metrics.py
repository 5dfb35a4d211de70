"""Figures of drawn pictures against the pictures they should be: which is nearest, how far, and how far as a whole.

Pictures are float32 in [-1, 1], (B, 3, side, side). Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]


class Gallery:
    """Pictures to be found again."""

    def __init__(self, pictures: F32) -> None:
        self.pictures = pictures
        self._flat = pictures.reshape(len(pictures), -1)
        self._norms = np.einsum("nd,nd->n", self._flat, self._flat, dtype=np.float64)

    def nearest(self, made: F32) -> Rows:
        """For every picture the row of the one that differs least from it, by squared error; the first of equals."""
        return np.argmin(self._norms - 2 * (made.reshape(len(made), -1) @ self._flat.T), axis=1)


def recall(nearest: Sequence[int] | Rows, asked: Sequence[int] | Rows) -> float:
    """R@1: the share of pictures whose nearest is the one asked for."""
    return float(np.mean(np.asarray(nearest) == np.asarray(asked)))


def squared_error(made: F32, wanted: F32) -> F64:
    """(B,): mean over pixels and channels; `wanted` may be one picture for all."""
    return np.square(made.astype(np.float64) - wanted).mean(axis=(1, 2, 3))


def psnr(error: float) -> float:
    """Decibels of a mean squared error of pictures that span two units."""
    return 10 * math.log10(4 / error) if error > 0 else math.inf


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The normal distribution of a set of features: mean (D,) and covariance (D, D)."""

    mean: F64
    covariance: F64

    @classmethod
    def of(cls, features: F32 | F64) -> Gaussian:
        """Fitted to (N, D), N at least 2; the covariance is the unbiased one."""
        rows = features.astype(np.float64)
        return cls(rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False)))


def frechet(one: Gaussian, other: Gaussian) -> float:
    """Squared Frechet distance |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), Dowson and Landau 1982; Heusel et al. 2017."""
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root).clip(min=0)).sum()
    moved = one.mean - other.mean
    return float(moved @ moved + np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared)


def by_prompt(values: npt.NDArray[np.generic]) -> dict[str, float]:
    """Mean of (prompts, samples) and its standard error, prompts being what was drawn at random, samples not."""
    means = values.astype(np.float64).mean(1)
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return {"mean": round(float(means.mean()), 5), "stderr": round(float(error), 5), "prompts": len(means)}
