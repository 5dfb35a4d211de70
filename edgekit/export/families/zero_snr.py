"""Models trained to zero terminal signal (Lin et al. 2024): v-prediction, DDIM on a trailing grid, rescaled guidance.

The undistilled contract, for a few tens of steps; diffusers' pipelines leave the rescaling to the caller, the paper
recommends 0.7.
"""

from __future__ import annotations

from edgekit.bundle.recipe import Recipe
from edgekit.export.families import Family
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.families.hyper_sd import trailing
from edgekit.export.families.schedulers import ddim_sampler, refuse, scheduler_config
from edgekit.export.sources import Source

LEGAL_STEPS = (5, 10, 15, 20, 25, 30, 40, 50)
SCALE, MOST, RESCALE = 7.5, 20.0, 0.7


def matches(source: Source) -> bool:
    """DDIM on a trailing grid of a schedule rescaled to zero terminal signal."""
    return trailing(source) and bool(scheduler_config(source).get("rescale_betas_zero_snr", False))


def recipe(source: Source) -> Recipe:
    """Twenty-five steps by default. Raises BadSource, UnsupportedModel: a prediction that is undefined at no signal."""
    config = scheduler_config(source)
    refuse("scheduler (rescale_betas_zero_snr)", config, {"prediction_type": ("v_prediction", "sample")})
    sd.no_embedding(source, "DDIMScheduler")
    sampler = ddim_sampler(config, LEGAL_STEPS, steps=25)
    return sd.recipe(source, sampler, sd.guided(source, SCALE, MOST, rescale=RESCALE))


FAMILY = Family("zero-snr", "text-to-image", matches, recipe, sd.jobs, sd.tokenizers)
