"""aMUSEd end to end: the same uniforms in diffusers' pipeline and in the bundle decide the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_amused
from PIL import Image

from edgekit.errors import BadRequest, UnsupportedModel
from edgekit.export.families.amused import jobs, recipe
from edgekit.export.sources import read_source
from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from edgekit.runtime.random import Purpose, open_noise
from tests.export.diffusion.conftest import Exported, export_folder
from tests.export.diffusion.test_families import edited
from tests.export.diffusion.tiny_pipelines import FOREIGN
from tests.export.diffusion.tiny_tokens import CODES, MASK, SIDE, amused

pytestmark = FOREIGN

SEED = 7
PROMPT = "a red apple on the grass"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny aMUSEd and its bundle."""
    root, pipeline = tmp_path_factory.mktemp("amused"), amused()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root / "folder")
    return export_folder("amused", pipeline, root / "folder", root / "bundle")


@pytest.fixture
def philox(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give torch the uniforms the runtime draws: a race for each token, Gumbel noise for each confidence."""
    rows = {Purpose.TOKEN: 0, Purpose.GUMBEL: 0}
    noise = open_noise("philox", SEED)

    def uniform(shape: tuple[int, ...], purpose: Purpose) -> torch.Tensor:
        rows[purpose] += 1
        return torch.from_numpy(noise.uniform(shape, rows[purpose], purpose))

    def multinomial(p: torch.Tensor, count: int, generator: Any = None) -> torch.Tensor:
        u = uniform((p.shape[0] // SIDE**2, SIDE**2, p.shape[1]), Purpose.TOKEN).reshape(p.shape)
        return (p / -torch.log(u)).argmax(-1, keepdim=True)

    def gumbel(t: torch.Tensor, generator: Any = None) -> torch.Tensor:
        u = uniform(tuple(t.shape), Purpose.GUMBEL)
        return (-torch.log(-torch.log(u))).float()

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", gumbel)
    yield
    assert rows[Purpose.TOKEN], "torch drew no token from what it was given"


def in_torch(example: Exported, steps: int, batch: int, guidance: float, negative: str) -> np.ndarray:
    """Tokens (batch, tokens) of diffusers' own pipeline."""
    drawn = example.pipeline(
        prompt=PROMPT,
        negative_prompt=negative,
        num_inference_steps=steps,
        num_images_per_prompt=batch,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    return drawn.reshape(batch, -1).numpy()


@pytest.mark.usefixtures("philox")
@pytest.mark.parametrize(
    ("steps", "batch", "guidance", "negative"),
    [(1, 1, 10.0, ""), (3, 2, 10.0, "blue sky"), (5, 2, 1.0, ""), (12, 1, 4.0, "the cat and the dog")],
)
def test_the_same_uniforms_decide_the_tokens_diffusers_decides(
    example: Exported, steps: int, batch: int, guidance: float, negative: str
) -> None:
    """At several row counts, guided and not, all tokens are equal, and so is the picture, which has content."""
    theirs = in_torch(example, steps, batch, guidance, negative)
    with FewStepPipeline(example.bundle) as model:
        ours = model.generate(PROMPT, steps=steps, batch=batch, guidance=guidance, negative=negative, seed=SEED)
    assert np.array_equal(ours.latents, theirs)
    assert len(np.unique(theirs)) > 3
    assert theirs.max() < CODES
    pictures = decoded(example, theirs)
    assert pictures.std() > 5
    given = np.stack([np.asarray(image) for image in ours.images])
    assert np.abs(given.astype(int) - pictures.astype(int)).max() <= 1


def decoded(example: Exported, tokens: np.ndarray) -> np.ndarray:
    """8-bit pictures of tokens by diffusers' decoder and its image processor."""
    pipeline = example.pipeline
    shape = (len(tokens), SIDE, SIDE, pipeline.vqvae.config.latent_channels)
    with torch.no_grad():
        found = pipeline.vqvae.decode(torch.from_numpy(tokens), force_not_quantize=True, shape=shape).sample.clip(0, 1)
    images: list[Image.Image] = pipeline.image_processor.postprocess(found, "pil")
    return np.stack([np.asarray(image) for image in images])


def test_the_recipe_of_amused(example: Exported) -> None:
    """Codebook, mask, schedule and default contract come from the folder and the pipeline's own defaults."""
    (stage,) = recipe(read_source(example.folder)).stages
    tokens = stage.sampler.tokens
    assert tokens is not None
    assert (tokens.length, tokens.vocabulary, tokens.mask_id, tokens.schedule) == (SIDE**2, CODES, MASK, "cosine")
    assert tokens.choice_temperature == (2.0, 0.0)
    assert (stage.sampler.steps, stage.guidance.kind, stage.guidance.scale) == (12, "cfg", 10.0)
    assert (stage.init.width, stage.init.height, stage.init.fixed_size) == (2 * SIDE, 2 * SIDE, True)


def test_a_picture_of_another_size_is_refused(example: Exported) -> None:
    """The transformer knows one number of tokens, so the request is refused before anything runs."""
    with FewStepPipeline(example.bundle) as model, pytest.raises(BadRequest, match="width"):
        model.generate(PROMPT, width=4 * SIDE)


REFUSALS = {
    "a decoder that does not look tokens up": ("vqvae/config.json", "lookup_from_codebook", False),
    "another masking schedule": ("scheduler/scheduler_config.json", "masking_schedule", "square"),
    "other text states": ("transformer/config.json", "encoder_hidden_size", 48),
    "another pooled text": ("transformer/config.json", "cond_embed_dim", 48),
    "more tokens than vectors": ("transformer/config.json", "codebook_size", 1000),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_modelled_is_refused_by_name(example: Exported, tmp_path: Any, what: str) -> None:
    """The field is named in the error."""
    file, field, value = REFUSALS[what]
    source = read_source(edited(example.folder, tmp_path / "m", {file: {field: value}}))
    with pytest.raises(UnsupportedModel, match=field):
        (recipe(source), jobs(source))
