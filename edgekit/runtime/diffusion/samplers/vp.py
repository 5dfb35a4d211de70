"""Samplers of variance-preserving models: x_t = a x_0 + s eps with a^2 = abar_t and s^2 = 1 - abar_t."""

from __future__ import annotations

import math

import numpy as np

from edgekit.bundle.recipe import NoiseSchedule, Sampler
from edgekit.errors import BadManifest
from edgekit.runtime.diffusion.grids import F64, alphas_cumprod, is_explicit, never_zero
from edgekit.runtime.diffusion.samplers.rows import Level, Path, Row, estimate

CLEAN: Level = (1.0, 0.0)


def schedule_of(sampler: Sampler) -> F64:
    """abar over the whole training grid, (n,). Raises BadManifest."""
    return alphas_cumprod(sampler.noise_schedule or NoiseSchedule())


def levels_of(abar: F64, visited: list[int]) -> list[Level]:
    """(a, s) at each timestep."""
    return [(math.sqrt(abar[t]), math.sqrt(1 - abar[t])) for t in visited]


def whole(timesteps: F64) -> list[int]:
    """Timesteps as integers."""
    return [int(t) for t in np.round(timesteps)]


def lcm(sampler: Sampler, timesteps: F64) -> Path:
    """Latent consistency (Luo et al. 2023): f = c_skip x + c_out x_0, then renoised to the next timestep."""
    visited = whole(timesteps)
    levels = levels_of(schedule_of(sampler), visited)
    rows = []
    for t, (a, s), (a_next, s_next) in zip(visited, levels, [*levels[1:], CLEAN], strict=True):
        to = estimate(sampler.prediction, a, s)
        scaled, data = t * sampler.timestep_scaling, sampler.sigma_data
        c_skip = data**2 / (scaled**2 + data**2)
        c_out = scaled / math.sqrt(scaled**2 + data**2)
        rows.append(Row(t, px=to.px, pm=to.pm, kx=a_next * c_skip, ky=a_next * c_out, kz=s_next))
    return Path(rows, levels)


def tcd(sampler: Sampler, timesteps: F64) -> Path:
    """Trajectory consistency (Zheng et al. 2024): jump to r = (1 - gamma) t', then renoise from r up to t'."""
    if not 0 <= sampler.gamma <= 1:
        raise BadManifest(f"gamma is {sampler.gamma}; it is a share, from 0 to 1")
    abar, visited = schedule_of(sampler), whole(timesteps)
    levels = levels_of(abar, visited)
    rows = []
    for i, (t, (a, s)) in enumerate(zip(visited, levels, strict=True)):
        to = estimate(sampler.prediction, a, s)
        last = i + 1 == len(visited)
        t_next = 0 if last else visited[i + 1]
        r = int(np.floor(np.float32(1 - sampler.gamma) * np.float32(t_next)))  # the product is float32 in the reference
        a_r, s_r = math.sqrt(abar[r]), math.sqrt(1 - abar[r])
        power = 1.0 if last or sampler.gamma == 0 else float(abar[t_next]) / float(abar[r])
        g = math.sqrt(power)
        rows.append(
            Row(t, px=to.px, pm=to.pm, kx=g * s_r * to.ex, ky=g * a_r, km=g * s_r * to.em, kz=math.sqrt(1 - power))
        )
    return Path(rows, levels)


def ddim(sampler: Sampler, timesteps: F64) -> Path:
    """DDIM with eta (Song et al. 2021, eq. 12). Clipping touches x_0 alone; eps is the network's own.

    On a made grid the target lies a constant stride below t, as in diffusers; an explicit list is walked as it stands,
    or row by row to `endpoints` (iCD, Starodubcev et al. 2024, which also walks up, from picture to noise).
    """
    abar, visited = schedule_of(sampler), whole(timesteps)
    levels = levels_of(abar, visited)
    final = 1.0 if sampler.final_alpha_one else float(abar[0])
    rows = []
    for t, target, (a, s) in zip(visited, _targets(sampler, visited, len(abar)), levels, strict=True):
        to = estimate(sampler.prediction, a, s)
        now, then = float(abar[t]), float(abar[target]) if target >= 0 else final
        noise = sampler.eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then)) if sampler.eta else 0.0
        toward = math.sqrt(max(1 - then - noise**2, 0.0))
        rows.append(Row(t, px=to.px, pm=to.pm, kx=toward * to.ex, ky=math.sqrt(then), km=toward * to.em, kz=noise))
    return Path(rows, levels)


def _targets(sampler: Sampler, visited: list[int], n: int) -> list[int]:
    """Where each of ddim's rows lands; -1 is past the grid's clean end."""
    if not is_explicit(sampler.timesteps, len(visited)):
        return [t - n // len(visited) for t in visited]
    if sampler.endpoints is None:
        return [*visited[1:], -1]
    ends = [int(t) for t in sampler.endpoints]
    if len(ends) != len(visited) or min(ends) < 0 or max(ends) >= n:
        raise BadManifest(f"endpoints {list(ends)} must be one per timestep ({len(visited)}), from 0 to {n - 1}")
    return [*ends[:-1], ends[-1] or -1]


def ddpm(sampler: Sampler, timesteps: F64) -> Path:
    """The posterior q(x_t' | x_t, x_0) of Ho et al. 2020, eq. 7, between any two points; no noise on the last row."""
    abar, visited = schedule_of(sampler), whole(timesteps)
    levels = levels_of(abar, visited)
    rows = []
    for t, t_next, (a, s) in zip(visited, [*visited[1:], -1], levels, strict=True):
        to = estimate(sampler.prediction, a, s)
        now, then = float(abar[t]), float(abar[t_next]) if t_next >= 0 else 1.0
        alpha = now / then
        rows.append(
            Row(
                t,
                px=to.px,
                pm=to.pm,
                kx=math.sqrt(alpha) * (1 - then) / (1 - now),
                ky=math.sqrt(then) * (1 - alpha) / (1 - now),
                kz=math.sqrt((1 - then) / (1 - now) * (1 - alpha)),
            )
        )
    return Path(rows, levels)


def dpmpp_2m(sampler: Sampler, timesteps: F64) -> Path:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): in lambda = log(a / s), with the estimate of the row before.

    x' = s'/s x + a' (1 - exp(-h)) [y + (y - y_prev) / 2r], h = lambda' - lambda, r = h_prev / h. The first row has no
    estimate before it, and the last one ends at the clean sample, where the rule is y whatever the order.
    """
    visited = whole(timesteps)
    levels = levels_of(never_zero(schedule_of(sampler)), visited)
    lambdas = [math.log(a / s) for a, s in levels]
    rows = []
    for i, (t, (a, s)) in enumerate(zip(visited, levels, strict=True)):
        to = estimate(sampler.prediction, a, s)
        row = Row(t, px=to.px, pm=to.pm)
        if i + 1 < len(visited):
            a_next, s_next = levels[i + 1]
            h = lambdas[i + 1] - lambdas[i]
            toward = -a_next * math.expm1(-h)
            history = h / (2 * (lambdas[i] - lambdas[i - 1])) if i else 0.0
            row = row._replace(kx=s_next / s, ky=toward * (1 + history), kq=-toward * history)
        rows.append(row)
    return Path(rows, levels)
