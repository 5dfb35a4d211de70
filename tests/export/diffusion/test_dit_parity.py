"""Diffusion transformers end to end: diffusers in torch against a bundle that runs without it, from the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from tests.export.diffusion.conftest import Exported, export_folder
from tests.export.diffusion.tiny_dits import DITS
from tests.export.diffusion.tiny_pipelines import FOREIGN

PROMPT = "A red apple on the grass"
SEED = 11
LATENT_LIMIT = 1e-5  # of max|x|
# What each pipeline is called with, so that it draws by the bundle's contract.
CALLS: dict[str, dict[str, Any]] = {
    "pixart": {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False},
    "sd3": {"guidance_scale": 1.0},
    "flux": {"guidance_scale": 0.0, "max_sequence_length": 256},
    "sana": {"guidance_scale": 4.5, "use_resolution_binning": False},
    "zimage": {"guidance_scale": 0.0},
}

pytestmark = FOREIGN


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """`drawn(name)`: a tiny pipeline and the bundle of it, made once."""
    root, made = tmp_path_factory.mktemp("dits"), {}

    def get(name: str) -> Exported:
        if name not in made:
            pipeline = DITS[name]()
            pipeline.set_progress_bar_config(disable=True)
            pipeline.save_pretrained(root / name)
            made[name] = export_folder(name, pipeline, root / name, root / f"{name}.bundle")
        return made[name]

    return get


def in_torch(example: Exported, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents (batch, channels, height, width) and 8-bit pictures of diffusers' own pipeline."""

    def draw(kind: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(SEED)
        settings = {**CALLS[example.name], **changes}
        if example.name == "sana" and settings["num_inference_steps"] != 2:
            settings["intermediate_timesteps"] = None
        return example.pipeline(prompt=PROMPT, generator=generator, output_type=kind, **settings).images

    latents = draw("latent")
    if example.name == "flux":  # packed
        factor = example.pipeline.vae_scale_factor
        latents = example.pipeline._unpack_latents(latents, changes["height"], changes["width"], factor)
    return latents.numpy(), np.stack([np.asarray(image) for image in draw("pil")])


def in_bundle(example: Exported, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same of the torch-free runtime."""
    with FewStepPipeline(example.bundle) as model:
        result = model.generate(PROMPT, seed=SEED, seed_mode="torch-cpu", **changes)
    return result.latents, np.stack([np.asarray(image) for image in result.images])


def assert_same(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> None:
    """Latents to LATENT_LIMIT of max|x|, pictures to one unit of eight bits, and pictures with content."""
    assert ours[0].shape == theirs[0].shape
    error = np.abs(ours[0] - theirs[0]).max() / np.abs(theirs[0]).max()
    assert error <= LATENT_LIMIT
    assert ours[1].shape == theirs[1].shape
    assert np.abs(ours[1].astype(int) - theirs[1].astype(int)).max() <= 1
    assert theirs[1].std() > 5


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", DITS)
def test_the_same_seed_draws_the_picture_diffusers_draws(
    drawn: Callable[[str], Exported], name: str, steps: int
) -> None:
    """At one, two and four steps a batch of two, wider than high, is what diffusers draws on a CPU generator."""
    example = drawn(name)
    ours = in_bundle(example, steps=steps, height=32, width=64, batch=2)
    theirs = in_torch(example, num_inference_steps=steps, height=32, width=64, num_images_per_prompt=2)
    assert_same(ours, theirs)
