"""What a sampler's case is: our recipe, the reference it is held against, and our side of it.

The denoiser is a cheap float32 stand-in that depends on sample and time without being linear in either.
"""

from __future__ import annotations

from collections.abc import Mapping
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
# Where a scheduler subtracts large numbers in float32 (k-diffusion's at sigma 4096 or 700) or divides small ones by
# sigma (Heun's last leg), it is this far off a float64 run of its own formulas, which the tables equal to BOUND.
CANCELLING = {
    "euler v zero SNR": 1e-4,
    "euler_ancestral v zero SNR": 1e-4,
    "euler karras 1": 5e-4,
    "euler karras 2": 5e-4,
    "flow_heun 2 shift 1.0": 3e-5,
    "flow_heun 3 shift 1.0": 3e-5,
}

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}
IMG2IMG = {
    "flow": "StableDiffusion3Img2ImgPipeline",
    "vp": "StableDiffusionImg2ImgPipeline",
    "trig": "SanaSprintImg2ImgPipeline",
}
NOISE = Init(channels=3)


@dataclass(frozen=True)
class Case:
    """One sampler at one step count: our recipe, and the reference with its arguments.

    `scheduler` is a class of diffusers, or one of closed_forms.py.
    """

    name: str
    sampler: Sampler
    steps: int
    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    set_timesteps: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    strength: float | None = None
    tail: str | None = None  # the diffusers pipeline whose `get_timesteps` cuts the grid; None: the scheduler does
    init: Init = NOISE

    @property
    def bound(self) -> float:
        """How far from the reference we may be, of max|x|."""
        return CANCELLING.get(self.name, BOUND)


def net(x: F32, t: float) -> F32:
    """The stand-in denoiser."""
    mix = 0.4 * np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    return np.tanh(np.einsum("oc,bchw->bohw", mix, x) + np.float32(np.sin(t * 0.01))).astype(np.float32)


def picture() -> F32:
    """What image-to-image starts from."""
    return np.random.default_rng(1).uniform(-1, 1, SHAPE).astype(np.float32)


def stage(sampler: Sampler, init: Init = NOISE) -> Stage:
    """A stage around a sampler; only sampler and start matter to a table."""
    return Stage("main", init, sampler, Denoise("net", {"x": "@x", "t": "@t"}, "m"))


def draw(sampler: Sampler, table: Table) -> F32:
    """Our side: the table on the stand-in denoiser, with torch's noise."""
    noise = TorchNoise(SEED)
    x = table.init_keep * picture()
    if table.init_scale:  # the runtime draws no noise that nobody uses, and torch's next draw is then another
        x = x + table.init_scale * noise.normal(SHAPE, 0)
    *_, last = linear(
        table.rows,
        x.astype(np.float32),
        lambda x, row: net(x, table.rows[row][0]),
        lambda row: noise.normal(SHAPE, 1 + row),
        clip=sampler.clip,
        clip_out=sampler.clip_out,
    )
    drawn: F32 = last.x
    return drawn


def ours(case: Case) -> F32:
    """Our side of a case."""
    return draw(case.sampler, compile_stage(stage(case.sampler, case.init), case.steps, case.strength))


def schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The training schedule a scheduler configuration names."""
    renamed = {"beta_schedule": "kind", "num_train_timesteps": "n", "rescale_betas_zero_snr": "zero_snr"}
    known = {renamed.get(key, key): value for key, value in config.items()}
    return NoiseSchedule(
        **{key: known[key] for key in ("kind", "beta_start", "beta_end", "n", "zero_snr") if key in known}
    )


def vp_case(kind: str, scheduler: str, name: str, steps: int, config: Mapping[str, Any], **options: Any) -> Case:
    """A case of a variance-preserving scheduler, whose grid and prediction are in its configuration."""
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
        options.pop("set_timesteps", {"num_inference_steps": steps}),
        **options,
    )


GRIDS = {
    "edm_consistency": Grid("karras", original=40),
    "trig_consistency": Grid("linspace"),
    "residual_shift": None,
    "brownian_bridge": None,
    "one_step": None,
}


def plain(kind: str, steps: int = 4, **options: object) -> Sampler:
    """A plain sampler of any kind."""
    flow = kind.startswith("flow")
    usual: dict[str, object] = {"prediction": "flow" if flow else "epsilon", "noise_schedule": NoiseSchedule()}
    if kind in ("residual_shift", "brownian_bridge"):
        usual["prediction"] = "sample"
    usual["grid"] = GRIDS.get(kind, Grid("flow" if flow else "trailing"))
    return Sampler(kind, steps, (steps,), **{**usual, **options})  # type: ignore[arg-type]
