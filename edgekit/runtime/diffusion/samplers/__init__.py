"""A sampler is a table of numbers: one pure builder per sampler, each written like its paper.

Every row asks the network once and is linear in all it sees:

    m  = net(c_in * x, t)                                            the network, after guidance
    y  = px * x + pm * m                                             its estimate of the clean sample (then clipped)
    x' = kx * x + ky * y + km * m + kz * z + kp * x_prev + kq * y_prev     z: fresh unit noise; _prev: the row before

Notation: x_t = a x_0 + s eps with a^2 = abar_t and s^2 = 1 - abar_t; in sigma space x = x_0 + sigma eps; on a flow
x = (1 - sigma) x_0 + sigma eps and the network predicts eps - x_0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edgekit.bundle.recipe import Sampler
from edgekit.runtime.diffusion import grids
from edgekit.runtime.diffusion.grids import F64, Points
from edgekit.runtime.diffusion.samplers.bridges import brownian_bridge, residual_shift
from edgekit.runtime.diffusion.samplers.flow import flow_euler, flow_heun, flow_map, flow_midpoint, flow_stochastic
from edgekit.runtime.diffusion.samplers.one_step import one_step
from edgekit.runtime.diffusion.samplers.rows import Estimate, Level, Path, Row, estimate
from edgekit.runtime.diffusion.samplers.sigma import edm_consistency, euler, euler_ancestral, trig_consistency
from edgekit.runtime.diffusion.samplers.vp import ddim, ddpm, dpmpp_2m, lcm, tcd

__all__ = ["SAMPLERS", "Estimate", "Level", "Path", "Row", "SamplerRule", "estimate"]


class SamplerRule(NamedTuple):
    """A row of SAMPLERS: where the points are, what happens at them, and whether a picture may start the path."""

    points: Callable[[Sampler, int, float], Points]
    build: Callable[[Sampler, F64], Path]
    from_image: bool = True


SAMPLERS: dict[str, SamplerRule] = {
    "lcm": SamplerRule(grids.vp_points, lcm),
    "tcd": SamplerRule(grids.vp_points, tcd),
    "ddim": SamplerRule(grids.vp_points, ddim),
    "ddpm": SamplerRule(grids.vp_points, ddpm),
    "dpmpp_2m": SamplerRule(grids.vp_points, dpmpp_2m),
    "euler": SamplerRule(grids.sigma_points, euler),
    "euler_ancestral": SamplerRule(grids.sigma_points, euler_ancestral),
    "edm_consistency": SamplerRule(grids.sigma_points, edm_consistency),
    "trig_consistency": SamplerRule(grids.trig_points, trig_consistency),
    "flow_euler": SamplerRule(grids.flow_points, flow_euler),
    "flow_heun": SamplerRule(grids.flow_points, flow_heun),
    "flow_midpoint": SamplerRule(grids.flow_points, flow_midpoint),
    "flow_map": SamplerRule(grids.flow_points, flow_map),
    "flow_stochastic": SamplerRule(grids.flow_points, flow_stochastic),
    "residual_shift": SamplerRule(grids.residual_points, residual_shift, from_image=False),
    "brownian_bridge": SamplerRule(grids.bridge_points, brownian_bridge, from_image=False),
    "one_step": SamplerRule(grids.single_point, one_step, from_image=False),
}
