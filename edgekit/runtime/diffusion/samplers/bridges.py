"""Samplers that walk from one picture to another instead of from noise: x lies between x_0 and what was given."""

from __future__ import annotations

import math

from edgekit.bundle.recipe import ResidualShift, Sampler
from edgekit.runtime.diffusion.grids import F64
from edgekit.runtime.diffusion.samplers.rows import Path, Row, insist


def residual_shift(sampler: Sampler, etas: F64) -> Path:
    """ResShift (Yue et al. 2023, eq. 7): x_k = x_0 + eta_k (given - x_0) + kappa sqrt(eta_k) noise.

    x' = eta'/eta x + (1 - eta'/eta) x_0 + kappa sqrt(eta' (eta - eta') / eta) z; the network is shown x divided by
    sqrt(kappa^2 eta + 1) and told the row's place from the clean end.
    """
    insist(sampler.kind, sampler.prediction, "sample")
    kappa, now = (sampler.residual_shift or ResidualShift()).kappa, etas.tolist()
    rows = []
    for place, eta, after in zip(range(len(now) - 1, -1, -1), now, [*now[1:], 0.0], strict=True):
        rows.append(
            Row(
                place,
                c_in=1 / math.sqrt(kappa**2 * eta + 1),
                px=0.0,
                pm=1.0,
                kx=after / eta,
                ky=1 - after / eta,
                kz=kappa * math.sqrt(after * (eta - after) / eta),
            )
        )
    levels = [(1.0, kappa * math.sqrt(eta)) for eta in now]
    return Path(rows, levels, levels[0][1])


def brownian_bridge(sampler: Sampler, times: F64) -> Path:
    """The Brownian bridge of ASBM (Gushchin et al. 2024): x_t = (1 - t) x_0 + t given + sqrt(e t (1 - t)) noise.

    x' = t'/t x + (1 - t'/t) x_0 + sqrt(e t' (t - t') / t) z with e = `bridge_noise`; the network is told the row's
    place from the clean end.
    """
    insist(sampler.kind, sampler.prediction, "sample")
    noise, now = sampler.bridge_noise, times.tolist()
    rows = []
    for place, t, after in zip(range(len(now) - 1, -1, -1), now, [*now[1:], 0.0], strict=True):
        spread = math.sqrt(noise * after * (t - after) / t)
        rows.append(Row(place, px=0.0, pm=1.0, kx=after / t, ky=1 - after / t, kz=spread))
    return Path(rows, [(1.0, math.sqrt(noise * t * (1 - t))) for t in now], 0.0)
