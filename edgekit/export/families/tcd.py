"""Trajectory consistency distillation (Zheng et al. 2024): TCDScheduler, one to eight steps.

`gamma` says how much noise a step puts back. Guidance is off by default, and up to 2 as for LCM-LoRA.
"""

from __future__ import annotations

from edgekit.bundle.recipe import Recipe
from edgekit.export.families import Family
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.families.schedulers import scheduler_config, tcd_sampler
from edgekit.export.sources import Source

LEGAL_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
GAMMA = 0.3  # TCDScheduler's default, and what TCD's authors recommend for few steps
MOST = 2.0
DISTILS = {"_class_name": "TCDScheduler"}


def matches(source: Source) -> bool:
    """A Stable Diffusion pipeline whose scheduler is TCDScheduler."""
    return sd.scheduled(source, "TCDScheduler")


def recipe(source: Source) -> Recipe:
    """Four steps by default. Raises BadSource, UnsupportedModel."""
    return recipe_with(source, GAMMA)


def recipe_with(source: Source, gamma: float) -> Recipe:
    """The same with another gamma. Raises BadSource, UnsupportedModel."""
    sd.no_embedding(source, "TCDScheduler")
    sampler = tcd_sampler(scheduler_config(source), LEGAL_STEPS, steps=4, gamma=gamma)
    return sd.recipe(source, sampler, sd.guided(source, scale=1.0, maximum=MOST))


FAMILY = Family("tcd", "text-to-image", matches, recipe, sd.jobs, sd.tokenizers, distils=DISTILS)
