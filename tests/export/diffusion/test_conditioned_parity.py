"""Pipelines with a ControlNet, an inpainting UNet, or a small second decoder: diffusers against the bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import onnx_ir
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from tests.export.diffusion import tiny_conditioned as tiny
from tests.export.diffusion.conftest import Exported, export_folder
from tests.export.diffusion.test_diffusers_parity import assert_same, in_bundle, in_torch
from tests.export.diffusion.test_schedulers_parity import mask, picture, with_components
from tests.export.diffusion.tiny_pipelines import FOREIGN

pytestmark = FOREIGN

CONTROLLED = ("control-sd", "control-sdxl")


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """`conditioned(name)`: one pipeline of tiny_conditioned and its bundle, made once."""
    kept: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in kept:
            root, pipeline = tmp_path_factory.mktemp(name), tiny.CONDITIONED[name]()
            pipeline.set_progress_bar_config(disable=True)
            pipeline.save_pretrained(root / "folder")
            if name in tiny.WITH_TINY:
                tiny.small_decoder(root / "folder" / "vae_tiny")
            kept[name] = export_folder(name, pipeline, root / "folder", root / "bundle")
        return kept[name]

    return get


def control(height: int = 16, width: int = 16) -> Image.Image:
    """A diagonal edge."""
    rows, columns = np.indices((height, width))
    edge = (255 * (columns > rows)).astype(np.uint8)
    return Image.fromarray(np.stack([edge, edge // 2, 255 - edge], axis=-1))


@pytest.mark.parametrize("name", CONTROLLED)
@pytest.mark.parametrize(("steps", "guidance"), [(1, 0.0), (4, 2.0)])
def test_a_control_picture_steers_as_in_diffusers(
    conditioned: Callable[[str], Exported], name: str, steps: int, guidance: float
) -> None:
    """ControlNet at half strength, unguided, and guided against a negative prompt: diffusers' latents and pictures."""
    example, size = conditioned(name), {"height": 16, "width": 24}
    ours: dict[str, Any] = {"guidance": guidance, "negative": "an old house"} if guidance else {}
    expected = in_torch(
        example,
        steps,
        image=control(16, 24),
        controlnet_conditioning_scale=0.5,
        guidance_scale=guidance,
        negative_prompt=ours.get("negative"),
        eta=0.3,
        **size,
    )
    given = in_bundle(example, steps, control=control(16, 24), control_scale=0.5, **size, **ours)
    assert_same(given, expected)
    without = in_bundle(example, steps, control=control(16, 24), control_scale=0.0, **size, **ours)
    assert np.abs(given[0] - without[0]).max() > 0.01 * np.abs(given[0]).max()


@pytest.mark.parametrize("name", CONTROLLED)
def test_the_graphs_of_a_controlled_model_are_readable(conditioned: Callable[[str], Exported], name: str) -> None:
    """Axes have words for names, the same ones where ControlNet's outputs become the UNet's inputs, and every attention
    of both is one node."""
    example = conditioned(name)
    graphs = {part: onnx_ir.load(example.bundle.graph(part)).graph for part in ("controlnet", "unet")}
    for part, made in graphs.items():
        spec = example.bundle.manifest.parts[part]
        for value, said in zip([*made.inputs, *made.outputs], [*spec.inputs, *spec.outputs], strict=True):
            assert value.name == said.name
            assert tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape) == said.shape
        attentions = sum(isinstance(each, Attention) for each in getattr(example.pipeline, part).modules())
        operators = Counter(node.op_type for node in made)
        assert operators["MultiHeadAttention"] == attentions > 0
        assert not operators["Softmax"]


def test_a_batch_of_odd_sized_pictures_is_controlled(conditioned: Callable[[str], Exported]) -> None:
    """Two pictures of an odd latent size, at full strength by default; the control picture is brought to their size."""
    example, size = conditioned("control-sd"), {"height": 40, "width": 24}
    expected = in_torch(example, 2, image=control(), eta=0.3, num_images_per_prompt=2, **size)
    assert_same(in_bundle(example, 2, control=control(), batch=2, **size), expected)


def test_a_controlled_picture_is_redrawn(conditioned: Callable[[str], Exported]) -> None:
    """ControlNet and image-to-image together."""
    example = conditioned("control-sd")
    kind = diffusers.StableDiffusionControlNetImg2ImgPipeline
    changed = replace(example, pipeline=with_components(kind, example.pipeline))
    request = {"image": picture(), "strength": 0.5}
    expected = in_torch(
        changed, 4, control_image=control(16, 24), controlnet_conditioning_scale=0.5, eta=0.3, **request
    )
    assert_same(in_bundle(example, 4, control=control(16, 24), control_scale=0.5, **request), expected)


@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (2, 0.6)])
def test_an_inpainting_unet_paints_inside_a_mask(
    conditioned: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch, steps: int, strength: float
) -> None:
    """Nine channels: the mask and the masked picture's latents, at the sample's scale, are what diffusers feeds."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    example = conditioned("inpaint-sd")
    request = {"image": picture(), "strength": strength}
    expected = in_torch(example, steps, mask_image=mask(), height=16, width=24, guidance_scale=1.5, eta=0.3, **request)
    given = in_bundle(example, steps, mask=mask(), guidance=1.5, **request)
    assert_same(given, expected)
    other = Image.fromarray(255 - np.asarray(mask()))
    assert np.abs(in_bundle(example, steps, mask=other, guidance=1.5, **request)[0] - given[0]).max() > 0.01


def test_the_small_decoder_draws_what_it_draws_in_diffusers(conditioned: Callable[[str], Exported]) -> None:
    """`tiny` decodes the same latents by the folder's AutoencoderTiny, at its own scale and not the large one's."""
    example = conditioned("inpaint-sd")
    small = diffusers.AutoencoderTiny.from_pretrained(example.folder / "vae_tiny")
    request = {"image": picture(), "mask": mask()}
    with FewStepPipeline(example.bundle) as model:
        settings = {"steps": 2, "seed": 11, "seed_mode": "torch-cpu", **request}
        large, tiny_ = model.generate("a cat", **settings), model.generate("a cat", tiny=True, **settings)
    assert np.array_equal(large.latents, tiny_.latents)
    drawn = decode_in_torch(small, tiny_.latents)
    ours = np.stack([np.asarray(image) for image in tiny_.images])
    assert np.abs(ours.astype(int) - drawn.astype(int)).max() <= 1
    assert drawn.std() > 5
    assert np.abs(ours.astype(int) - np.stack([np.asarray(image) for image in large.images]).astype(int)).max() > 20


def decode_in_torch(vae: Any, latents: np.ndarray) -> np.ndarray:
    """8-bit pictures as a diffusers pipeline with this autoencoder decodes them."""
    with torch.no_grad():
        drawn = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor + vae.config.shift_factor).sample
    pictures = diffusers.image_processor.VaeImageProcessor().postprocess(drawn)
    return np.stack([np.asarray(each) for each in pictures])


def test_a_preview_is_the_small_decoders(conditioned: Callable[[str], Exported]) -> None:
    """What a step shows of its estimate is the AutoencoderTiny's picture, also where the large decoder ends the run."""
    example, seen = conditioned("inpaint-sd"), []
    small = diffusers.AutoencoderTiny.from_pretrained(example.folder / "vae_tiny")
    with FewStepPipeline(example.bundle) as model:
        model.generate("a cat", image=picture(), mask=mask(), steps=2, on_step=lambda event: seen.append(shown(event)))
    assert len(seen) == 2
    for clean, pictures in seen:
        drawn = decode_in_torch(small, clean)
        assert drawn.std() > 5
        assert np.abs(pictures.astype(int) - drawn.astype(int)).max() <= 1


def shown(event: Any) -> tuple[np.ndarray, np.ndarray]:
    """A step's estimate and its preview."""
    return np.array(event.clean), np.stack([np.asarray(image) for image in event.preview()])
