"""Noise schedules and the points a few-step sampler visits on them.

Constants equal the ones torch computes in float32 to one unit in the last place, so the sums here keep its order of
rounding: a linspace counts from both ends, running products are accumulated in float64 and rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.bundle.recipe import Grid, NoiseSchedule, ResidualShift, Sampler
from edgekit.errors import BadManifest, BadRequest, IllegalSteps

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

TRAIN_STEPS = 1000  # flow models count time in thousandths
SMALLEST_ALPHA = 2.0**-24  # what k-diffusion samplers put in place of a terminal abar of zero
MAX_ANGLE = 1.57080  # SCMScheduler's `max_timesteps`: where a TrigFlow starts


@dataclass(frozen=True)
class Points:
    """The whole grid, noisiest first, in what its sampler counts, and the first point a sample visits."""

    values: F64
    first: int = 0


def linspace32(start: float, stop: float, n: int) -> F32:
    """`torch.linspace` in float32: the lower half counts up from `start`, the upper half down from `stop`."""
    a, b = np.float32(start), np.float32(stop)
    step, i = float((b - a) / np.float32(n - 1)), np.arange(n)
    points = np.where(i < n // 2, float(a) + step * i, float(b) - step * (n - 1 - i))
    return points.astype(np.float32)  # rounded once: a fused multiply-add


def betas(schedule: NoiseSchedule) -> F32:
    """Forward-process variances (n,) of a schedule that is no list, before any rescaling to zero terminal SNR."""
    if schedule.kind == "linear":
        return linspace32(schedule.beta_start, schedule.beta_end, schedule.n)
    if schedule.kind == "scaled_linear":
        return np.square(linspace32(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.n))

    def alpha_bar(u: float) -> float:  # Nichol & Dhariwal 2021, eq. 17
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    n = schedule.n
    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)], np.float32)


def alphas_cumprod(schedule: NoiseSchedule) -> F64:
    """Signal power abar_t (n,): float32 numbers, widened to float64 for what follows. Raises BadManifest.

    Listed betas are another matter: those of WaveGrad start at 7e-6, where float32 leaves three digits of 1 - abar, and
    their authors count in float64.
    """
    beta: F32 | F64 = np.array(schedule.betas) if schedule.betas else betas(schedule)
    if not (beta.min() > 0 and beta.max() < 1):
        raise BadManifest(f"noise schedule {schedule}: every beta must lie between 0 and 1")
    if schedule.betas:
        return np.asarray(np.cumprod(1 - beta.astype(np.float64)))
    single = beta.astype(np.float32)
    single = _zero_terminal_snr(single) if schedule.zero_snr else single
    return _running_product(np.float32(1) - single).astype(np.float64)


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


def never_zero(abar: F64) -> F64:
    """abar with a terminal zero replaced, for samplers that divide by it."""
    return np.where(abar > 0, abar, SMALLEST_ALPHA)


def train_steps(sampler: Sampler) -> int:
    """Length of the training grid."""
    schedule = sampler.noise_schedule or NoiseSchedule()
    return len(schedule.betas) or schedule.n


def is_explicit(given: tuple[float, ...] | None, steps: int) -> bool:
    """Whether a recipe lists the points of this step count outright."""
    return given is not None and len(given) == steps


def counts_sigmas(sampler: Sampler, steps: int) -> bool:
    """Whether a sampler in sigma space is given sigmas for this step count, rather than timesteps."""
    karras = sampler.grid is not None and sampler.grid.spacing == "karras"
    return is_explicit(sampler.sigmas, steps) or (karras and not is_explicit(sampler.timesteps, steps))


def vp_points(sampler: Sampler, steps: int, strength: float = 1.0) -> Points:
    """Timesteps of a variance-preserving sampler, and where image-to-image of `strength` enters them.

    The tail is diffusers' `get_timesteps`: the last int(steps * strength) points. LCM on its own grid has another rule:
    the distillation grid itself is cut at `strength`, and all `steps` points are taken from what is left.

    Raises:
        BadManifest: the sampler has no grid for this count. IllegalSteps: `strength` leaves nothing to do.
    """
    on_lcm_grid = sampler.grid is not None and sampler.grid.spacing == "lcm"
    if sampler.kind == "lcm" and on_lcm_grid and not is_explicit(sampler.timesteps, steps):
        return Points(_on_grid(sampler, _timesteps(sampler, steps, strength)))
    return Points(_on_grid(sampler, _timesteps(sampler, steps)), _skipped(steps, strength))


def _skipped(steps: int, strength: float) -> int:
    """Points that image-to-image leaves out, where the points kept are rounded down."""
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise IllegalSteps(f"strength {strength} of {steps} steps leaves none; use at least {1 / steps:.3g}")
    return steps - kept


def _skipped_by_flows(steps: int, strength: float) -> int:
    """Points that image-to-image leaves out, where the points skipped are rounded down."""
    first = int(max(steps - steps * strength, 0))
    if first >= steps:
        raise IllegalSteps(f"strength {strength} of {steps} steps leaves none; use a strength above 0")
    return first


def _on_grid(sampler: Sampler, timesteps: F64) -> F64:
    """The timesteps, if each lies on the training grid and below the one before; endpoints allow any order."""
    n = train_steps(sampler)
    falls = (np.diff(timesteps) < 0).all() or sampler.endpoints is not None
    if not falls or not timesteps.min() >= 0 or not timesteps.max() <= n - 1:
        raise BadManifest(f"timesteps {timesteps.tolist()} must fall, from at most {n - 1} to at least 0")
    return timesteps


def _timesteps(sampler: Sampler, steps: int, strength: float = 1.0) -> F64:
    if sampler.timesteps is not None and is_explicit(sampler.timesteps, steps):
        return np.asarray(sampler.timesteps, np.float64)
    n, grid = train_steps(sampler), sampler.grid
    if grid is None:
        raise BadManifest(f"sampler {sampler.kind!r} has no grid for {steps} steps; give `grid` or `timesteps`")
    if steps > n:
        raise BadManifest(f"{steps} steps on a training grid of {n}; a step count cannot exceed it")
    ends = sampler.kind == "dpmpp_2m"  # diffusers' DPM-Solver counts the clean end as a point, and leaves it out
    if grid.spacing == "lcm":
        return _lcm_grid(n, grid.original, steps, strength)
    if grid.spacing == "trailing":  # rounding of the stride may give one point too many
        return np.asarray(np.arange(n, 0, -n / steps)[:steps].round() - 1, np.float64)
    if grid.spacing == "leading":
        return np.asarray((np.arange(steps + ends) * (n // (steps + ends)))[::-1][:steps] + grid.offset, np.float64)
    if grid.spacing == "linspace":
        return np.asarray(np.linspace(0, n - 1, steps + ends)[::-1][:steps], np.float64)
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


def sigma_points(sampler: Sampler, steps: int, strength: float = 1.0) -> Points:
    """Points of a sampler in sigma space: timesteps of a training grid, or sigmas (see `counts_sigmas`).

    `karras` is Karras et al. 2022, eq. 5: Euler visits `steps` points of it, both ends among them; a consistency model
    every (original // steps)-th of the `original` points it was distilled on (Song et al. 2023).

    Raises:
        BadManifest: the sampler has no grid for this count. IllegalSteps: `strength` leaves nothing to do.
    """
    consistency = sampler.kind == "edm_consistency"
    if not counts_sigmas(sampler, steps):
        if consistency:
            raise BadManifest(
                f"sampler {sampler.kind!r} has no sigmas for {steps} steps; give grid `karras` or `sigmas`"
            )
        return vp_points(sampler, steps, strength)
    if is_explicit(sampler.sigmas, steps):
        sigmas = np.asarray(sampler.sigmas, np.float64)
    else:
        assert sampler.grid is not None, "sigmas are listed or made"
        sigmas = _karras(sampler.grid, steps, sampler.grid.original if consistency else None)
    if not (np.diff(sigmas) < 0).all() or not sigmas.min() > 0 or not sigmas.max() < math.inf:
        raise BadManifest(f"sigmas {sigmas.tolist()} must fall and stay above 0")
    return Points(sigmas, _skipped(steps, strength))


def _karras(grid: Grid, steps: int, original: int | None) -> F64:
    if original is not None and original < steps:
        raise BadManifest(f"{steps} steps from a distillation grid of {original}; a step count cannot exceed it")
    if not (0 < grid.sigma_min < grid.sigma_max and grid.rho > 0):
        raise BadManifest(f"sigma_min {grid.sigma_min}, sigma_max {grid.sigma_max}, rho {grid.rho} are no karras grid")
    if original is None:
        ramp = np.linspace(0, 1, steps)
    else:
        ramp = np.arange(steps) * (original // steps) / max(original - 1, 1)
    low, high = grid.sigma_min ** (1 / grid.rho), grid.sigma_max ** (1 / grid.rho)
    return np.asarray((high + ramp * (low - high)) ** grid.rho, np.float64)


def trig_points(sampler: Sampler, steps: int, strength: float = 1.0) -> Points:
    """Angles of a TrigFlow, float32 numbers in (0, pi/2]: listed as `timesteps`, or even ones from MAX_ANGLE to 0.

    The tail is that of the SANA-Sprint pipeline, which rounds the points skipped down.

    Raises:
        BadManifest: the sampler has no angles for this count. IllegalSteps: `strength` leaves nothing to do.
    """
    if is_explicit(sampler.timesteps, steps):
        angles = np.asarray(sampler.timesteps, np.float32)
    elif sampler.grid is not None and sampler.grid.spacing == "linspace":
        angles = linspace32(MAX_ANGLE, 0, steps + 1)[:-1]
    else:
        raise BadManifest(
            f"sampler {sampler.kind!r} has no angles for {steps} steps; give `timesteps` or grid linspace"
        )
    if not (np.diff(angles) < 0).all() or not angles.min() > 0 or not angles.max() <= np.float32(MAX_ANGLE):
        raise BadManifest(f"angles {angles.tolist()} must fall, from at most pi/2 to above 0")
    return Points(angles.astype(np.float64), _skipped_by_flows(steps, strength))


def flow_points(sampler: Sampler, steps: int, strength: float = 1.0) -> Points:
    """Sigmas of a flow sampler (without the final 0), and where image-to-image of `strength` enters them.

    `flow` is diffusers' FlowMatchEuler grid, which shifts twice: the ends are those of the shifted training grid, and
    the points between them are shifted again (with `mu`, only the points). `uniform` is 1 - i/steps; it and an explicit
    list are float32 before the shift, as pipelines that hand their sigmas over have them. The tail is that of the SD3
    pipelines, which round the points skipped down (the stable-diffusion ones round the points kept down).

    Raises:
        BadManifest: the sampler has no grid for this count. IllegalSteps: `strength` leaves nothing to do.
    """
    first = _skipped_by_flows(steps, strength)
    spacing = sampler.grid.spacing if sampler.grid is not None else None
    exact = sampler.kind == "flow_map"  # FlowMapEulerDiscreteScheduler counts in float64
    sigmas: F64 | F32
    if is_explicit(sampler.sigmas, steps):
        sigmas = np.asarray(sampler.sigmas, np.float64 if exact else np.float32)
    elif spacing == "flow":
        training = np.array([1.0, 1 / TRAIN_STEPS])
        ends = (training if sampler.mu is not None else _shift(sampler, training)).astype(np.float32)
        sigmas = np.linspace(float(ends[0]), float(ends[1]), steps)
    elif spacing == "uniform":
        sigmas = np.linspace(1, 1 / steps, steps).astype(np.float64 if exact else np.float32)
    else:
        raise BadManifest(f"sampler {sampler.kind!r} has no sigmas for {steps} steps; give grid `flow` or `uniform`")
    if not (np.diff(sigmas) < 0).all() or not sigmas.min() > 0 or not sigmas.max() <= 1:
        raise BadManifest(f"sigmas {sigmas.tolist()} must fall, from at most 1 to above 0")
    shifted = _shift(sampler, sigmas)
    return Points(shifted.astype(np.float64 if exact else np.float32).astype(np.float64), first)


def _shift(sampler: Sampler, sigmas: F64 | F32) -> F64 | F32:
    """The resolution shift of Esser et al. 2024, eq. 23: more of the path at high noise where `shift` is above 1.

    `mu` is the same with a shift of exp(mu), in the form, and so with the rounding, of FLUX.
    """
    if sampler.mu is not None:
        if not math.isfinite(sampler.mu):
            raise BadManifest(f"mu is {sampler.mu}; it must be finite")
        grown = math.exp(sampler.mu)
        return np.asarray(grown / (grown + (1 / sigmas - 1)))
    if not 0 < sampler.shift < math.inf:
        raise BadManifest(f"shift is {sampler.shift}; it must be above 0 and finite")
    return np.asarray(sampler.shift * sigmas / (1 + (sampler.shift - 1) * sigmas))


def residual_points(sampler: Sampler, steps: int, strength: float = 1.0) -> Points:
    """eta_k of ResShift (Yue et al. 2023, eq. 9), from the most shifted: sqrt(eta_k) = q (end / q)^((k/(T-1))^power).

    Raises:
        BadManifest: numbers that make no such schedule. BadRequest: a strength.
    """
    _refuse_strength(sampler, strength)
    shift = sampler.residual_shift or ResidualShift()
    least = min(shift.min_noise / shift.kappa, shift.min_noise) if shift.kappa > 0 else 0.0
    if not (0 < least < shift.eta_end < 1 and shift.power > 0):
        raise BadManifest(f"{shift}: shifts must grow from min_noise / kappa, above 0, to eta_end, below 1")
    share = np.linspace(1, 0, steps) ** shift.power
    return Points(np.square(least * (shift.eta_end / least) ** share))


def bridge_points(sampler: Sampler, steps: int, strength: float = 1.0) -> Points:
    """Times of a Brownian bridge, 1 at the given picture: 1 - i/steps. Raises BadRequest: a strength."""
    _refuse_strength(sampler, strength)
    return Points(1 - np.arange(steps) / steps)


def single_point(sampler: Sampler, steps: int, strength: float = 1.0) -> Points:
    """The single point of a one-step model: as given, or the noisiest.

    Raises:
        BadManifest: not one step and one point. BadRequest: a strength.
    """
    _refuse_strength(sampler, strength)
    flow = sampler.prediction == "flow"
    noisiest = 1.0 if flow else float(train_steps(sampler) - 1)
    given = sampler.sigmas if flow else sampler.sigmas or sampler.timesteps
    points = given or (noisiest,)
    if len(points) != steps or steps != 1:
        raise BadManifest(f"sampler `one_step` takes one step and one point, not {steps} and {len(points)}")
    values = np.asarray(points, np.float64)
    if flow or sampler.sigmas:
        if not 0 < values[0] <= (1 if flow else math.inf):
            raise BadManifest(f"sigma {values[0]} of sampler `one_step` must be above 0{', at most 1' if flow else ''}")
        return Points(values)
    return Points(_on_grid(sampler, values))


def _refuse_strength(sampler: Sampler, strength: float) -> None:
    if strength != 1:
        raise BadRequest(f"sampler {sampler.kind!r} cannot start part of the way; leave the strength out")
