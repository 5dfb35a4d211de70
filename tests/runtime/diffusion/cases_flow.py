"""Cases of the flow samplers, the bridges, and the one-step models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgekit.bundle.recipe import Grid, Init, NoiseSchedule, ResidualShift, Sampler
from tests.runtime.diffusion.cases import IMG2IMG, SD, Case, vp_case

PICTURE = Init("input", channels=3)


def _flow(kind: str, scheduler: str, grid: str = "flow") -> Iterator[Case]:
    def make(name: str, steps: int, shift: float, strength: float | None = None, **options: Any) -> Case:
        sampler = {"grid": Grid(grid), "shift": shift, **options.pop("sampler", {})}  # type: ignore[arg-type]
        return Case(
            f"{kind} {name}",
            Sampler(kind, steps, (steps,), prediction="flow", **sampler),  # type: ignore[arg-type]
            steps,
            options.pop("scheduler", scheduler),
            {"shift": shift, **options.pop("config", {})},
            {"num_inference_steps": steps, **options.pop("set_timesteps", {})},
            strength=strength,
            tail=None if strength is None else IMG2IMG["flow"],
        )

    for n in range(1, 9):
        for shift in (1.0, 3.0):
            yield make(f"{n} shift {shift}", n, shift)
    for n, strength in ((4, 0.3), (4, 0.8), (4, 1.0), (1, 0.5)):
        yield make(f"picture {strength} of {n}", n, 3.0, strength)
    yield make("x_0 - eps", 4, 3.0, sampler={"sign": -1})
    if kind != "flow_heun":
        given = (1.0, 0.75, 0.5, 0.25)
        points = {"sigmas": list(given)}
        yield make("list", 4, 3.0, sampler={"sigmas": given, "grid": None}, set_timesteps=points)
    if kind in ("flow_euler", "flow_stochastic"):
        dynamic = {"use_dynamic_shifting": True}
        for n in range(1, 9):
            mu = {"set_timesteps": {"mu": 0.8}, "config": dynamic}
            yield make(f"{n} mu", n, 1.0, sampler={"mu": 0.8}, **mu)
            even = {"sigmas": [1 - i / n for i in range(n)], "mu": 1.15}
            sampler = {"mu": 1.15, "grid": Grid("uniform")}
            yield make(f"{n} uniform mu", n, 1.0, sampler=sampler, set_timesteps=even, config=dynamic)
    if kind == "flow_stochastic":
        other = {"scheduler": "FlowMatchEulerDiscreteScheduler", "config": {"stochastic_sampling": True}}
        for n in (1, 4):
            yield make(f"{n} of Euler", n, 3.0, **other)


def _closed_flows() -> Iterator[Case]:
    for n in range(1, 9):
        for shift in (1.0, 3.0):
            sampler = Sampler("flow_midpoint", n, (n,), prediction="flow", grid=Grid("uniform"), shift=shift)
            yield Case(f"flow_midpoint {n} shift {shift}", sampler, n, "midpoint")
    for n in (1, 5):
        options = {"prediction": "flow", "grid": Grid("uniform"), "sign": -1}
        slim = {"time": "one_minus_sigma", "time_scale": 999.0}
        yield Case(f"flow_euler SlimFlow {n}", Sampler("flow_euler", n, (n,), **options, **slim), n, "slimflow")


def _bridges() -> Iterator[Case]:
    for kappa, least in ((2.0, 0.2), (2.0, 0.04), (1.0, 0.3)):
        shift = ResidualShift(kappa=kappa, min_noise=least)
        for n in (2, 4, 8, 15):
            sampler = Sampler("residual_shift", n, (n,), prediction="sample", residual_shift=shift)
            init = Init("input", channels=3, noised=True)
            yield Case(f"residual_shift {n} kappa {kappa} from {least}", sampler, n, "resshift", init=init)
    for n in range(1, 9):
        for noise in (1.0, 0.2):
            sampler = Sampler("brownian_bridge", n, (n,), prediction="sample", bridge_noise=noise)
            yield Case(f"brownian_bridge {n} noise {noise}", sampler, n, "bridge", init=PICTURE)


def _one_step() -> Iterator[Case]:
    for prediction in ("epsilon", "v_prediction", "sample"):
        config = {**SD, "prediction_type": prediction, "timestep_spacing": "trailing", "clip_sample": False}
        yield vp_case("one_step", "DDIMScheduler", prediction, 1, config, sampler={"grid": None})
    for sign in (1, -1):
        flow = Sampler("one_step", 1, (1,), prediction="flow", sign=sign)  # type: ignore[arg-type]
        points = {"num_inference_steps": 1}
        yield Case(f"one_step flow {sign}", flow, 1, "FlowMatchEulerDiscreteScheduler", {}, points)
    sim = Sampler("one_step", 1, (1,), sigmas=(2.5,), timesteps=(440.0,))
    yield Case("one_step SIM", sim, 1, "sim")
    betas = NoiseSchedule(betas=(1 - 0.0047,))
    swift = Sampler("one_step", 1, (1,), noise_schedule=betas, time_tuned=(999.0,))
    yield Case("one_step SwiftBrush", swift, 1, "swiftbrush")
    face = Sampler("one_step", 1, (1,), noise_schedule=NoiseSchedule(), timesteps=(399.0,))
    yield Case("one_step OSDFace", face, 1, "osdface", init=PICTURE)
    edge = Sampler("one_step", 1, (1,), prediction="flow")
    yield Case("one_step TSD-SR", edge, 1, "tsdsr", init=PICTURE)


def flow_cases() -> Iterator[Case]:
    """All of them."""
    yield from _flow("flow_euler", "FlowMatchEulerDiscreteScheduler")
    yield from _flow("flow_stochastic", "FlowMatchLCMScheduler")
    yield from _flow("flow_heun", "FlowMatchHeunDiscreteScheduler")
    yield from _flow("flow_map", "FlowMapEulerDiscreteScheduler", "uniform")
    for cases in (_closed_flows, _bridges, _one_step):
        yield from cases()
