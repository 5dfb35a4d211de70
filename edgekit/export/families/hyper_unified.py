"""Hyper-SD's unified LoRA (Ren et al. 2024): TCD with gamma 1, one to eight steps from one set of weights.

Its folder is TCD's: only `--family hyper-sd-unified` tells them apart.
"""

from __future__ import annotations

from edgekit.bundle.recipe import Recipe
from edgekit.export.families import Family, tcd
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.sources import Source

GAMMA = 1.0


def recipe(source: Source) -> Recipe:
    """Four steps by default. Raises BadSource, UnsupportedModel."""
    return tcd.recipe_with(source, GAMMA)


FAMILY = Family(
    "hyper-sd-unified",
    "text-to-image",
    matches=lambda _: False,
    recipe=recipe,
    jobs=sd.jobs,
    tokenizers=sd.tokenizers,
    by_name=tcd.matches,
    distils=tcd.DISTILS,
)
