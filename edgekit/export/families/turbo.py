"""SD-Turbo and SDXL-Turbo (adversarial diffusion distillation, Sauer et al. 2023): one to four Euler steps, unguided.

A folder is one of these when its scheduler is Euler or Euler ancestral on a *trailing* grid: the undistilled models
use leading or linspace grids, on which a one-step sample would start below full noise. What looks like SDXL-Lightning
(SDXL with plain Euler, or a UNet that predicts the sample) is left to that family, unless this one is asked for.
"""

from __future__ import annotations

from edgekit.bundle.recipe import Guidance, Recipe
from edgekit.export.families import Family, lightning
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.families.schedulers import euler_sampler, scheduler_config
from edgekit.export.sources import Source

SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
LEGAL_STEPS = (1, 2, 3, 4)


def trailing(source: Source) -> bool:
    """A Stable Diffusion pipeline with an Euler scheduler on a trailing grid."""
    if not sd.scheduled(source, *SCHEDULERS):
        return False
    return scheduler_config(source).get("timestep_spacing") == "trailing"


def matches(source: Source) -> bool:
    """The same, if it is none of `lightning`'s."""
    return trailing(source) and not lightning.matches(source)


def recipe(source: Source) -> Recipe:
    """One step by default, no guidance. Raises BadSource, UnsupportedModel."""
    sd.no_embedding(source, "Euler")
    sampler = euler_sampler(scheduler_config(source), LEGAL_STEPS, steps=1)
    return sd.recipe(source, sampler, Guidance(kind="none"))


FAMILY = Family("turbo", "text-to-image", matches, recipe, sd.jobs, sd.tokenizers, by_name=trailing)
