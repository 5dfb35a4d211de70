"""Stable Video Diffusion end to end: diffusers in torch against a bundle that runs without it, from the same seed."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from PIL import Image, ImageSequence

from edgekit.bundle import catalogue
from edgekit.bundle.store import Bundle, read_bundle
from edgekit.errors import BadSource, UnknownFamily, UnsupportedModel
from edgekit.export.families import family_of
from edgekit.export.families.export import DiffusionOptions, plan_diffusion
from edgekit.export.families.networks_svd import resized
from edgekit.export.families.svd import CHUNK, jobs, recipe
from edgekit.export.sources import Source, read_source
from edgekit.runtime.diffusion.contract import Contract
from edgekit.runtime.diffusion.pipeline import DrawRequest, FewStepPipeline
from edgekit.runtime.diffusion.tables import compile_tables
from tests.cli.conftest import ROOT, command
from tests.export.diffusion.conftest import Exported
from tests.export.diffusion.test_families import edited
from tests.export.diffusion.tiny_pipelines import FOREIGN
from tests.export.diffusion.tiny_svd import (
    CONSISTENCY,
    EULER,
    FRAMES,
    AnimateLCMSVDStochasticIterativeScheduler,
    svd,
)
from tests.runtime.diffusion.catalogue_bench import picture

pytestmark = FOREIGN

SEED = 3
LATENT_LIMIT = 1e-5  # of max|x|
SMALL = picture(24, 16)
LARGE = SMALL.resize((300, 260))  # finer waves would be flat grey when made small, and its norms all rounding
SCHEDULERS = {
    "diffusers' class": diffusers.CMStochasticIterativeScheduler,
    "AnimateLCM-SVD": AnimateLCMSVDStochasticIterativeScheduler,
}


def run(*words: object) -> None:
    """One `edgekit` command, as a user types it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny SVD, and the bundle that `edgekit export` makes of its folder."""
    root, pipeline = tmp_path_factory.mktemp("svd"), svd()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root / "folder")
    run("export", root / "folder", "-o", root / "bundle")
    return Exported("svd", pipeline, root / "folder", read_bundle(root / "bundle"), ())


@pytest.fixture(scope="module", params=SCHEDULERS)
def distilled(request: pytest.FixtureRequest, example: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same networks, so the same graphs, as a consistency model under a recipe of its own."""
    folder = tmp_path_factory.mktemp("consistency") / "folder"
    pipeline = svd(SCHEDULERS[request.param](**CONSISTENCY))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    contract = recipe(read_source(folder))
    manifest = msgspec.structs.replace(example.bundle.manifest, recipe=contract, tables=compile_tables(contract))
    return replace(example, pipeline=pipeline, folder=folder, bundle=replace(example.bundle, manifest=manifest))


def frames_of(videos: Any) -> np.ndarray:
    """8-bit frames (batch, frames, height, width, 3)."""
    return np.stack([np.stack([np.asarray(frame) for frame in video]) for video in videos])


def in_torch(pipeline: Any, given: Image.Image, steps: int, batch: int, **changes: Any) -> list[np.ndarray]:
    """Latents and frames of diffusers' own pipeline, which draws its consistency steps from torch's default stream."""
    # diffusers chunks the frames of a batch as one row, and smooths over the seam of two videos if a chunk has it
    asked = {"num_inference_steps": steps, "decode_chunk_size": min(CHUNK, changes["num_frames"]), **changes}

    def draw(kind: str) -> Any:
        generator = torch.manual_seed(SEED)
        return pipeline([given] * batch, generator=generator, output_type=kind, **asked).frames

    return [draw("latent").numpy(), frames_of(draw("pil"))]


def in_bundle(bundle: Bundle, given: Image.Image, steps: int, batch: int, **changes: Any) -> list[np.ndarray]:
    """The same of the torch-free runtime."""
    with FewStepPipeline(bundle) as model:
        result = model.generate(image=given, steps=steps, batch=batch, seed=SEED, seed_mode="torch-cpu", **changes)
    assert result.latents is not None
    return [result.latents, frames_of(result.videos)]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    """Latents to LATENT_LIMIT of max|x|, frames to one unit of eight bits, and frames with content that differ."""
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    assert np.abs(ours[0] - theirs[0]).max() <= LATENT_LIMIT * np.abs(theirs[0]).max()
    assert np.abs(ours[1].astype(int) - theirs[1].astype(int)).max() <= 1
    assert theirs[1].std() > 5
    assert np.abs(np.diff(theirs[1].astype(int), axis=1)).max() > 5


@pytest.mark.parametrize(
    ("steps", "batch", "guidance", "size", "frames", "given"),
    [
        (4, 1, 3.0, (16, 24), FRAMES, SMALL),
        (6, 2, 2.0, (24, 16), 3, LARGE),
        (8, 1, 1.0, (8, 16), 2, LARGE),
        (6, 1, 3.0, (10, 14), CHUNK + 2, SMALL),
        (25, 1, 3.0, (16, 24), FRAMES, SMALL),
    ],
)
def test_the_same_seed_draws_the_video_diffusers_draws(
    example: Exported,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    batch: int,
    guidance: float,
    size: tuple[int, int],
    frames: int,
    given: Image.Image,
) -> None:
    """Euler steps: batches, guidance or none, sizes, more frames than a chunk, a picture that is resized twice."""
    height, width = size
    shape = {"height": height, "width": width}
    # the pipeline wants multiples of 8 whatever its autoencoder; these networks take any even size
    monkeypatch.setattr(example.pipeline, "check_inputs", lambda *_: None)
    theirs = in_torch(example.pipeline, given, steps, batch, max_guidance_scale=guidance, num_frames=frames, **shape)
    assert_same(in_bundle(example.bundle, given, steps, batch, guidance=guidance, frames=frames, **shape), theirs)


@pytest.mark.parametrize(("steps", "batch", "given"), [(1, 1, SMALL), (2, 2, LARGE), (4, 1, SMALL), (8, 1, SMALL)])
def test_a_consistency_model_draws_the_video_diffusers_draws(
    distilled: Exported, steps: int, batch: int, given: Image.Image
) -> None:
    """Consistency steps at every legal count, by diffusers' scheduler and by the authors' of AnimateLCM-SVD."""
    shape = {"height": 16, "width": 24}
    theirs = in_torch(distilled.pipeline, given, steps, batch, max_guidance_scale=1.2, num_frames=FRAMES, **shape)
    assert_same(in_bundle(distilled.bundle, given, steps, batch, frames=FRAMES, **shape), theirs)


@pytest.mark.parametrize("size", [(40, 64), (224, 225), (300, 229), (700, 560), (1000, 673)])
def test_clip_sees_the_picture_as_the_pipeline_shrinks_it(size: tuple[int, int]) -> None:
    """Two matrix products are `_resize_with_antialiasing`, whether the picture is larger or smaller than CLIP's."""
    torch.manual_seed(1)
    given = torch.rand(1, 3, *size) * 2 - 1
    theirs = _resize_with_antialiasing(given, (224, 224))
    assert (resized(given, 224) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_a_video_comes_out_through_the_command(example: Exported, tmp_path: Path, ending: str) -> None:
    """`edgekit run` on the bundle's folder writes every frame; WebP is lossless, so its frames are the ones drawn."""
    SMALL.save(tmp_path / "given.png")
    options = {"image": tmp_path / "given.png", "steps": 4, "width": 24, "height": 16, "frames": 3, "seed": 5}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    target = tmp_path / f"moved{ending}"
    run("run", example.bundle.root, *words, "-o", target)
    with Image.open(target) as video:
        shown = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(video)]
    with FewStepPipeline(example.bundle) as model:
        drawn = frames_of(model.generate(**options).videos)[0]
    assert [frame.shape for frame in shown] == [(16, 24, 3)] * 3
    if ending == ".webp":
        assert np.array_equal(np.stack(shown), drawn)


def test_the_recipe_of_svd(example: Exported) -> None:
    """Karras sigmas of the folder, rising guidance, the pipeline's ids and size; nothing but the picture is needed."""
    source = read_source(example.folder)
    contract = recipe(source)
    (stage,) = contract.stages
    assert stage.sampler.grid is not None
    assert (stage.sampler.kind, stage.sampler.steps, stage.sampler.grid.sigma_max) == ("euler", 25, 700.0)
    assert (stage.guidance.start, stage.guidance.scale, stage.guidance.ramp) == (1.0, 3.0, "frames")
    assert contract.constants == {"added_time_ids": (6.0, 127.0, 0.02)}
    used = Contract.of(contract).settle(DrawRequest(image=SMALL))
    assert (used.width, used.height, used.frames, used.guidance) == (1024, 576, FRAMES, 3.0)
    assert family_of(source).name == "svd"
    assert not family_of(source).tokenizers(source)
    assert not plan_diffusion(source, DiffusionOptions()).notes
    assert not example.bundle.manifest.notes


PUBLISHED: dict[str, Any] = {  # configs of SVD-XT, as far as they are read, with AnimateLCM-SVD's scheduler
    "unet": {
        "addition_time_embed_dim": 256,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "in_channels": 8,
        "num_frames": 25,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": 768,
    },
    "vae": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "scaling_factor": 0.18215},
    "image_encoder": {"hidden_size": 1280, "image_size": 224, "patch_size": 14, "projection_dim": 1024},
    "feature_extractor": {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]},
    "scheduler": {**CONSISTENCY, "rho": 7, "s_noise": 1.0, "sigma_min": 0.002},
}


def test_the_catalogue_has_what_an_export_writes(example: Exported, tmp_path: Path) -> None:
    """The entry of AnimateLCM-SVD is the recipe its folder gets, for graphs of the same inputs."""
    special = {"scheduler": "scheduler_config.json", "feature_extractor": "preprocessor_config.json"}
    for component, config in PUBLISHED.items():
        (tmp_path / component).mkdir()
        (tmp_path / component / special.get(component, "config.json")).write_text(json.dumps(config))
    index = read_source(example.folder).index
    scheduler = AnimateLCMSVDStochasticIterativeScheduler.__name__
    source = Source(tmp_path, "diffusion", {**index, "scheduler": ["animatelcm_scheduler", scheduler]})
    entry = catalogue.entry("animatelcm_svd")
    assert recipe(source) == entry.recipe
    assert {job.part: job.inputs for job in jobs(source)} == {name: part.inputs for name, part in entry.parts.items()}


SCHEDULER = "scheduler/scheduler_config.json"
REFUSALS: dict[str, tuple[str, str, Any]] = {
    "sigmas on another grid": (SCHEDULER, "use_karras_sigmas", False),
    "another prediction": (SCHEDULER, "prediction_type", "epsilon"),
    "discrete times": (SCHEDULER, "timestep_type", "discrete"),
    "another start": (SCHEDULER, "timestep_spacing", "trailing"),
    "ends that are not said": (SCHEDULER, "sigma_max", None),
    "a larger picture for CLIP": ("image_encoder/config.json", "image_size", 336),
    "another width of the embedding": ("image_encoder/config.json", "projection_dim", 48),
    "channels of another autoencoder": ("vae/config.json", "latent_channels", 8),
    "another number of ids": ("unet/config.json", "projection_class_embeddings_input_dim", 128),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_modelled_is_refused_by_name(example: Exported, tmp_path: Path, what: str) -> None:
    """The field that would have to mean something else is named, on whichever side of two that do not fit."""
    file, field, value = REFUSALS[what]
    source = read_source(edited(example.folder, tmp_path / "m", {file: {field: value}}))
    named = {"projection_dim": "cross_attention_dim", "latent_channels": "in_channels"}.get(field, field)
    with pytest.raises(UnsupportedModel, match=named):
        (recipe(source), jobs(source))


def test_fields_a_scheduler_leaves_out_have_its_own_defaults(example: Exported, tmp_path: Path) -> None:
    """An Euler scheduler that says nothing of its sigmas has no Karras ones."""
    folder = edited(example.folder, tmp_path / "m", {})
    (folder / SCHEDULER).write_text(json.dumps({name: EULER[name] for name in ("sigma_min", "sigma_max")}))
    with pytest.raises(UnsupportedModel, match="use_karras_sigmas is False"):
        recipe(read_source(folder))


def test_louder_noise_between_consistency_steps_is_refused(distilled: Exported, tmp_path: Path) -> None:
    """`s_noise` has no place in the rule."""
    source = read_source(edited(distilled.folder, tmp_path / "m", {SCHEDULER: {"s_noise": 1.01}}))
    with pytest.raises(UnsupportedModel, match=r"s_noise is 1\.01"):
        recipe(source)


def test_a_folder_without_its_normalisation_is_a_bad_source(example: Exported, tmp_path: Path) -> None:
    """What CLIP's pictures are divided by is not guessed."""
    changes = {"feature_extractor/preprocessor_config.json": {"image_std": None}}
    with pytest.raises(BadSource, match="image_std"):
        jobs(read_source(edited(example.folder, tmp_path / "m", changes)))


def test_another_scheduler_is_no_family(example: Exported, tmp_path: Path) -> None:
    """SVD with a solver of which no contract is known."""
    changes = {"model_index.json": {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}}
    with pytest.raises(UnknownFamily):
        family_of(read_source(edited(example.folder, tmp_path / "m", changes)))
