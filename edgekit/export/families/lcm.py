"""Latent consistency models (Luo et al. 2023): LCMScheduler, one to eight steps.

Two forms: guidance distilled into the UNet, which is told the scale by a w-embedding (LatentConsistencyModelPipeline),
and LCM-LoRA merged or folded into a plain UNet, which needs no guidance (scale 1) and bears a little (up to 2).
"""

from __future__ import annotations

from edgekit.bundle.recipe import Guidance, Recipe
from edgekit.errors import UnsupportedModel
from edgekit.export.families import Family
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.families.schedulers import lcm_sampler, scheduler_config
from edgekit.export.families.unets import unet_config
from edgekit.export.sources import Source

PIPELINES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", *sd.PIPELINES)
LEGAL_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
SCALE = 8.5  # LatentConsistencyModelPipeline's default
MOST = 2.0  # what LCM-LoRA bears


def matches(source: Source) -> bool:
    """A Stable Diffusion pipeline whose scheduler is LCMScheduler."""
    return source.index.get("_class_name") in PIPELINES and source.class_of("scheduler") == "LCMScheduler"


def recipe(source: Source) -> Recipe:
    """Four steps by default. Raises BadSource, UnsupportedModel."""
    sampler = lcm_sampler(scheduler_config(source), LEGAL_STEPS, steps=4)
    return sd.recipe(source, sampler, _guidance(source))


def _guidance(source: Source) -> Guidance:
    width = unet_config(source).get("time_cond_proj_dim")
    if width:  # the pipelines embed scale - 1
        return Guidance(kind="w_embedding", scale=SCALE, dim=width, shift=-1.0, minimum=1.0, maximum=30.0)
    if str(source.index["_class_name"]).startswith("LatentConsistencyModel"):
        raise UnsupportedModel(
            "unet.time_cond_proj_dim is null in a LatentConsistencyModelPipeline, which embeds the guidance scale; "
            "save a UNet without that embedding as a StableDiffusionPipeline with LCMScheduler"
        )
    return sd.guided(source, scale=1.0, maximum=MOST)


FAMILY = Family(
    "lcm", "text-to-image", matches, recipe, sd.jobs, sd.tokenizers, distils={"_class_name": "LCMScheduler"}
)
