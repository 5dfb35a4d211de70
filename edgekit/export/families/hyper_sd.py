"""Hyper-SD's LoRAs for one step count each (Ren et al. 2024): DDIM without noise on a trailing grid.

Guidance is off by default; the LoRAs that preserve it take 5 to 8.
"""

from __future__ import annotations

from edgekit.bundle.recipe import Recipe
from edgekit.export.families import Family
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.families.schedulers import ddim_sampler, scheduler_config
from edgekit.export.sources import Source

LEGAL_STEPS = (1, 2, 4, 8, 12, 16)
MOST = 8.0
DISTILS = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}


def trailing(source: Source) -> bool:
    """A Stable Diffusion pipeline with DDIM on a trailing grid."""
    return sd.scheduled(source, "DDIMScheduler") and scheduler_config(source).get("timestep_spacing") == "trailing"


def matches(source: Source) -> bool:
    """DDIM on a trailing grid, of a schedule that ends before zero signal."""
    return trailing(source) and not scheduler_config(source).get("rescale_betas_zero_snr", False)


def recipe(source: Source) -> Recipe:
    """Four steps by default. Raises BadSource, UnsupportedModel."""
    sd.no_embedding(source, "DDIMScheduler")
    sampler = ddim_sampler(scheduler_config(source), LEGAL_STEPS, steps=4)
    return sd.recipe(source, sampler, sd.guided(source, scale=1.0, maximum=MOST))


FAMILY = Family("hyper-sd", "text-to-image", matches, recipe, sd.jobs, sd.tokenizers, distils=DISTILS)
