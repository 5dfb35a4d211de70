"""Videos end to end: diffusers in torch against a bundle that runs without it, from the same seed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch

from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest, BadSource, UnknownFamily, UnsupportedModel
from edgekit.export.families import family_of
from edgekit.export.families.animatediff import jobs, recipe
from edgekit.export.families.networks_video import AdaptedUNet
from edgekit.export.sources import read_source
from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from edgekit.runtime.diffusion.tables import compile_tables
from tests.export.diffusion.conftest import Exported, export_folder
from tests.export.diffusion.test_families import edited
from tests.export.diffusion.tiny_pipelines import FOREIGN, unet
from tests.export.diffusion.tiny_video import FRAMES, animatelcm, lightning_scheduler, motion_adapter

pytestmark = FOREIGN

PROMPT = "a red apple on the grass"
SEED = 11
LATENT_LIMIT = 1e-5  # of max|x|


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny AnimateLCM and its bundle."""
    root, pipeline = tmp_path_factory.mktemp("animatelcm"), animatelcm()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root / "folder")
    return export_folder("animatelcm", pipeline, root / "folder", root / "bundle")


def frames_of(videos: Any) -> np.ndarray:
    """8-bit frames (batch, frames, height, width, 3)."""
    return np.stack([np.stack([np.asarray(frame) for frame in video]) for video in videos])


def in_torch(pipeline: Any, steps: int, batch: int, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents and frames of diffusers' own pipeline."""

    def draw(kind: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(SEED)
        asked = {"num_inference_steps": steps, "num_frames": FRAMES, **changes}
        return pipeline(prompt=[PROMPT] * batch, generator=generator, output_type=kind, **asked).frames

    return draw("latent").numpy(), frames_of(draw("pil"))


def in_bundle(bundle: Bundle, steps: int, batch: int, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same of the torch-free runtime."""
    with FewStepPipeline(bundle) as model:
        result = model.generate(PROMPT, steps=steps, batch=batch, seed=SEED, seed_mode="torch-cpu", **changes)
    assert result.latents is not None
    assert not result.images
    return result.latents, frames_of(result.videos)


def assert_same(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> None:
    """Latents to LATENT_LIMIT of max|x|, frames to one unit of eight bits, and frames with content that differ."""
    assert ours[0].shape == theirs[0].shape
    assert np.abs(ours[0] - theirs[0]).max() <= LATENT_LIMIT * np.abs(theirs[0]).max()
    assert ours[1].shape == theirs[1].shape
    assert np.abs(ours[1].astype(int) - theirs[1].astype(int)).max() <= 1
    assert theirs[1].std() > 5
    assert np.abs(np.diff(theirs[1].astype(int), axis=1)).max() > 5


@pytest.mark.parametrize(
    ("steps", "batch", "guidance", "negative", "size", "frames"),
    [
        (1, 1, 1.0, "", (16, 16), FRAMES),
        (2, 2, 1.0, "", (16, 24), 3),
        (4, 1, 2.0, "blue sky", (8, 16), 2),
        (6, 2, 1.5, "", (24, 16), FRAMES),
    ],
)
def test_the_same_seed_draws_the_video_diffusers_draws(
    example: Exported, steps: int, batch: int, guidance: float, negative: str, size: tuple[int, int], frames: int
) -> None:
    """AnimateLCM: steps, batches, guidance with a negative prompt, sizes and fewer frames are diffusers'."""
    height, width = size
    theirs = in_torch(
        example.pipeline,
        steps,
        batch,
        guidance_scale=guidance,
        negative_prompt=[negative] * batch,
        height=height,
        width=width,
        num_frames=frames,
    )
    ours = in_bundle(
        example.bundle, steps, batch, guidance=guidance, negative=negative, height=height, width=width, frames=frames
    )
    assert_same(ours, theirs)


@pytest.fixture(scope="module")
def euler(example: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny AnimateDiff-Lightning: the same networks, so the same graphs, under a recipe of its own."""
    folder = tmp_path_factory.mktemp("lightning") / "folder"
    parts = {**example.pipeline.components, "scheduler": lightning_scheduler()}
    pipeline = diffusers.AnimateDiffPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    contract = recipe(read_source(folder))
    manifest = msgspec.structs.replace(example.bundle.manifest, recipe=contract, tables=compile_tables(contract))
    return replace(example, pipeline=pipeline, folder=folder, bundle=replace(example.bundle, manifest=manifest))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lightning_draws_the_video_diffusers_draws(euler: Exported, steps: int) -> None:
    """AnimateDiff-Lightning: Euler steps on a trailing grid and linear betas, without guidance."""
    theirs = in_torch(euler.pipeline, steps, 1, guidance_scale=1.0, height=16, width=16, num_frames=3)
    assert_same(in_bundle(euler.bundle, steps, 1, height=16, width=16, frames=3), theirs)


def test_the_recipe_of_animatelcm(example: Exported) -> None:
    """Steps, betas, guidance, shape and frame rate; frames no more than the motion modules have positions for."""
    contract = recipe(read_source(example.folder))
    (stage,) = contract.stages
    assert stage.sampler.noise_schedule is not None
    assert (stage.sampler.kind, stage.sampler.noise_schedule.kind, stage.sampler.steps) == ("lcm", "linear", 6)
    assert (stage.guidance.kind, stage.guidance.scale, stage.guidance.maximum) == ("cfg", 2.0, 3.0)
    assert (stage.init.shape, stage.init.frames) == ((4, "frames", "height", "width"), FRAMES)
    assert (contract.media.kind, contract.media.rate) == ("video", 8.0)


def test_a_video_longer_than_the_positions_over_time_is_refused(example: Exported) -> None:
    """The largest number of frames is in the manifest, and the error says it."""
    with FewStepPipeline(example.bundle) as model, pytest.raises(BadRequest, match=f"1 to {FRAMES}"):
        model.generate(PROMPT, steps=1, frames=FRAMES + 1)


def test_a_unet_and_an_adapter_beside_it_are_the_joined_unet(example: Exported, tmp_path: Path) -> None:
    """The hub's form, two folders, gives the network that `from_unet2d` gives; the job names that builder."""
    plain, adapter = unet(attention_head_dim=2), motion_adapter()
    changes = {"model_index.json": {"unet": ["diffusers", "UNet2DConditionModel"]}}
    folder = edited(example.folder, tmp_path / "m", changes)
    shutil.rmtree(folder / "unet")
    plain.save_pretrained(folder / "unet")
    adapter.save_pretrained(folder / "motion_adapter")
    (job,) = (job for job in jobs(read_source(folder)) if job.part == "unet")
    assert job.network.endswith(":AdaptedUNet")
    assert job.most == {"frames": FRAMES}
    joined = diffusers.UNetMotionModel.from_unet2d(plain, adapter).eval()
    x, t, states = torch.randn(2, 4, 3, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 7, 32)
    with torch.no_grad():
        theirs = joined(x, t, states.repeat_interleave(3, dim=0)).sample
        ours = AdaptedUNet(folder / "unet")(x, t, states)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert theirs.abs().max() > 0.1


def test_an_adapter_of_another_unet_is_a_bad_source(tmp_path: Path) -> None:
    """Two folders that do not fit each other are named, with diffusers' reason."""
    unet(
        block_out_channels=(4, 8, 8), down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3
    ).save_pretrained(tmp_path / "unet")
    motion_adapter().save_pretrained(tmp_path / "motion_adapter")
    with pytest.raises(BadSource, match="motion_adapter do not fit"):
        AdaptedUNet(tmp_path / "unet")


REFUSALS = {
    "an image adapter": ("unet/config.json", "encoder_hid_dim_type", "ip_image_proj"),
    "SDXL's sizes": ("unet/config.json", "addition_embed_type", "text_time"),
    "a guidance embedding": ("unet/config.json", "time_cond_proj_dim", 32),
    "a picture as a start": ("unet/config.json", "in_channels", 9),
    "another text width": ("unet/config.json", "cross_attention_dim", 48),
    "another spacing of sigmas": ("scheduler/scheduler_config.json", "thresholding", True),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_modelled_is_refused_by_name(example: Exported, tmp_path: Path, what: str) -> None:
    """The field, or what it would mean, is named in the error."""
    file, field, value = REFUSALS[what]
    source = read_source(edited(example.folder, tmp_path / "m", {file: {field: value}}))
    with pytest.raises(UnsupportedModel, match="channels" if field == "in_channels" else field):
        (recipe(source), jobs(source))


def test_an_undistilled_animatediff_is_no_family(euler: Exported, tmp_path: Path) -> None:
    """Euler on another grid than the trailing one is an undistilled model's."""
    changes = {"scheduler/scheduler_config.json": {"timestep_spacing": "leading"}}
    with pytest.raises(UnknownFamily):
        family_of(read_source(edited(euler.folder, tmp_path / "m", changes)))
