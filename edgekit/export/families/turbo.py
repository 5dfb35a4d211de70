"""SD-Turbo and SDXL-Turbo (adversarial diffusion distillation, Sauer et al. 2023): one to four Euler steps, unguided.

A folder is one of these when its scheduler is Euler or Euler ancestral on a *trailing* grid: the undistilled models
use leading or linspace grids, on which a one-step sample would start below full noise.
"""

from __future__ import annotations

from edgekit.bundle.recipe import Guidance, Recipe
from edgekit.errors import UnsupportedModel
from edgekit.export.families import Family
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.families.parts import unet_config
from edgekit.export.families.schedulers import euler_sampler, scheduler_config
from edgekit.export.sources import Source

SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
LEGAL_STEPS = (1, 2, 3, 4)


def matches(source: Source) -> bool:
    """A Stable Diffusion pipeline with an Euler scheduler on a trailing grid."""
    known = source.index.get("_class_name") in (*sd.PIPELINES, *sd.IMG2IMG)
    if not known or source.class_of("scheduler") not in SCHEDULERS:
        return False
    return scheduler_config(source).get("timestep_spacing") == "trailing"


def recipe(source: Source) -> Recipe:
    """One step by default, no guidance. Raises BadSource, UnsupportedModel."""
    if unet_config(source).get("time_cond_proj_dim"):
        raise UnsupportedModel(
            "unet.time_cond_proj_dim is set: a guidance embedding belongs to LCMScheduler, not Euler"
        )
    sampler = euler_sampler(scheduler_config(source), LEGAL_STEPS, steps=1)
    return sd.recipe(source, sampler, Guidance(kind="none"))


FAMILY = Family("turbo", "text-to-image", matches, recipe, sd.jobs, sd.tokenizers)
