"""Distribution matching distillation 2 (Yin et al. 2024) and PSO: LCMScheduler at four timesteps of their own.

The list is no field of a scheduler's config, so that the folder is LCM's: only `--family dmd2` tells them apart.
"""

from __future__ import annotations

from edgekit.bundle.recipe import Guidance, Recipe
from edgekit.export.families import Family
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.families.schedulers import lcm_sampler, scheduler_config
from edgekit.export.sources import Source

TIMESTEPS = (999.0, 749.0, 499.0, 249.0)


def scheduled(source: Source) -> bool:
    """A Stable Diffusion pipeline whose scheduler is LCMScheduler."""
    return sd.scheduled(source, "LCMScheduler")


def recipe(source: Source) -> Recipe:
    """Four steps, no guidance. Raises BadSource, UnsupportedModel."""
    sd.no_embedding(source, "DMD2's list of timesteps")
    sampler = lcm_sampler(scheduler_config(source), (4,), steps=4)
    return sd.recipe(source, sd.with_timesteps(sampler, *TIMESTEPS), Guidance(kind="none"))


FAMILY = Family(
    "dmd2",
    "text-to-image",
    matches=lambda _: False,
    recipe=recipe,
    jobs=sd.jobs,
    tokenizers=sd.tokenizers,
    by_name=scheduled,
    distils={"_class_name": "LCMScheduler"},
)
