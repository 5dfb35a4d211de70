"""ControlNet, inpainting UNets and small decoders: what recipe and parts say of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edgekit.bundle.recipe import Recipe
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import PartJob, family_of
from edgekit.export.families.export import DiffusionOptions, plan_diffusion
from edgekit.export.families.networks import ControlNet, Pooled, UNet
from edgekit.export.families.parts import Autoencoder, autoencoder, clip_job, sides
from edgekit.export.families.tiny import FOLDERS, tiny_folder, with_tiny_decoder
from edgekit.export.sources import Source, read_source
from tests.export.diffusion import tiny_conditioned
from tests.export.diffusion.tiny_pipelines import FOREIGN

pytestmark = FOREIGN

Folders = dict[str, tuple[Any, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Every pipeline of tiny_conditioned and its folder."""
    root, made = tmp_path_factory.mktemp("conditioned"), {}
    for name, build in tiny_conditioned.CONDITIONED.items():
        pipeline = build()
        pipeline.save_pretrained(root / name)
        made[name] = (pipeline, root / name)
    return made


def contract(folder: Path) -> tuple[Recipe, dict[str, PartJob]]:
    """What the folder's family makes of it."""
    source = read_source(folder)
    family = family_of(source)
    return family.recipe(source), {job.part: job for job in family.jobs(source)}


def edited(folder: Path, to: Path, file: str, **fields: Any) -> Path:
    """A copy of a folder with fields of one JSON file changed."""
    shutil.copytree(folder, to)
    (to / file).write_text(json.dumps({**json.loads((to / file).read_text()), **fields}))
    return to


@pytest.mark.parametrize("name", ["control-sd", "control-sdxl"])
def test_controlnet_runs_before_the_unet_and_feeds_it(saved: Folders, name: str) -> None:
    """Its outputs are the UNet's last inputs, in order, of the sizes that ControlNet really gives."""
    pipeline, folder = saved[name]
    recipe, jobs = contract(folder)
    (stage,) = recipe.stages
    (call,) = stage.denoise.before
    assert (call.feeds["control"], call.feeds["control_scale"]) == ("@control", "@control_scale")
    assert set(call.feeds) == {spec.name for spec in jobs["controlnet"].inputs}
    assert set(stage.denoise.feeds) == {spec.name for spec in jobs["unet"].inputs}
    added = jobs["controlnet"].outputs
    assert jobs["unet"].inputs[-len(added) :] == added
    fed = [stage.denoise.feeds[spec.name] for spec in added]
    assert fed == [f"controlnet.{spec.name}" for spec in added]

    job = jobs["controlnet"]
    given = ControlNet(folder / "controlnet")(*(torch.ones(job.shape(spec, 0)) for spec in job.inputs))
    assert [tuple(each.shape) for each in given] == [job.shape(spec, 0) for spec in job.outputs]
    assert pipeline.unet.config.in_channels == stage.init.channels


def test_control_scale_multiplies_residuals(saved: Folders) -> None:
    """Per picture: at 0 nothing is added, at 2 twice what is added at 1, as conditioning_scale does in diffusers."""
    pipeline, folder = saved["control-sd"]
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(3, 4, 8, 8, generator=generator), torch.full((3,), 500.0)
    control, text = torch.rand(3, 3, 16, 16, generator=generator), torch.randn(3, 7, 32, generator=generator)
    with torch.no_grad():
        ours = ControlNet(folder / "controlnet")(x, t, control, torch.tensor([0.0, 1.0, 2.0]), text)
        down, middle = pipeline.controlnet(x, t, text, control, return_dict=False)
    for mine, theirs in zip(ours, (*down, middle), strict=True):
        assert theirs.abs().max() > 0
        for line, scale in enumerate((0.0, 1.0, 2.0)):
            torch.testing.assert_close(mine[line], scale * theirs[line], rtol=1e-4, atol=1e-5)


CONTROL_REFUSALS = {
    "pooled conditions": ("controlnet/config.json", {"global_pool_conditions": True}, "global_pool_conditions"),
    "another depth": ("controlnet/config.json", {"layers_per_block": 2}, "made for another model"),
    "other widths": ("controlnet/config.json", {"block_out_channels": [8, 8]}, "made for another model"),
    "another embedding": (
        "controlnet/config.json",
        {"conditioning_embedding_out_channels": [4, 8, 16]},
        "4 times smaller",
    ),
    "another sample": ("controlnet/config.json", {"in_channels": 16}, "takes 16 channels"),
    "another text width": ("controlnet/config.json", {"cross_attention_dim": 48}, "controlnet takes text states 48"),
    "several at once": ("model_index.json", {"controlnet": ["diffusers", "MultiControlNetModel"]}, "MultiControlNet"),
    "a union": ("model_index.json", {"controlnet": ["diffusers", "ControlNetUnionModel"]}, "ControlNetUnionModel"),
}


@pytest.mark.parametrize("what", CONTROL_REFUSALS)
def test_a_controlnet_that_does_not_fit_is_refused(saved: Folders, tmp_path: Path, what: str) -> None:
    """By name, from configs alone."""
    file, fields, words = CONTROL_REFUSALS[what]
    source = read_source(edited(saved["control-sd"][1], tmp_path / "m", file, **fields))
    with pytest.raises(UnsupportedModel, match=words):
        plan_diffusion(source, DiffusionOptions())


def test_an_inpainting_unet_is_told_mask_and_masked_picture(saved: Folders) -> None:
    """The sample keeps its four channels; the masked picture is encoded once; the scale is the graph's business."""
    recipe, jobs = contract(saved["inpaint-sd"][1])
    (stage,) = recipe.stages
    assert {call.part: call.feeds for call in recipe.conditions}["vae_encoder"] == {"sample": "@masked_image"}
    assert stage.denoise.feeds["mask"] == "@inpaint_mask"
    assert stage.denoise.feeds["masked_image_latents"] == "vae_encoder.latent_sample"
    assert (stage.init.channels, jobs["unet"].inputs[0].shape[1]) == (4, 4)


def test_masked_latents_are_scaled_inside_the_graph(saved: Folders) -> None:
    """The wrapper's answer is diffusers' UNet on sample, mask and latents times the autoencoder's scaling_factor."""
    pipeline, folder = saved["inpaint-sd"]
    generator = torch.Generator().manual_seed(3)
    x, masked, mask = (torch.randn(1, width, 8, 8, generator=generator) for width in (4, 4, 1))
    t, text = torch.full((1,), 500.0), torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        joined = torch.cat([x, mask, masked * pipeline.vae.config.scaling_factor], dim=1)
        theirs = pipeline.unet(joined, t, text).sample
        torch.testing.assert_close(UNet(folder / "unet")(x, t, text, mask, masked), theirs, rtol=1e-5, atol=1e-5)


TINY = {  # model -> scale and shift of the sample that its published small decoder's config states
    "as published": ({}, 1.0, 0.0),
    "without the fields": ({"scaling_factor": None, "shift_factor": None}, 1.0, 0.0),
    "with its own": ({"scaling_factor": 1.5, "shift_factor": 0.25}, 1.5, 0.25),
}


@pytest.mark.parametrize("what", TINY)
def test_a_small_decoder_has_its_own_scale(saved: Folders, tmp_path: Path, what: str) -> None:
    """Whatever the large autoencoder's 0.18215: the small one's config decides, and latent_magnitude does nothing."""
    fields, scale, shift = TINY[what]
    tiny_conditioned.small_decoder(tmp_path / "taesd", latent_magnitude=5, latent_shift=0.1, **fields)
    drop_nulls(tmp_path / "taesd" / "config.json")
    recipe, jobs = contract(saved["inpaint-sd"][1])
    recipe, added = with_tiny_decoder(recipe, tuple(jobs.values()), tmp_path / "taesd")
    decode = recipe.stages[0].decode
    assert decode is not None
    assert decode.preview is not None
    assert (decode.scale, decode.preview.scale, decode.preview.shift) == (0.18215, scale, shift)
    assert added[-1].part == decode.preview.part
    assert Path(added[-1].folder) == (tmp_path / "taesd").resolve()


def drop_nulls(file: Path) -> None:
    """Older folders lack fields that newer ones have."""
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_small_decoder_in_the_folder_is_found(saved: Folders, tmp_path: Path, name: str) -> None:
    """Beside the other components, under any of the usual names; a folder without one has none."""
    folder = shutil.copytree(saved["inpaint-sd"][1], tmp_path / "m")
    assert tiny_folder(read_source(folder)) is None
    tiny_conditioned.small_decoder(folder / name)
    assert tiny_folder(read_source(folder)) == folder / name
    assert [part.name for part in plan_diffusion(read_source(folder), DiffusionOptions()).parts][-1] == "tiny_decoder"


def test_a_small_decoder_given_by_name_may_lie_elsewhere(saved: Folders, tmp_path: Path) -> None:
    """An option of the export, with the folder's own parameters in the plan."""
    small = tiny_conditioned.small_decoder(tmp_path / "elsewhere")
    options = DiffusionOptions(tiny_vae=str(tmp_path / "elsewhere"))
    plan = plan_diffusion(read_source(saved["control-sd"][1]), options)
    assert plan.parts[-1].parameters == sum(weight.numel() for weight in small.decoder.parameters())


def test_a_small_decoder_of_another_model_is_refused(saved: Folders, tmp_path: Path) -> None:
    """Another number of channels or another enlargement, or another class of network."""
    recipe, jobs = contract(saved["inpaint-sd"][1])
    parts = tuple(jobs.values())
    wide = {"latent_channels": 16}
    deep = {"decoder_block_out_channels": [4, 4, 4, 4]}
    for number, fields in enumerate((wide, deep)):
        folder = tmp_path / str(number)
        tiny_conditioned.small_decoder(folder, **fields)
        with pytest.raises(BadSource, match="made for another model"):
            with_tiny_decoder(recipe, parts, folder)
    with pytest.raises(BadSource, match="AutoencoderKL"):
        with_tiny_decoder(recipe, parts, saved["inpaint-sd"][1] / "vae")
    silent = msgspec.structs.replace(recipe, stages=(msgspec.structs.replace(recipe.stages[0], decode=None),))
    with pytest.raises(UnsupportedModel, match="decodes nothing"):
        with_tiny_decoder(silent, parts, tmp_path / "0")


def test_autoencoders_of_other_models_are_read_alike() -> None:
    """Sixteen channels, a shift and no quantising convolution, as SD3 and FLUX have them."""
    config = {"block_out_channels": [4] * 4, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    vae = Autoencoder.of("AutoencoderKL", config)
    assert (vae.channels, vae.factor, vae.scale, vae.shift) == (16, 8, 0.3611, 0.1159)
    init, decode = vae.init(1024, 512), vae.decode()
    assert (init.height, init.width, init.channels, init.downscale) == (1024, 512, 16, 8)
    assert (init.scale, init.shift, decode.scale, decode.shift) == (0.3611, 0.1159, 0.3611, 0.1159)
    assert vae.decoder_job("vae").inputs[0].shape == ("batch", 16, "height", "width")
    with pytest.raises(UnsupportedModel, match="AutoencoderDC"):
        Autoencoder.of("AutoencoderDC", config)


def test_an_autoencoder_must_have_the_denoisers_channels(saved: Folders) -> None:
    """Where a family says how many its sample has."""
    source = read_source(saved["control-sd"][1])
    assert autoencoder(source, 4).kind == "AutoencoderTiny"
    with pytest.raises(UnsupportedModel, match="4 latent channels, the denoiser 16"):
        autoencoder(source, 16)


def test_a_pooled_text_encoder_gives_what_flux_takes(saved: Folders) -> None:
    """`pooler_output` of a CLIP text model, for families that ask for it by that builder."""
    pipeline, folder = saved["control-sd"]
    source = Source(folder, "diffusion", read_source(folder).index)
    job = clip_job(source, "text_encoder", "Pooled")
    ids = torch.from_numpy(np.arange(16)[None])
    with torch.no_grad():
        given = Pooled(folder / "text_encoder")(ids)
    torch.testing.assert_close(given, pipeline.text_encoder(ids).pooler_output)
    assert (job.outputs[0].name, tuple(given.shape)) == ("pooler_output", (1, job.outputs[0].shape[1]))


@pytest.mark.parametrize(("stated", "wanted"), [(64, (64, 64)), ([48, 80], (48, 80))])
def test_a_sample_size_is_a_number_or_two(stated: Any, wanted: tuple[int, int]) -> None:
    """As configs write it: height, then width."""
    assert sides(stated) == wanted
