"""The other side of the cases where diffusers has no class: each sampler as its authors write it, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edgekit.bundle.recipe import NoiseSchedule, ResidualShift, Sampler
from edgekit.runtime.diffusion.grids import alphas_cumprod
from edgekit.runtime.random import TorchNoise
from tests.runtime.diffusion.cases import SEED, SHAPE, Case, net, picture

F64 = npt.NDArray[np.float64]
Drawn = tuple[F64, list[float]]  # the sample, and the times the network was told


class World:
    """Float64 noise, picture and denoiser of a case; remembers the times it was told."""

    def __init__(self) -> None:
        self._noise, self.times = TorchNoise(SEED), list[float]()
        self.picture = picture().astype(np.float64)

    def z(self, draw: int) -> F64:
        """Unit noise: 0 for the start, 1 + row for a row."""
        return self._noise.normal(SHAPE, draw).astype(np.float64)

    def net(self, x: F64, t: float) -> F64:
        """The stand-in denoiser of float32."""
        self.times.append(t)
        return net(x.astype(np.float32), t).astype(np.float64)


def _abar(sampler: Sampler) -> F64:
    return alphas_cumprod(sampler.noise_schedule or NoiseSchedule())


def wavegrad(case: Case, world: World) -> F64:
    """Chen et al. 2021, algorithm 2: x <- (x - (1 - alpha)/sqrt(1 - abar) eps) / sqrt(alpha) + noise, clamped."""
    betas = np.array(case.sampler.noise_schedule.betas)  # type: ignore[union-attr]
    alphas, abar = 1 - betas, np.cumprod(1 - betas)
    x = world.z(0)
    for n in range(len(betas) - 1, -1, -1):
        eps = world.net(x, math.sqrt(abar[n]))
        x = (x - (1 - alphas[n]) / math.sqrt(1 - abar[n]) * eps) / math.sqrt(alphas[n])
        if n:
            variance = (1 - abar[n - 1]) / (1 - abar[n]) * betas[n]
            x = x + math.sqrt(variance) * world.z(len(betas) - n)
        x = np.clip(x, -1, 1)
    return x


def ddim_jumps(case: Case, world: World) -> F64:
    """x_0 and eps at t, put together again at the endpoint; the clean one where it is 0 or there is none."""
    sampler, abar = case.sampler, _abar(case.sampler)
    visited = [int(t) for t in sampler.timesteps or ()]
    ends = [int(t) for t in sampler.endpoints] if sampler.endpoints else [*visited[1:], 0]
    x = world.z(0)
    if case.init.noised:
        x = math.sqrt(abar[visited[0]]) * world.picture + math.sqrt(1 - abar[visited[0]]) * x
    for t, end, told in zip(visited, ends, sampler.time_tuned or visited, strict=True):
        eps = world.net(x, told)
        clean = (x - math.sqrt(1 - abar[t]) * eps) / math.sqrt(abar[t])
        signal = abar[end] if end else 1.0
        x = math.sqrt(signal) * clean + math.sqrt(1 - signal) * eps
    return x


def edm_consistency(case: Case, world: World) -> F64:
    """Song et al. 2023, algorithm 1, on listed sigmas."""
    sampler = case.sampler
    data, least, sigmas = sampler.sigma_data, sampler.sigma_min, sampler.sigmas or ()
    x = sigmas[0] * world.z(0)
    for row, sigma in enumerate(sigmas):
        if row:
            x = x + math.sqrt(sigma**2 - least**2) * world.z(row)
        answer = world.net(x / math.sqrt(sigma**2 + data**2), math.log(sigma) / 4)
        skip = data**2 / ((sigma - least) ** 2 + data**2)
        x = skip * x + (sigma - least) * data / math.sqrt(sigma**2 + data**2) * answer
    return x


def animatelcm_svd(case: Case, world: World) -> F64:
    """AnimateLCM-SVD's published scheduler: every (40 // n)-th Karras sigma, SVD's own denoiser, x_0 + sigma' z."""
    n, low, high = case.steps, 0.002 ** (1 / 7), 700 ** (1 / 7)
    sigmas = [(high + (40 // n) * i / 39 * (low - high)) ** 7 for i in range(n)]
    x = math.sqrt(700**2 + 1) * world.z(0)
    for row, sigma in enumerate(sigmas):
        if row:
            x = x + sigma * world.z(row)
        v = world.net(x / math.sqrt(sigma**2 + 1), math.log(sigma) / 4)
        x = x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * v
    return x


def midpoint(case: Case, world: World) -> F64:
    """dx/dsigma = v by the midpoint rule, on shifted even sigmas."""
    n, shift = case.steps, case.sampler.shift
    even = 1 - np.arange(n + 1) / n
    sigmas = shift * even / (1 + (shift - 1) * even)
    x = world.z(0)
    for now, after in pairwise(sigmas.tolist()):
        half = x + (after - now) / 2 * world.net(x, 1000 * now)
        x = x + (after - now) * world.net(half, 1000 * (now + after) / 2)
    return x


def slimflow(case: Case, world: World) -> F64:
    """Rectified flow as Liu et al. 2023 write it: time runs from noise (0) to data (1), and is told times 999."""
    x, n = world.z(0), case.steps
    for i in range(n):
        x = x + world.net(x, 999 * i / n) / n
    return x


def resshift(case: Case, world: World) -> F64:
    """Yue et al. 2023, eq. 7 and 9, with the schedule as their code grows it."""
    shift, steps = case.sampler.residual_shift or ResidualShift(), case.steps
    least = min(shift.min_noise / shift.kappa, shift.min_noise)
    growth = math.exp(math.log(shift.eta_end / least) / (steps - 1))
    etas = (least * growth ** (np.linspace(0, 1, steps) ** shift.power * (steps - 1))) ** 2
    x = world.picture + shift.kappa * math.sqrt(etas[-1]) * world.z(0)
    for row, k in enumerate(range(steps - 1, -1, -1)):
        clean = world.net(x / math.sqrt(shift.kappa**2 * etas[k] + 1), k)
        before = etas[k - 1] if k else 0.0
        alpha = etas[k] - before
        x = before / etas[k] * x + alpha / etas[k] * clean
        x = x + shift.kappa * math.sqrt(before / etas[k] * alpha) * world.z(1 + row)
    return x


def bridge(case: Case, world: World) -> F64:
    """The law of a Brownian bridge between x_0 at time 0 and x at time t, at t' (ASBM, eq. 12)."""
    x, n = world.picture, case.steps
    for row, k in enumerate(range(n - 1, -1, -1)):
        t, after = (k + 1) / n, k / n
        clean = world.net(x, k)
        x = (
            clean
            + after / t * (x - clean)
            + math.sqrt(case.sampler.bridge_noise * after * (1 - after / t)) * world.z(1 + row)
        )
    return x


def sim(_: Case, world: World) -> F64:
    """SIM: x = 2.5 z, x_0 = x - 2.5 F(x / sqrt(7.25), 440)."""
    x = 2.5 * world.z(0)
    return x - 2.5 * world.net(x / math.sqrt(7.25), 440)


def swiftbrush(_: Case, world: World) -> F64:
    """SwiftBrush: x_0 at t = 999 with the abar of 0.0047 in its code, which no schedule of it gives."""
    z = world.z(0)
    return (z - math.sqrt(1 - 0.0047) * world.net(z, 999)) / math.sqrt(0.0047)


def osdface(case: Case, world: World) -> F64:
    """OSDFace: the low-quality latent itself, without noise, taken for a sample at t = 399."""
    abar = _abar(case.sampler)[399]
    return (world.picture - math.sqrt(1 - abar) * world.net(world.picture, 399)) / math.sqrt(abar)


def tsdsr(_: Case, world: World) -> F64:
    """TSD-SR: the enlarged picture less what a flow network at t = 1000 says of it."""
    return world.picture - world.net(world.picture, 1000)


def euler_v(case: Case, world: World) -> F64:
    """Karras et al. 2022, algorithm 1 without churn, on v: what EulerDiscreteScheduler computes in float32.

    Of the ancestral kind (k-diffusion), each step goes down further and up again by fresh noise.
    """
    sampler, n = case.sampler, case.steps
    if sampler.grid is not None and sampler.grid.spacing == "karras":
        low, high = sampler.grid.sigma_min ** (1 / 7), sampler.grid.sigma_max ** (1 / 7)
        sigmas = (high + np.linspace(0, 1, n) * (low - high)) ** 7
        told, x = np.log(sigmas) / 4, math.sqrt(sigmas[0] ** 2 + 1) * world.z(0)
    else:
        told, abar = np.arange(1000, 0, -1000 / n) - 1, _abar(sampler)
        abar[-1] = 2**-24
        sigmas = np.sqrt((1 - abar) / abar)[told.astype(int)]
        x = sigmas[0] * world.z(0)
    for row, (t, now, after) in enumerate(zip(told.tolist(), sigmas, [*sigmas[1:], 0.0], strict=True)):
        v = world.net(x / math.sqrt(now**2 + 1), t)
        slope = (x - (x / (now**2 + 1) - now / math.sqrt(now**2 + 1) * v)) / now
        up = after * math.sqrt(1 - (after / now) ** 2) if sampler.kind == "euler_ancestral" else 0.0
        x = x + slope * (math.sqrt(after**2 - up**2) - now)
        if up:
            x = x + up * world.z(1 + row)
    return x


def heun(case: Case, world: World) -> F64:
    """Heun's method on FlowMatchHeunDiscreteScheduler's grid, without its detour over x_0."""
    sigmas = [*np.linspace(1, np.float32(1e-3), case.steps).astype(np.float32).tolist(), 0.0]
    x = world.z(0)
    for now, after in pairwise(sigmas):
        v = world.net(x, 1000 * now)
        if after:
            v = (v + world.net(x + (after - now) * v, 1000 * after)) / 2
        x = x + (after - now) * v
    return x


CLOSED_FORMS: dict[str, Callable[[Case, World], F64]] = {
    form.__name__: form
    for form in (
        wavegrad,
        ddim_jumps,
        edm_consistency,
        animatelcm_svd,
        midpoint,
        slimflow,
        resshift,
        bridge,
        sim,
        swiftbrush,
        osdface,
        tsdsr,
    )
}


def closed_form(case: Case) -> Drawn:
    """The sample of a case's closed form, and the times its network was told."""
    world = World()
    return CLOSED_FORMS[case.scheduler](case, world), world.times


def exact(case: Case) -> F64:
    """A float64 run of the formulas of a scheduler that loses digits: those of CANCELLING."""
    return (heun if case.sampler.kind == "flow_heun" else euler_v)(case, World())
