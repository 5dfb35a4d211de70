"""Samplers of flows: x = (1 - sigma) x_0 + sigma eps, and v = eps - x_0 is `sign` times what the network predicts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edgekit.bundle.recipe import Sampler
from edgekit.runtime.diffusion.grids import F64, TRAIN_STEPS
from edgekit.runtime.diffusion.samplers.rows import Level, Path, Row, insist


class Leg(NamedTuple):
    """From one sigma to the next; `row` estimates x_0 = x - sigma v at the first."""

    now: float
    after: float
    row: Row


def legs(sampler: Sampler, sigmas: F64) -> tuple[list[Leg], list[Level]]:
    """The legs of a straight path down to 0, and the noise level at the start of each. Raises BadManifest."""
    insist(sampler.kind, sampler.prediction, "flow")
    now = sigmas.tolist()
    rows = [_at(sampler, sigma) for sigma in now]
    return list(map(Leg, now, [*now[1:], 0.0], rows)), [(1 - sigma, sigma) for sigma in now]


def _at(sampler: Sampler, sigma: float) -> Row:
    """Time and clean estimate at a sigma; times are float32 products, as in diffusers."""
    t = np.float32(sigma) * np.float32(TRAIN_STEPS)
    return Row(float(t), px=1.0, pm=-sampler.sign * sigma, ky=0.0)


def flow_euler(sampler: Sampler, sigmas: F64) -> Path:
    """Euler steps along a rectified flow (Liu et al. 2023): x' = x + (sigma' - sigma) v."""
    path, levels = legs(sampler, sigmas)
    return Path([row._replace(kx=1.0, km=sampler.sign * (after - now)) for now, after, row in path], levels)


def flow_map(sampler: Sampler, sigmas: F64) -> Path:
    """Steps of a flow map (MeanFlow, Geng et al. 2025; AnyFlow): the network gives the mean of v between t and r, so
    one Euler step is exact however long it is. r, the next row's time, is the source @r. Times are float64 products.
    """
    path = flow_euler(sampler, sigmas)
    times = (sigmas * TRAIN_STEPS).tolist()
    return path._replace(rows=[row._replace(t=t) for row, t in zip(path.rows, times, strict=True)])


def flow_stochastic(sampler: Sampler, sigmas: F64) -> Path:
    """Consistency steps on a flow: the clean estimate, renoised to the next sigma: x' = (1 - sigma') y + sigma' z."""
    path, levels = legs(sampler, sigmas)
    return Path([row._replace(ky=1 - after, kz=after) for _, after, row in path], levels)


def flow_heun(sampler: Sampler, sigmas: F64) -> Path:
    """Heun's method: an Euler step, then the same step again with the mean of v at both its ends.

    The second row steps from x_prev by h (v_prev + v) / 2, with v_prev = (x_prev - y_prev) / sigma_prev. The last leg
    is a plain Euler step: at sigma 0 there is nothing to ask.
    """
    path, _ = legs(sampler, sigmas)
    rows, levels = [], []
    for now, after, row in path:
        h = after - now
        rows.append(row._replace(kx=1.0, km=sampler.sign * h))
        levels.append((1 - now, now))
        if after > 0:
            half = h / (2 * now)
            rows.append(_at(sampler, after)._replace(km=sampler.sign * h / 2, kp=1 + half, kq=-half))
            levels.append((1 - after, after))
    return Path(rows, levels, rows_per_point=2)


def flow_midpoint(sampler: Sampler, sigmas: F64) -> Path:
    """The midpoint method: half a step, then the whole step from x_prev with v of half way."""
    path, _ = legs(sampler, sigmas)
    rows, levels = [], []
    for now, after, row in path:
        middle = (now + after) / 2
        rows.append(row._replace(kx=1.0, km=sampler.sign * (middle - now)))
        rows.append(_at(sampler, middle)._replace(km=sampler.sign * (after - now), kp=1.0))
        levels += [(1 - now, now), (1 - middle, middle)]
    return Path(rows, levels, rows_per_point=2)
