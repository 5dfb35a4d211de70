"""End to end: diffusers in torch against a bundle that runs without it, from the same seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelImg2ImgPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from tests.export.diffusion.conftest import Exported
from tests.export.diffusion.tiny_pipelines import FOREIGN, PIPELINES

PROMPT = "a red apple on the grass"
SEED = 11
LATENT_LIMIT = 1e-5  # of max|x|
GUIDANCE = {"lcm": 6.0}

pytestmark = FOREIGN


def in_torch(example: Exported, steps: int, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents and 8-bit pictures (batch, height, width, 3) of diffusers' own pipeline."""

    def draw(kind: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(SEED)
        settings = {"guidance_scale": GUIDANCE.get(example.name, 0.0), "num_inference_steps": steps, **changes}
        return example.pipeline(prompt=PROMPT, generator=generator, output_type=kind, **settings).images

    return draw("latent").numpy(), np.stack([np.asarray(image) for image in draw("pil")])


def in_bundle(example: Exported, steps: int, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same of the torch-free runtime."""
    if example.name == "lcm":
        changes["guidance"] = GUIDANCE["lcm"]
    with FewStepPipeline(example.bundle) as model:
        result = model.generate(PROMPT, steps=steps, seed=SEED, seed_mode="torch-cpu", **changes)
    return result.latents, np.stack([np.asarray(image) for image in result.images])


def assert_same(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> None:
    """Latents to LATENT_LIMIT of max|x|, pictures to one unit of eight bits, and pictures with content."""
    assert ours[0].shape == theirs[0].shape
    assert np.abs(ours[0] - theirs[0]).max() <= LATENT_LIMIT * np.abs(theirs[0]).max()
    assert ours[1].shape == theirs[1].shape
    assert np.abs(ours[1].astype(int) - theirs[1].astype(int)).max() <= 1
    assert theirs[1].std() > 5


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_same_seed_draws_the_picture_diffusers_draws(
    exported: Callable[[str], Exported], name: str, steps: int
) -> None:
    """At every legal step count, latents and 8-bit pictures are those of diffusers on a CPU generator."""
    example = exported(name)
    assert_same(in_bundle(example, steps, height=16, width=16), in_torch(example, steps, height=16, width=16))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_batch_of_odd_sized_pictures_is_the_one_diffusers_draws(
    exported: Callable[[str], Exported], name: str
) -> None:
    """Two pictures at once, neither square nor a power of two, are diffusers' `num_images_per_prompt=2`."""
    example = exported(name)
    factor = example.pipeline.vae_scale_factor
    height, width = 8 * (3 if factor == 2 else 1), 40
    ours = in_bundle(example, 2, height=height, width=width, batch=2)
    assert_same(ours, in_torch(example, 2, height=height, width=width, num_images_per_prompt=2))


def test_a_picture_is_redrawn_as_diffusers_redraws_it(
    exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image-to-image from the mean of the encoder's distribution (where diffusers draws from it) gives its picture."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    example = exported("lcm")
    given = Image.fromarray(np.random.default_rng(3).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    redraw = LatentConsistencyModelImg2ImgPipeline(**example.pipeline.components, requires_safety_checker=False)
    redraw.set_progress_bar_config(disable=True)
    changed = replace(example, pipeline=redraw)
    theirs = in_torch(changed, 4, image=given, strength=0.5)
    assert_same(in_bundle(example, 4, image=given, strength=0.5, height=16, width=24), theirs)
