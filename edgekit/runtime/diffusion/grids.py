"""Noise schedules and the points a few-step sampler visits on them.

Constants equal the ones torch computes in float32 to one unit in the last place, so the sums here keep its order of
rounding: a linspace counts from both ends, running products are accumulated in float64 and rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.bundle.recipe import NoiseSchedule, Sampler
from edgekit.errors import BadManifest, IllegalSteps

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

TRAIN_STEPS = 1000  # flow models count time in thousandths


@dataclass(frozen=True)
class Points:
    """The whole grid, noisiest first (timesteps, or sigmas of a flow), and the first point a sample visits."""

    values: F64
    first: int = 0


def linspace32(start: float, stop: float, n: int) -> F32:
    """`torch.linspace` in float32: the lower half counts up from `start`, the upper half down from `stop`."""
    a, b = np.float32(start), np.float32(stop)
    step, i = float((b - a) / np.float32(n - 1)), np.arange(n)
    points = np.where(i < n // 2, float(a) + step * i, float(b) - step * (n - 1 - i))
    return points.astype(np.float32)  # rounded once: a fused multiply-add


def betas(schedule: NoiseSchedule) -> F32:
    """Forward-process variances (n,), before any rescaling to zero terminal SNR."""
    if schedule.kind == "linear":
        return linspace32(schedule.beta_start, schedule.beta_end, schedule.n)
    if schedule.kind == "scaled_linear":
        return np.square(linspace32(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.n))

    def alpha_bar(u: float) -> float:  # Nichol & Dhariwal 2021, eq. 17
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    n = schedule.n
    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)], np.float32)


def alphas_cumprod(schedule: NoiseSchedule) -> F64:
    """Signal power abar_t (n,): float32 numbers, widened to float64 for what follows. Raises BadManifest."""
    beta = betas(schedule)
    if not (beta.min() > 0 and beta.max() < 1):
        raise BadManifest(f"noise schedule {schedule}: every beta must lie between 0 and 1")
    beta = _zero_terminal_snr(beta) if schedule.zero_snr else beta
    return _running_product(np.float32(1) - beta).astype(np.float64)


def _running_product(values: F32) -> F32:
    product: F32 = np.cumprod(values.astype(np.float64)).astype(np.float32)
    return product


def _zero_terminal_snr(beta: F32) -> F32:
    """Lin et al. 2024, algorithm 1: shift and scale sqrt(abar) so that the last one is zero, the first unchanged."""
    root = np.sqrt(_running_product(np.float32(1) - beta))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    power = np.square(root)
    rescaled: F32 = np.float32(1) - np.concatenate([power[:1], power[1:] / power[:-1]])
    return rescaled


def vp_points(sampler: Sampler, steps: int, strength: float = 1.0) -> Points:
    """Timesteps of a variance-preserving sampler, and where image-to-image of `strength` enters them.

    The tail is diffusers' `get_timesteps`: the last int(steps * strength) points. LCM on its own grid has another rule:
    the distillation grid itself is cut at `strength`, and all `steps` points are taken from what is left.

    Raises:
        BadManifest: the sampler has no grid for this count. IllegalSteps: `strength` leaves nothing to do.
    """
    on_lcm_grid = sampler.grid is not None and sampler.grid.spacing == "lcm"
    explicit = sampler.timesteps is not None and len(sampler.timesteps) == steps
    if sampler.kind == "lcm" and on_lcm_grid and not explicit:
        return Points(_falling(sampler, _grid(sampler, steps, strength)))
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise IllegalSteps(f"strength {strength} of {steps} steps leaves none; use at least {1 / steps:.3g}")
    return Points(_falling(sampler, _grid(sampler, steps)), steps - kept)


def _falling(sampler: Sampler, timesteps: F64) -> F64:
    """The timesteps, if each lies on the training grid and below the one before."""
    n = sampler.noise_schedule.n if sampler.noise_schedule else TRAIN_STEPS
    if not (np.diff(timesteps) < 0).all() or not timesteps.min() >= 0 or not timesteps.max() <= n - 1:
        raise BadManifest(f"timesteps {timesteps.tolist()} must fall, from at most {n - 1} to at least 0")
    return timesteps


def _grid(sampler: Sampler, steps: int, strength: float = 1.0) -> F64:
    if sampler.timesteps is not None and len(sampler.timesteps) == steps:
        return np.asarray(sampler.timesteps, np.float64)
    n = sampler.noise_schedule.n if sampler.noise_schedule else TRAIN_STEPS
    grid = sampler.grid
    if grid is None:
        raise BadManifest(f"sampler {sampler.kind!r} has no grid for {steps} steps; give `grid` or `timesteps`")
    if steps > n:
        raise BadManifest(f"{steps} steps on a training grid of {n}; a step count cannot exceed it")
    if grid.spacing == "lcm":
        return _lcm_grid(n, grid.original, steps, strength)
    if grid.spacing == "trailing":  # rounding of the stride may give one point too many
        return np.asarray(np.arange(n, 0, -n / steps)[:steps].round() - 1, np.float64)
    if grid.spacing == "leading":
        return np.asarray((np.arange(steps) * (n // steps))[::-1] + grid.offset, np.float64)
    if grid.spacing == "linspace":
        return np.asarray(np.linspace(0, n - 1, steps)[::-1], np.float64)
    raise BadManifest(f"grid {grid.spacing!r} counts sigmas; sampler {sampler.kind!r} needs timesteps")


def _lcm_grid(n: int, original: int, steps: int, strength: float) -> F64:
    """`steps` points, evenly by index, of the distillation grid below `strength`."""
    length = int(original * strength)
    if original < steps:
        raise BadManifest(f"{steps} steps from a distillation grid of {original}; a step count cannot exceed it")
    if length < steps:
        raise IllegalSteps(
            f"strength {strength} leaves {length} of {original} distillation steps, fewer than the {steps} asked; "
            f"use a strength of at least {steps / original:.3g} or fewer steps"
        )
    distilled = np.arange(length, 0, -1) * (n // original) - 1
    chosen = np.floor(np.linspace(0, length, num=steps, endpoint=False)).astype(int)
    return np.asarray(distilled[chosen], np.float64)


def flow_points(sampler: Sampler, steps: int, strength: float = 1.0) -> Points:
    """Sigmas of a flow sampler (without the final 0), and where image-to-image of `strength` enters them.

    `flow` is diffusers' FlowMatchEuler grid, which shifts twice: the ends are those of the shifted training grid, and
    the points between them are shifted again. `uniform` is 1 - i/steps. The tail is that of the SD3 pipelines, which
    round the points skipped down (the stable-diffusion ones round the points kept down).

    Raises:
        BadManifest: the sampler has no grid for this count. IllegalSteps: `strength` leaves nothing to do.
    """
    first = int(max(steps - steps * strength, 0))
    if first >= steps:
        raise IllegalSteps(f"strength {strength} of {steps} steps leaves none; use a strength above 0")
    if sampler.sigmas is not None and len(sampler.sigmas) == steps:
        sigmas = np.asarray(sampler.sigmas, np.float64)
    elif sampler.grid is not None and sampler.grid.spacing == "flow":
        ends = _shift(np.array([1.0, 1 / TRAIN_STEPS]), sampler.shift).astype(np.float32).astype(np.float64)
        sigmas = np.linspace(ends[0], ends[1], steps)
    elif sampler.grid is not None and sampler.grid.spacing == "uniform":
        sigmas = 1 - np.arange(steps) / steps
    else:
        raise BadManifest(f"sampler {sampler.kind!r} has no sigmas for {steps} steps; give grid `flow` or `uniform`")
    if not (np.diff(sigmas) < 0).all() or not sigmas.min() > 0 or not sigmas.max() <= 1:
        raise BadManifest(f"sigmas {sigmas.tolist()} must fall, from at most 1 to above 0")
    return Points(_shift(sigmas, sampler.shift).astype(np.float32).astype(np.float64), first)


def _shift(sigmas: F64, shift: float) -> F64:
    """The resolution shift of Esser et al. 2024, eq. 23: more of the path at high noise where shift is above 1."""
    if not 0 < shift < math.inf:
        raise BadManifest(f"shift is {shift}; it must be above 0 and finite")
    return shift * sigmas / (1 + (shift - 1) * sigmas)
