"""SDXL-Lightning (Lin et al. 2024): Euler on a trailing grid, without guidance; one UNet or LoRA per step count.

The UNet for one step predicts the clean sample, those for 2, 4 and 8 the noise. SDXL with plain Euler on a trailing
grid is taken for one of these (SDXL-Turbo has the ancestral kind); `turbo` can be asked for by name.
"""

from __future__ import annotations

from edgekit.bundle.recipe import Guidance, Recipe
from edgekit.export.families import Family
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.families.parts import text_encoders
from edgekit.export.families.schedulers import euler_sampler, scheduler_config
from edgekit.export.sources import Source

LEGAL_STEPS = (1, 2, 4, 8)


def trailing(source: Source) -> bool:
    """A Stable Diffusion pipeline with plain Euler on a trailing grid."""
    if not sd.scheduled(source, "EulerDiscreteScheduler"):
        return False
    return scheduler_config(source).get("timestep_spacing") == "trailing"


def matches(source: Source) -> bool:
    """The same, of SDXL or of a UNet that predicts the sample."""
    if not trailing(source):
        return False
    return len(text_encoders(source)) == 2 or scheduler_config(source).get("prediction_type") == "sample"


def recipe(source: Source) -> Recipe:
    """Four steps by default; one where the sample is predicted. Raises BadSource, UnsupportedModel."""
    sd.no_embedding(source, "Euler")
    config = scheduler_config(source)
    one = config.get("prediction_type") == "sample"
    sampler = euler_sampler(config, (1,) if one else LEGAL_STEPS, steps=1 if one else 4)
    return sd.recipe(source, sampler, Guidance(kind="none"))


FAMILY = Family(
    "lightning",
    "text-to-image",
    matches,
    recipe,
    sd.jobs,
    sd.tokenizers,
    by_name=trailing,
    distils={"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
)
