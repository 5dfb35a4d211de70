"""Cases of the variance-preserving samplers: LCM, TCD, DDIM, DDPM, DPM-Solver++(2M)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgekit.bundle.recipe import Grid, Init, NoiseSchedule, Sampler
from tests.runtime.diffusion.cases import COSINE, LINEAR, SD, Case, schedule, vp_case


def _lcm() -> Iterator[Case]:
    def make(name: str, steps: int, extra: Mapping[str, Any] | None = None, **options: Any) -> Case:
        config = {**SD, **(extra or {})}
        sampler = {"grid": Grid("lcm"), **options.pop("sampler", {})}
        return Case(
            f"lcm {name}",
            Sampler("lcm", steps, (steps,), noise_schedule=schedule(config), **sampler),
            steps,
            "LCMScheduler",
            config,
            **{"set_timesteps": {"num_inference_steps": steps}, **options},
        )

    for n in range(1, 9):
        yield make(f"{n} steps", n)
    yield make("linear betas", 4, LINEAR)
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    yield make("v zero SNR", 4, v, sampler={"prediction": "v_prediction"})
    yield make("sample", 4, {"prediction_type": "sample"}, sampler={"prediction": "sample"})
    yield make("clip", 4, {"clip_sample": True, "clip_sample_range": 1.5}, sampler={"clip": 1.5})
    yield make("scaling 7", 4, {"timestep_scaling": 7.0}, sampler={"timestep_scaling": 7.0})
    yield make("100 distilled", 6, {"original_inference_steps": 100}, sampler={"grid": Grid("lcm", original=100)})
    given = (999, 749, 499, 249)
    yield make("list", 4, sampler={"timesteps": given, "grid": None}, set_timesteps={"timesteps": list(given)})
    for n, strength in ((1, 0.5), (2, 0.8), (4, 0.3), (4, 0.8), (4, 1.0), (8, 0.5)):
        cut = {"num_inference_steps": n, "strength": strength}
        yield make(f"picture {strength} of {n}", n, set_timesteps=cut, strength=strength)
    cut = {"timesteps": list(given), "strength": 0.6}
    yield make("picture list", 4, sampler={"timesteps": given, "grid": None}, set_timesteps=cut, strength=0.6)


def _tcd() -> Iterator[Case]:
    for n in range(1, 9):
        for gamma in (0.0, 0.3, 1.0):
            yield vp_case(
                "tcd", "TCDScheduler", f"{n} gamma {gamma}", n, SD, sampler={"gamma": gamma}, step={"eta": gamma}
            )
    for prediction in ("v_prediction", "sample"):
        yield vp_case("tcd", "TCDScheduler", prediction, 4, {**SD, "prediction_type": prediction}, step={"eta": 0.3})
    for strength in (0.5, 0.8, 1.0):
        yield vp_case("tcd", "TCDScheduler", f"picture {strength}", 4, SD, step={"eta": 0.3}, strength=strength)


def _ddim() -> Iterator[Case]:
    def make(name: str, steps: int, config: Mapping[str, Any], **options: Any) -> Case:
        return vp_case("ddim", "DDIMScheduler", name, steps, {**SD, "clip_sample": False, **config}, **options)

    for n in range(1, 9):
        yield make(f"trailing {n}", n, {"timestep_spacing": "trailing"})
        yield make(f"leading {n}", n, {"timestep_spacing": "leading", "steps_offset": 1})
    yield make("linspace 5", 5, {"timestep_spacing": "linspace"})
    for eta in (0.5, 1.0):
        yield make(f"eta {eta}", 8, {"timestep_spacing": "trailing"}, sampler={"eta": eta}, step={"eta": eta})
    v = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    yield make("v zero SNR", 8, v)
    first = {"timestep_spacing": "leading", "set_alpha_to_one": False}
    yield make("first alpha", 6, first, sampler={"final_alpha_one": False})
    clip = {**COSINE, "timestep_spacing": "leading", "clip_sample": True}
    yield make("cosine clip", 8, clip, sampler={"clip": 1.0})
    for strength in (0.5, 0.8, 1.0):
        yield make(f"picture {strength}", 5, {"timestep_spacing": "trailing"}, strength=strength)


def _jumps() -> Iterator[Case]:
    """Explicit targets: as diffusers walks, upwards from picture to noise, and back down (iCD)."""
    trailing = {**SD, "clip_sample": False, "timestep_spacing": "trailing"}
    down = {"timesteps": (999.0, 749.0, 499.0, 249.0), "endpoints": (749.0, 499.0, 249.0, 0.0), "grid": None}
    yield vp_case("ddim", "DDIMScheduler", "endpoints as the grid", 4, trailing, sampler=down)
    up, back = (19.0, 259.0, 519.0, 779.0), (259.0, 519.0, 779.0, 999.0)
    for name, timesteps, endpoints, init in (
        ("up", up, back, Init("input", channels=3, noised=True)),
        ("down", back[::-1], (*up[:0:-1], 0.0), Init(channels=3)),
    ):
        options = {"timesteps": timesteps, "endpoints": endpoints, "noise_schedule": schedule(SD)}
        yield Case(f"ddim endpoints {name}", Sampler("ddim", 4, (4,), **options), 4, "ddim_jumps", init=init)
    tuned = {"timesteps": back[::-1], "time_tuned": (990.0, 700.5, 480.0, 300.0), "noise_schedule": schedule(SD)}
    yield Case("ddim other times", Sampler("ddim", 4, (4,), **tuned), 4, "ddim_jumps")


def _ddpm() -> Iterator[Case]:
    def make(name: str, steps: int, config: Mapping[str, Any], **options: Any) -> Case:
        config = {**SD, "clip_sample": False, **config}
        return vp_case("ddpm", "DDPMScheduler", name, steps, config, **options)

    for n in range(1, 9):
        yield make(f"trailing {n}", n, {"timestep_spacing": "trailing"})
        yield make(f"leading {n}", n, {"timestep_spacing": "leading", "steps_offset": 1})
    yield make("linspace 5", 5, {"timestep_spacing": "linspace"})
    for prediction in ("v_prediction", "sample"):
        yield make(prediction, 6, {"timestep_spacing": "trailing", "prediction_type": prediction})
    v = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    yield make("v zero SNR", 6, v)
    clip = {**COSINE, "timestep_spacing": "leading", "clip_sample": True}
    yield make("cosine clip", 10, clip, sampler={"clip": 1.0})
    given = (999, 700, 420, 60, 3)
    listed = {"sampler": {"timesteps": given, "grid": None}, "set_timesteps": {"timesteps": list(given)}}
    yield make("list", 5, {}, **listed)
    for strength in (0.5, 0.8, 1.0):
        yield make(f"picture {strength}", 5, {"timestep_spacing": "trailing"}, strength=strength)
    betas = (7e-6, 1.4e-4, 2.1e-3, 2.8e-2, 0.35, 0.7)
    sampler = Sampler(
        "ddpm",
        6,
        (6,),
        noise_schedule=NoiseSchedule(betas=betas),
        grid=Grid("trailing"),
        time="sqrt_alpha_cumprod",
        clip_out=1.0,
    )
    yield Case("ddpm WaveGrad", sampler, 6, "wavegrad")
    betas = (0.02, 0.05, 0.1, 0.2, 0.35, 0.7)  # large enough for the float32 of DDPMScheduler
    trained = {"trained_betas": list(betas), "num_train_timesteps": 6, "clip_sample": False}
    plain = {"noise_schedule": NoiseSchedule(betas=betas), "grid": Grid("leading")}
    yield Case(
        "ddpm own betas", Sampler("ddpm", 6, (6,), **plain), 6, "DDPMScheduler", trained, {"num_inference_steps": 6}
    )


def _dpmpp() -> Iterator[Case]:
    def make(name: str, steps: int, config: Mapping[str, Any], **options: Any) -> Case:
        return vp_case("dpmpp_2m", "DPMSolverMultistepScheduler", name, steps, {**SD, **config}, **options)

    for n in range(1, 9):
        yield make(f"trailing {n}", n, {"timestep_spacing": "trailing"})
        yield make(f"leading {n}", n, {"timestep_spacing": "leading", "steps_offset": 1})
        yield make(f"linspace {n}", n, {"timestep_spacing": "linspace"})
    yield make("trailing 20", 20, {"timestep_spacing": "trailing"})
    for lower in (True, False):
        ends = {"lower_order_final": lower, "euler_at_final": not lower, "timestep_spacing": "trailing"}
        yield make(f"lower order at the end {lower}", 6, ends)
    for prediction in ("v_prediction", "sample"):
        yield make(prediction, 6, {"timestep_spacing": "trailing", "prediction_type": prediction})
    v = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    yield make("v zero SNR", 6, v)
    yield make("linear betas", 6, {**LINEAR, "timestep_spacing": "leading"})
    for strength in (0.3, 0.5, 0.8, 1.0):
        yield make(f"picture {strength}", 6, {"timestep_spacing": "trailing"}, strength=strength)


def vp_cases() -> Iterator[Case]:
    """All of them."""
    for cases in (_lcm, _tcd, _ddim, _jumps, _ddpm, _dpmpp):
        yield from cases()
