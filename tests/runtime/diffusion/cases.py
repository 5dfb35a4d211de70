"""Every sampler beside the diffusers scheduler it stands for: one table of configurations, and our side of each.

The denoiser is a cheap float32 stand-in that depends on sample and time without being linear in either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings

from edgekit.bundle.recipe import Denoise, Grid, Init, NoiseSchedule, Sampler, Stage, Table
from edgekit.runtime.diffusion.kernels import linear
from edgekit.runtime.diffusion.tables import compile_stage
from edgekit.runtime.random import TorchNoise

F32 = npt.NDArray[np.float32]

LAW = settings(max_examples=40, deadline=None)  # of property tests: the machine may be busy

SHAPE, SEED = (2, 3, 5, 5), 7  # 150 values: no multiple of sixteen, so torch's redrawn tail is in every draw
GOLDEN = Path(__file__).parents[2] / "golden" / "samplers.npz"
BOUND = 5e-6  # of max|x|
# k-diffusion schedulers start zero-SNR models at sigma 4096 and subtract numbers of that size in float32: against a
# float64 run of the same formulas they are off by 6e-5, the tables by 1e-7.
CANCELLING = 1e-4

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}
IMG2IMG = {"flow": "StableDiffusion3Img2ImgPipeline", "vp": "StableDiffusionImg2ImgPipeline"}


@dataclass(frozen=True)
class Case:
    """One sampler at one step count: our recipe, and the scheduler with its arguments."""

    name: str
    sampler: Sampler
    steps: int
    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    set_timesteps: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    strength: float | None = None
    tail: str | None = None  # the diffusers pipeline whose `get_timesteps` cuts the grid; None: the scheduler does

    @property
    def bound(self) -> float:
        """How far from the reference we may be, of max|x|."""
        return CANCELLING if self.name.startswith("euler") and "zero SNR" in self.name else BOUND


def net(x: F32, t: float) -> F32:
    """The stand-in denoiser."""
    mix = 0.4 * np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    return np.tanh(np.einsum("oc,bchw->bohw", mix, x) + np.float32(np.sin(t * 0.01))).astype(np.float32)


def picture() -> F32:
    """What image-to-image starts from."""
    return np.random.default_rng(1).uniform(-1, 1, SHAPE).astype(np.float32)


def stage(sampler: Sampler) -> Stage:
    """A stage around a sampler; only the sampler matters to a table."""
    return Stage("main", Init(channels=3), sampler, Denoise("net", {"x": "@x", "t": "@t"}, "m"))


def draw(sampler: Sampler, table: Table, strength: float | None = None) -> F32:
    """Our side: the table on the stand-in denoiser, with torch's noise."""
    noise = TorchNoise(SEED)
    x = table.init_scale * noise.normal(SHAPE, 0)
    if strength is not None:
        x = table.init_keep * picture() + x
    *_, (last, _) = linear(table.rows, x, net, lambda row: noise.normal(SHAPE, 1 + row), sampler.clip)
    return last


def ours(case: Case) -> F32:
    """Our side of a case."""
    return draw(case.sampler, compile_stage(stage(case.sampler), case.steps, case.strength), case.strength)


def schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The training schedule a scheduler configuration names."""
    renamed = {"beta_schedule": "kind", "num_train_timesteps": "n", "rescale_betas_zero_snr": "zero_snr"}
    known = {renamed.get(key, key): value for key, value in config.items()}
    return NoiseSchedule(
        **{key: known[key] for key in ("kind", "beta_start", "beta_end", "n", "zero_snr") if key in known}
    )


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


def _vp(kind: str, scheduler: str, name: str, steps: int, config: Mapping[str, Any], **options: Any) -> Case:
    sampler = {"grid": Grid(config.get("timestep_spacing", "lcm"), offset=config.get("steps_offset", 0))}
    sampler |= {"prediction": config.get("prediction_type", "epsilon"), **options.pop("sampler", {})}
    if options.get("strength") is not None:
        options["tail"] = IMG2IMG["vp"]
    return Case(
        f"{kind} {name}",
        Sampler(kind, steps, (steps,), noise_schedule=schedule(config), **sampler),  # type: ignore[arg-type]
        steps,
        scheduler,
        config,
        {"num_inference_steps": steps},
        **options,
    )


def _tcd() -> Iterator[Case]:
    for n in range(1, 9):
        for gamma in (0.0, 0.3, 1.0):
            yield _vp("tcd", "TCDScheduler", f"{n} gamma {gamma}", n, SD, sampler={"gamma": gamma}, step={"eta": gamma})
    for prediction in ("v_prediction", "sample"):
        yield _vp("tcd", "TCDScheduler", prediction, 4, {**SD, "prediction_type": prediction}, step={"eta": 0.3})
    for strength in (0.5, 0.8, 1.0):
        yield _vp("tcd", "TCDScheduler", f"picture {strength}", 4, SD, step={"eta": 0.3}, strength=strength)


def _ddim() -> Iterator[Case]:
    def make(name: str, steps: int, config: Mapping[str, Any], **options: Any) -> Case:
        return _vp("ddim", "DDIMScheduler", name, steps, {**SD, "clip_sample": False, **config}, **options)

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


def _sigma(kind: str, scheduler: str) -> Iterator[Case]:
    for n in range(1, 9):
        yield _vp(kind, scheduler, f"trailing {n}", n, {**SD, "timestep_spacing": "trailing"})
    for spacing, offset in (("leading", 1), ("linspace", 0)):
        config = {**SD, "timestep_spacing": spacing, "steps_offset": offset}
        yield _vp(kind, scheduler, spacing, 5, config)
    v = {**SD, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    yield _vp(kind, scheduler, "v", 4, v)
    yield _vp(kind, scheduler, "v zero SNR", 4, {**v, "rescale_betas_zero_snr": True})
    if kind == "euler":
        yield _vp(kind, scheduler, "sample", 4, {**SD, "timestep_spacing": "trailing", "prediction_type": "sample"})
    for n, strength in ((2, 0.5), (4, 0.3), (4, 1.0)):
        config = {**SD, "timestep_spacing": "trailing"}
        yield _vp(kind, scheduler, f"picture {strength} of {n}", n, config, strength=strength)


def _flow(kind: str, scheduler: str) -> Iterator[Case]:
    def make(name: str, steps: int, shift: float, strength: float | None = None, sigmas: Any = None) -> Case:
        sampler = Sampler(
            kind,  # type: ignore[arg-type]
            steps,
            (steps,),
            prediction="flow",
            grid=None if sigmas else Grid("flow"),
            sigmas=sigmas,
            shift=shift,
        )
        points = {"sigmas": list(sigmas)} if sigmas else {}
        return Case(
            f"{kind} {name}",
            sampler,
            steps,
            scheduler,
            {"shift": shift},
            {"num_inference_steps": steps, **points},
            strength=strength,
            tail=None if strength is None else IMG2IMG["flow"],
        )

    for n in range(1, 9):
        for shift in (1.0, 3.0):
            yield make(f"{n} shift {shift}", n, shift)
    yield make("list", 4, 3.0, sigmas=(1.0, 0.75, 0.5, 0.25))
    for n, strength in ((4, 0.3), (4, 0.8), (4, 1.0), (1, 0.5)):
        yield make(f"picture {strength} of {n}", n, 3.0, strength)


def _one_step() -> Iterator[Case]:
    for prediction in ("epsilon", "v_prediction", "sample"):
        config = {**SD, "prediction_type": prediction, "timestep_spacing": "trailing", "clip_sample": False}
        yield _vp("one_step", "DDIMScheduler", prediction, 1, config, sampler={"grid": None})
    flow = Sampler("one_step", 1, (1,), prediction="flow")
    yield Case("one_step flow", flow, 1, "FlowMatchEulerDiscreteScheduler", {}, {"num_inference_steps": 1})


CASES = {
    case.name: case
    for cases in (
        _lcm(),
        _tcd(),
        _ddim(),
        _sigma("euler", "EulerDiscreteScheduler"),
        _sigma("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        _flow("flow_euler", "FlowMatchEulerDiscreteScheduler"),
        _flow("flow_stochastic", "FlowMatchLCMScheduler"),
        _one_step(),
    )
    for case in cases
}
