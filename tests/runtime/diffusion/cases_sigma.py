"""Cases of the samplers in sigma space, and of consistency models in EDM's and TrigFlow's form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgekit.bundle.recipe import Grid, Sampler
from tests.runtime.diffusion.cases import IMG2IMG, SD, Case, vp_case


def _sigma(kind: str, scheduler: str) -> Iterator[Case]:
    for n in range(1, 9):
        yield vp_case(kind, scheduler, f"trailing {n}", n, {**SD, "timestep_spacing": "trailing"})
    for spacing, offset in (("leading", 1), ("linspace", 0)):
        config = {**SD, "timestep_spacing": spacing, "steps_offset": offset}
        yield vp_case(kind, scheduler, spacing, 5, config)
    v = {**SD, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    yield vp_case(kind, scheduler, "v", 4, v)
    yield vp_case(kind, scheduler, "v zero SNR", 4, {**v, "rescale_betas_zero_snr": True})
    if kind == "euler":
        yield vp_case(kind, scheduler, "sample", 4, {**SD, "timestep_spacing": "trailing", "prediction_type": "sample"})
    for n, strength in ((2, 0.5), (4, 0.3), (4, 1.0)):
        config = {**SD, "timestep_spacing": "trailing"}
        yield vp_case(kind, scheduler, f"picture {strength} of {n}", n, config, strength=strength)


def _svd() -> Iterator[Case]:
    """Stable Video Diffusion's scheduler: v-prediction on a Karras grid, told ln(sigma) / 4."""
    config = {
        **SD,
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
        "timestep_type": "continuous",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "sigma_min": 0.002,
        "sigma_max": 700.0,
    }
    grid = Grid("karras", sigma_max=700.0)
    for n in (*range(1, 9), 25):
        sampler = Sampler("euler", n, (n,), prediction="v_prediction", grid=grid)
        yield Case(f"euler karras {n}", sampler, n, "EulerDiscreteScheduler", config, {"num_inference_steps": n})
    given = (80.0, 9.0, 1.5, 0.2)
    sampler = Sampler("euler", 4, (4,), prediction="v_prediction", sigmas=given)
    points = {"sigmas": [*given, 0.0]}
    yield Case("euler sigmas", sampler, 4, "EulerDiscreteScheduler", config, points)


def _edm() -> Iterator[Case]:
    def make(name: str, steps: int, **options: Any) -> Case:
        grid = Grid("karras", original=40, sigma_max=options.pop("sigma_max", 80.0))
        sampler = {"grid": grid, "time_scale": 1000.0, **options.pop("sampler", {})}
        config = {"num_train_timesteps": 40, "clip_denoised": False, "sigma_max": grid.sigma_max}
        config |= options.pop("config", {})
        return Case(
            f"edm_consistency {name}",
            Sampler("edm_consistency", steps, (steps,), **sampler),
            steps,
            options.pop("scheduler", "CMStochasticIterativeScheduler"),
            config,
            {"num_inference_steps": steps},
        )

    for n in (*range(1, 9), 40):
        yield make(f"{n}", n)
    yield make("clip", 4, sampler={"clip": 1.0}, config={"clip_denoised": True})
    yield make("data 1", 3, sampler={"sigma_data": 1.0}, config={"sigma_data": 1.0}, sigma_max=700.0)
    v = {"prediction": "v_prediction", "sigma_data": 1.0, "sigma_min": 0.0, "time_scale": 1.0}
    for n in (1, 2, 4, 8):
        yield make(f"AnimateLCM-SVD {n}", n, sampler=v, sigma_max=700.0, scheduler="animatelcm_svd")
    for least in (0.002, 0.0):
        given = {"sigmas": (80.0, 20.0, 4.0, 0.6), "sigma_min": least, "grid": None, "time_scale": 1.0}
        yield make(f"sigmas to {least}", 4, sampler=given, scheduler="edm_consistency")


def _trig() -> Iterator[Case]:
    def make(name: str, steps: int, points: dict[str, Any], **options: Any) -> Case:
        sampler = {"grid": Grid("linspace"), **options.pop("sampler", {})}
        return Case(
            f"trig_consistency {name}",
            Sampler("trig_consistency", steps, (steps,), **sampler),
            steps,
            "SCMScheduler",
            options.pop("config", {}),
            {"num_inference_steps": steps, **points},
            **options,
        )

    for n in range(1, 9):
        yield make(f"{n}", n, {"intermediate_timesteps": None})
    sana = {"timesteps": (1.5708, 1.3)}
    yield make("SANA-Sprint", 2, {}, sampler=sana)
    yield make("data 1", 2, {}, sampler={**sana, "sigma_data": 1.0}, config={"sigma_data": 1.0})
    given = (1.56454, 1.1, 0.4)
    listed = {"timesteps": [*given, 0.0], "max_timesteps": None, "intermediate_timesteps": None}
    yield make("list", 3, listed, sampler={"timesteps": given, "grid": None})
    for strength in (0.3, 0.5, 0.8, 1.0):
        cut = {"strength": strength, "tail": IMG2IMG["trig"]}
        yield make(f"picture {strength}", 4, {"intermediate_timesteps": None}, **cut)


def sigma_cases() -> Iterator[Case]:
    """All of them."""
    yield from _sigma("euler", "EulerDiscreteScheduler")
    yield from _sigma("euler_ancestral", "EulerAncestralDiscreteScheduler")
    for cases in (_svd, _edm, _trig):
        yield from cases()
