"""One call, whose estimate of the clean sample is the answer."""

from __future__ import annotations

import math

from edgekit.bundle.recipe import Sampler
from edgekit.errors import BadManifest
from edgekit.runtime.diffusion.grids import F64
from edgekit.runtime.diffusion.samplers.flow import legs
from edgekit.runtime.diffusion.samplers.rows import Path, Row, estimate
from edgekit.runtime.diffusion.samplers.vp import levels_of, schedule_of, whole


def one_step(sampler: Sampler, points: F64) -> Path:
    """x_0 of the single point: of a flow, of a variance-preserving model, or, with `sigmas`, in sigma space.

    In sigma space (SIM, Luo et al. 2024) x = sigma z and the network is shown x / sqrt(sigma^2 + 1); `timesteps` holds
    the time it is told, which need not belong to that sigma.
    """
    if sampler.prediction == "flow":
        path, levels = legs(sampler, points)
        return Path([row._replace(ky=1.0) for *_, row in path], levels)
    if sampler.sigmas is not None:
        return _in_sigma_space(sampler, float(points[0]))
    (t,) = whole(points)
    ((a, s),) = levels_of(schedule_of(sampler), [t])
    to = estimate(sampler.prediction, a, s)
    return Path([Row(t, px=to.px, pm=to.pm)], [(a, s)])


def _in_sigma_space(sampler: Sampler, sigma: float) -> Path:
    if sampler.timesteps is None or len(sampler.timesteps) != 1:
        raise BadManifest("sampler `one_step` with a sigma needs the time its network is told, as one timestep")
    c_in = 1 / math.sqrt(sigma**2 + 1)
    to = estimate(sampler.prediction, c_in, sigma * c_in)
    return Path([Row(sampler.timesteps[0], c_in=c_in, px=to.px * c_in, pm=to.pm)], [(1.0, sigma)], sigma)
