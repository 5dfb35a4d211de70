"""What the families of diffusion transformers share: a denoiser's job on whole patches, and flow samplers."""

from __future__ import annotations

from typing import Any

import msgspec

from edgekit.bundle.manifest import TensorSpec
from edgekit.bundle.recipe import Grid, Init, Sampler
from edgekit.export.families import PartJob
from edgekit.export.families.parts import BATCH, TIME, f32
from edgekit.export.families.schedulers import SIGMA_TRICKS, refuse
from edgekit.export.sources import Source

NETWORKS = "edgekit.export.families.networks_dit"
PART = "transformer"

# Latent sides of the three probes, all of whole 2 x 2 patches; the first is traced and is not square.
HEIGHT, WIDTH = (6, 8, 4), (10, 8, 12)
FLOW_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)


def denoiser_job(
    network: str,
    channels: int,
    inputs: tuple[TensorSpec, ...],
    *,
    gives: int | None = None,
    fill: dict[str, tuple[float, float]] | None = None,
) -> PartJob:
    """The graph of a pipeline's `transformer`: a latent and float32 time (batch,), then `inputs`, to `out_sample`.

    Args:
        network: `module:attribute` of the torch-side builder.
        channels: of the latent.
        inputs: conditions.
        gives: channels of the prediction, if others.
        fill: bounds of inputs that are no unit normals, as in PartJob.
    """
    return PartJob(
        part=PART,
        network=network,
        folder="transformer",
        inputs=(f32("sample", "batch", channels, "height", "width"), f32("timestep", "batch"), *inputs),
        outputs=(f32("out_sample", "batch", gives or channels, "height", "width"),),
        sizes={"batch": BATCH, "height": HEIGHT, "width": WIDTH},
        fill={"timestep": TIME, **(fill or {})},
        lora="transformer",
    )


def in_patches(init: Init, size: int) -> Init:
    """A start whose latent has whole patches of `size` latent pixels each way."""
    return msgspec.structs.replace(init, multiple=size)


def flow_sampler(source: Source, grid: str, legal_steps: tuple[int, ...], steps: int) -> Sampler:
    """FlowMatchEulerDiscreteScheduler: Euler steps along a rectified flow.

    Args:
        source: the model folder.
        grid: `flow` where the pipeline leaves sigmas to the scheduler, `uniform` where it asks for 1 - i / n.
        legal_steps: step counts of the contract.
        steps: the default.

    Raises:
        BadSource: no config. UnsupportedModel: a field we do not model.
    """
    config: dict[str, Any] = source.config("scheduler", "scheduler_config.json")
    plain: dict[str, tuple[Any, ...]] = dict.fromkeys(SIGMA_TRICKS, (False, None))
    plain |= {"use_dynamic_shifting": (False,), "invert_sigmas": (False,), "shift_terminal": (None,)}
    plain |= {"num_train_timesteps": (1000,), "stochastic_sampling": (False,)}
    refuse("scheduler", config, plain)
    return Sampler(
        kind="flow_euler",
        steps=steps,
        legal_steps=legal_steps,
        prediction="flow",
        grid=Grid(spacing=grid),  # type: ignore[arg-type] # one of two words above
        shift=float(config.get("shift", 1.0)),
    )
