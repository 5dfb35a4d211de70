"""Samplers in sigma space (Karras et al. 2022): x = x_0 + sigma eps, the network is shown c_in x."""

from __future__ import annotations

import math

import numpy as np

from edgekit.bundle.recipe import Sampler
from edgekit.runtime.diffusion.grids import F64, counts_sigmas, never_zero
from edgekit.runtime.diffusion.samplers.rows import Path, Row, estimate, insist
from edgekit.runtime.diffusion.samplers.vp import schedule_of


def euler(sampler: Sampler, points: F64) -> Path:
    """Euler steps in sigma space (Karras et al. 2022): x' = y + sigma'/sigma (x - y)."""
    sigmas, rows = _sigma_space(sampler, points)
    steps = [
        row._replace(kx=after / now, ky=1 - after / now)
        for row, now, after in zip(rows, sigmas, sigmas[1:], strict=False)
    ]
    return Path(steps, [(1.0, sigma) for sigma in sigmas[:-1]], _start(sampler, sigmas))


def euler_ancestral(sampler: Sampler, points: F64) -> Path:
    """Euler down to sigma_down, then up again by fresh noise sigma_up, so that the two add to the next sigma."""
    sigmas, rows = _sigma_space(sampler, points)
    steps = []
    for row, now, after in zip(rows, sigmas, sigmas[1:], strict=False):
        up = math.sqrt(after**2 * (now**2 - after**2) / now**2)
        down = math.sqrt(after**2 - up**2)
        steps.append(row._replace(kx=down / now, ky=1 - down / now, kz=up))
    return Path(steps, [(1.0, sigma) for sigma in sigmas[:-1]], _start(sampler, sigmas))


def _sigma_space(sampler: Sampler, points: F64) -> tuple[list[float], list[Row]]:
    """Sigmas down to 0 and, per point, a row that only scales its input and estimates x_0.

    Points are timesteps, whose sigmas the training schedule gives, or sigmas (SVD), whose time is ln(sigma) / 4.
    """
    if counts_sigmas(sampler, len(points)):
        insist(sampler.kind, sampler.prediction, "v_prediction")
        levels = points.astype(np.float32).astype(np.float64)
        times = (np.float32(0.25) * np.log(levels).astype(np.float32)).astype(np.float64)
    else:
        abar = never_zero(schedule_of(sampler))
        times = points.astype(np.float32).astype(np.float64)
        levels = np.interp(times, np.arange(len(abar)), np.sqrt((1 - abar) / abar))
    sigmas = levels.astype(np.float32).astype(float).tolist()
    rows = []
    for t, sigma in zip(times.tolist(), sigmas, strict=True):
        c_in = 1 / math.sqrt(sigma**2 + 1)
        to = estimate(sampler.prediction, c_in, sigma * c_in)  # of the scaled input c_in x = a x_0 + s eps
        rows.append(Row(t, c_in=c_in, px=to.px * c_in, pm=to.pm))
    return [*sigmas, 0.0], rows


def _start(sampler: Sampler, sigmas: list[float]) -> float:
    """A grid that starts at the last training step starts as pure noise; others start below it and add a unit.

    SVD's sigmas are such a grid too: its scheduler says `leading`.
    """
    leading = sampler.grid is not None and sampler.grid.spacing == "leading"
    adds = leading or counts_sigmas(sampler, len(sigmas) - 1)
    return math.sqrt(sigmas[0] ** 2 + 1) if adds else sigmas[0]


def edm_consistency(sampler: Sampler, points: F64) -> Path:
    """Consistency in EDM form (Song et al. 2023, appendix C): f = c_skip x + c_out F, then renoised to the next sigma.

    c_skip = d^2 / ((sigma - e)^2 + d^2), c_out = (sigma - e) d / sqrt(sigma^2 + d^2) with d = `sigma_data` and
    e = `sigma_min`, the level at which f is x; time is ln(sigma) / 4. e = 0 makes f EDM's own denoiser. `epsilon` is
    EDM's F; a network of `v_prediction` gives -F (AnimateLCM-SVD), and starts a unit of variance above sigma.
    """
    insist(sampler.kind, sampler.prediction, "epsilon", "v_prediction")
    is_v = sampler.prediction == "v_prediction"
    data, least = sampler.sigma_data, sampler.sigma_min
    sigmas = points.astype(np.float32).astype(float).tolist()
    rows = []
    for point, now, after in zip(points.tolist(), sigmas, [*sigmas[1:], 0.0], strict=True):
        c_skip = data**2 / ((now - least) ** 2 + data**2)
        c_out = (now - least) * data / math.sqrt(now**2 + data**2)
        rows.append(
            Row(
                0.25 * math.log(point),
                c_in=1 / math.sqrt(now**2 + data**2),
                px=c_skip,
                pm=-c_out if is_v else c_out,
                kz=math.sqrt(max(after, least) ** 2 - least**2),
            )
        )
    scale = math.sqrt(sigmas[0] ** 2 + 1) if is_v else sigmas[0]
    return Path(rows, [(1.0, sigma) for sigma in sigmas], scale)


def trig_consistency(sampler: Sampler, angles: F64) -> Path:
    """TrigFlow consistency (Lu & Song 2025): x = cos(t) x_0 + sin(t) d z with d = `sigma_data`.

    x_0 = cos(t) x - sin(t) m, then renoised to the next angle. The network is shown x as it is; where it was trained
    on x / d and answers F, both factors belong to its graph.
    """
    data, now = sampler.sigma_data, angles.tolist()
    rows = [
        Row(t, px=math.cos(t), pm=-math.sin(t), ky=math.cos(after), kz=math.sin(after) * data)
        for t, after in zip(now, [*now[1:], 0.0], strict=True)
    ]
    return Path(rows, [(math.cos(t), math.sin(t) * data) for t in now], data)
