"""From a diffusers scheduler_config.json to a Sampler: known fields are read, others must have their plain value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from edgekit.bundle.recipe import Grid, NoiseSchedule, Sampler
from edgekit.errors import UnsupportedModel
from edgekit.export.sources import Source

Config = Mapping[str, Any]

SIGMA_TRICKS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def scheduler_config(source: Source) -> dict[str, Any]:
    """The folder's scheduler_config.json. Raises BadSource."""
    return source.config("scheduler", "scheduler_config.json")


def refuse(where: str, config: Config, plain: Mapping[str, tuple[Any, ...]]) -> None:
    """Insist that fields hold values we model; a field that is absent is taken as its first value.

    Raises:
        UnsupportedModel: naming the field, its value and what is modelled.
    """
    for key, allowed in plain.items():
        value = config.get(key, allowed[0])
        if isinstance(value, list):
            value = tuple(value)
        if value not in allowed:
            known = " or ".join(repr(each) for each in allowed)
            raise UnsupportedModel(f"{where}: {key} is {value!r}; only {known} is exported")


def noise_schedule(config: Config, beta_start: float, beta_end: float, kind: str) -> NoiseSchedule:
    """The training noise schedule; the last three arguments are the scheduler class's own defaults."""
    refuse("scheduler", config, {"trained_betas": (None,), "beta_schedule": (kind, *SCHEDULES)})
    return NoiseSchedule(
        kind=config.get("beta_schedule", kind),
        beta_start=float(config.get("beta_start", beta_start)),
        beta_end=float(config.get("beta_end", beta_end)),
        n=int(config.get("num_train_timesteps", 1000)),
        zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )


def lcm_sampler(config: Config, legal_steps: tuple[int, ...], steps: int) -> Sampler:
    """LCMScheduler (Luo et al. 2023): consistency steps on a subset of the distillation grid.

    Raises:
        UnsupportedModel: a field we do not model.
    """
    refuse("scheduler", config, {"thresholding": (False,), "prediction_type": PREDICTIONS})
    return Sampler(
        kind="lcm",
        steps=steps,
        legal_steps=legal_steps,
        prediction=config.get("prediction_type", "epsilon"),
        noise_schedule=noise_schedule(config, 0.00085, 0.012, "scaled_linear"),
        grid=Grid(spacing="lcm", original=int(config.get("original_inference_steps", 50))),
        timestep_scaling=float(config.get("timestep_scaling", 10.0)),
        clip=float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", False) else None,
    )


def tcd_sampler(config: Config, legal_steps: tuple[int, ...], steps: int, gamma: float) -> Sampler:
    """TCDScheduler (Zheng et al. 2024): LCM's grid; `gamma`, diffusers' `eta` at run time, is no field of the config.

    Raises:
        UnsupportedModel: a field we do not model.
    """
    base = lcm_sampler(config, legal_steps, steps)  # the same fields, with the same defaults
    return msgspec.structs.replace(base, kind="tcd", gamma=gamma, timestep_scaling=10.0)


def ddim_sampler(config: Config, legal_steps: tuple[int, ...], steps: int) -> Sampler:
    """DDIMScheduler without noise (Song et al. 2021) on a trailing grid (Lin et al. 2024).

    Raises:
        UnsupportedModel: a field we do not model.
    """
    plain: dict[str, tuple[Any, ...]] = {"prediction_type": PREDICTIONS, "thresholding": (False,)}
    refuse("scheduler", config, {**plain, "timestep_spacing": ("trailing",)})
    return Sampler(
        kind="ddim",
        steps=steps,
        legal_steps=legal_steps,
        prediction=config.get("prediction_type", "epsilon"),
        noise_schedule=noise_schedule(config, 0.0001, 0.02, "linear"),
        grid=Grid(spacing="trailing"),
        clip=float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else None,
        final_alpha_one=bool(config.get("set_alpha_to_one", True)),
    )


def euler_sampler(config: Config, legal_steps: tuple[int, ...], steps: int) -> Sampler:
    """EulerDiscreteScheduler or EulerAncestralDiscreteScheduler on a trailing grid (Sauer et al. 2023, ADD).

    Raises:
        UnsupportedModel: a field we do not model.
    """
    ancestral = config["_class_name"] == "EulerAncestralDiscreteScheduler"
    plain: dict[str, tuple[Any, ...]] = {"prediction_type": PREDICTIONS, "timestep_spacing": ("trailing",)}
    if not ancestral:
        plain |= dict.fromkeys(SIGMA_TRICKS, (False, None))
        plain |= {"interpolation_type": ("linear",), "timestep_type": ("discrete",), "final_sigmas_type": ("zero",)}
        plain |= {"sigma_min": (None,), "sigma_max": (None,)}
    refuse("scheduler", config, {**plain, "rescale_betas_zero_snr": (False,)})
    return Sampler(
        kind="euler_ancestral" if ancestral else "euler",
        steps=steps,
        legal_steps=legal_steps,
        prediction=config.get("prediction_type", "epsilon"),
        noise_schedule=noise_schedule(config, 0.0001, 0.02, "linear"),
        grid=Grid(spacing="trailing"),
    )


def flow_lcm_sampler(config: Config, legal_steps: tuple[int, ...], steps: int) -> Sampler:
    """FlowMatchLCMScheduler: x' = (1 - sigma') (x - sigma m) + sigma' z on the flow-matching grid.

    Raises:
        UnsupportedModel: a field we do not model.
    """
    plain: dict[str, tuple[Any, ...]] = dict.fromkeys(SIGMA_TRICKS, (False, None))
    plain |= {"use_dynamic_shifting": (False,), "invert_sigmas": (False,), "shift_terminal": (None,)}
    refuse("scheduler", config, {**plain, "num_train_timesteps": (1000,), "scale_factors": (None,)})
    return Sampler(
        kind="flow_stochastic",
        steps=steps,
        legal_steps=legal_steps,
        prediction="flow",
        grid=Grid(spacing="flow"),
        shift=float(config.get("shift", 1.0)),
    )
