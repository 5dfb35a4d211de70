"""InstaFlow (Liu et al. 2024): Stable Diffusion straightened to a rectified flow, one Euler step.

Its network predicts x_0 - eps, the sign opposite to diffusers' flow models, on times 1000 (1 - i / n). Its own pipeline
class is recognised; a folder saved as a StableDiffusionPipeline says nothing of a flow, so that it must be asked for by
name, and its scheduler's config does nothing.
"""

from __future__ import annotations

from edgekit.bundle.recipe import Grid, Recipe, Sampler
from edgekit.export.families import Family
from edgekit.export.families import stable_diffusion as sd
from edgekit.export.sources import Source

PIPELINES = ("RectifiedFlowPipeline", "InstaFlowPipeline")
LEGAL_STEPS = (1, 2, 3, 4)
MOST = 3.0


def matches(source: Source) -> bool:
    """One of InstaFlow's pipelines."""
    return source.index.get("_class_name") in PIPELINES


def recipe(source: Source) -> Recipe:
    """One step by default, without guidance. Raises BadSource, UnsupportedModel."""
    sd.no_embedding(source, "a rectified flow")
    sampler = Sampler(
        kind="flow_euler",
        steps=1,
        legal_steps=LEGAL_STEPS,
        prediction="flow",
        grid=Grid(spacing="uniform"),
        sign=-1,
    )
    return sd.recipe(source, sampler, sd.guided(source, scale=1.0, maximum=MOST))


FAMILY = Family(
    "instaflow",
    "text-to-image",
    matches,
    recipe,
    sd.jobs,
    sd.tokenizers,
    by_name=lambda source: source.index.get("_class_name") in sd.PLAIN[:1],
)
