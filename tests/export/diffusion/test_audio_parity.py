"""Sound end to end: diffusers' AudioLDM in torch against a bundle that runs without it, from the same seed."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from edgekit.bundle import catalogue
from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest, BadSource, IllegalSteps, UnknownFamily, UnsupportedModel
from edgekit.export.families import family_of
from edgekit.export.families.audioldm import jobs, recipe, tokenizers
from edgekit.export.families.export import DiffusionOptions, plan_diffusion
from edgekit.export.families.networks_audio import Clap, Vocoder
from edgekit.export.sources import read_source
from edgekit.runtime.diffusion.pipeline import DrawResult, FewStepPipeline
from tests.export.diffusion.conftest import Exported, export_folder
from tests.export.diffusion.rescheduled import rescheduled
from tests.export.diffusion.test_families import edited
from tests.export.diffusion.tiny_audio import (
    BINS,
    CHANNELS,
    GOLDEN,
    GOLDEN_CALL,
    LENGTH,
    NEGATIVE,
    PROMPT,
    RATE,
    ROWS,
    SEED,
    audioldm,
    ddim_scheduler,
    in_torch,
    save_folder,
    vocoder,
)
from tests.export.diffusion.tiny_pipelines import FOREIGN

pytestmark = FOREIGN

LIMIT = 1e-5  # of max|x|, for latents and for sound
HOP = 16  # samples of sound per frame of a spectrogram


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny AudioLDM with LCMScheduler and its bundle, made without diffusers' pipeline."""
    root = tmp_path_factory.mktemp("audioldm")
    return export_folder("audioldm", None, save_folder(root / "folder"), root / "bundle")


@pytest.fixture(scope="module")
def example(made: Exported) -> Exported:
    """The same beside diffusers' own pipeline of that folder."""
    return Exported(made.name, audioldm(made.folder), made.folder, made.bundle, made.said)


@pytest.fixture(scope="module")
def ddim(example: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same networks under the published DDIMScheduler, in a folder that the pipeline itself saved."""
    return rescheduled(example, ddim_scheduler(), tmp_path_factory.mktemp("ddim"))


def in_bundle(bundle: Bundle, **changes: Any) -> DrawResult:
    """What the torch-free runtime makes of the prompt."""
    with FewStepPipeline(bundle) as model:
        return model.generate(PROMPT, seed=SEED, seed_mode="torch-cpu", **changes)


def assert_same(ours: DrawResult, latents: np.ndarray, sound: np.ndarray) -> None:
    """Latents and sound to LIMIT of their largest value, and sound that is neither silent nor cut off."""
    assert ours.latents is not None
    assert ours.audio is not None
    assert ours.latents.shape == latents.shape
    assert np.abs(ours.latents - latents).max() <= LIMIT * np.abs(latents).max()
    assert ours.audio.shape == (len(sound), 1, sound.shape[1])
    assert np.abs(ours.audio[:, 0] - sound).max() <= LIMIT * np.abs(sound).max()
    assert sound.std() > 0.05
    assert np.abs(sound).max() < 0.9


@pytest.mark.parametrize(
    ("steps", "batch", "guidance", "negative", "seconds"),
    [
        (1, 1, 1.0, "", 0.2),
        (2, 2, 1.0, "", 0.53),  # an odd number of frames, so half a row is cut off
        (4, 1, 2.0, NEGATIVE, 0.5),
        (8, 2, 2.5, "", 1.0),
    ],
)
def test_the_same_seed_makes_the_sound_diffusers_makes(
    example: Exported, steps: int, batch: int, guidance: float, negative: str, seconds: float
) -> None:
    """LCM: steps, batches, guidance with and without a negative prompt, and lengths are diffusers'."""
    asked = {"num_inference_steps": steps, "guidance_scale": guidance, "audio_length_in_s": seconds}
    theirs = in_torch(example.pipeline, batch, negative_prompt=[negative] * batch, **asked)
    ours = in_bundle(example.bundle, steps=steps, batch=batch, guidance=guidance, negative=negative, seconds=seconds)
    assert_same(ours, *theirs)
    assert theirs[1].shape == (batch, round(seconds * RATE))


@pytest.mark.parametrize(("steps", "seconds"), [(5, 0.3), (10, None), (15, 0.4)])
def test_ddim_makes_the_sound_diffusers_makes(ddim: Exported, steps: int, seconds: float | None) -> None:
    """DDIM: a leading grid with the pipeline's own guidance, at any length and at the model's own."""
    theirs = in_torch(ddim.pipeline, num_inference_steps=steps, audio_length_in_s=seconds)
    assert_same(in_bundle(ddim.bundle, steps=steps, seconds=seconds), *theirs)


def test_ddim_on_a_trailing_grid_makes_the_sound_diffusers_makes(ddim: Exported, tmp_path: Path) -> None:
    """The other spacing, ending in no noise at all."""
    scheduler = ddim_scheduler(timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True)
    trailing = rescheduled(ddim, scheduler, tmp_path)
    theirs = in_torch(trailing.pipeline, 2, num_inference_steps=8, guidance_scale=4.0, audio_length_in_s=0.2)
    assert_same(in_bundle(trailing.bundle, steps=8, guidance=4.0, seconds=0.2, batch=2), *theirs)


def test_the_sound_of_a_pipeline_that_may_be_gone_is_kept(made: Exported) -> None:
    """Latents and sound that the pipeline once made of these weights, frozen."""
    frozen = np.load(GOLDEN)
    ours = in_bundle(
        made.bundle,
        steps=GOLDEN_CALL["num_inference_steps"],
        guidance=GOLDEN_CALL["guidance_scale"],
        seconds=GOLDEN_CALL["audio_length_in_s"],
        negative=NEGATIVE,
    )
    assert_same(ours, frozen["latents"], frozen["sound"])


def test_the_file_holds_what_was_made(example: Exported, tmp_path: Path) -> None:
    """16-bit WAV at the vocoder's rate, as long as asked, one file each, within one unit of diffusers' sound."""
    _, sound = in_torch(example.pipeline, 2, num_inference_steps=2, guidance_scale=1.0, audio_length_in_s=0.25)
    ours = in_bundle(example.bundle, steps=2, seconds=0.25, batch=2)
    for number in range(2):
        with wave.open(str(ours.save(tmp_path / f"{number}.wav", number))) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)
        assert samples.shape == (400,)
        assert np.abs(samples - np.round(sound[number].astype(np.float64) * 32767)).max() <= 1


def test_sound_is_never_shorter_than_asked(example: Exported) -> None:
    """Where diffusers rounds 0.29 s down to 28 frames and gives 28 frames of sound, a row more is drawn and cut."""
    _, sound = in_torch(example.pipeline, num_inference_steps=1, guidance_scale=1.0, audio_length_in_s=0.29)
    ours = in_bundle(example.bundle, steps=1, seconds=0.29)
    assert sound.shape[1] <= 28 * HOP + 1
    assert ours.audio is not None
    assert ours.audio.shape == (1, 1, round(0.29 * RATE))


def test_every_prompt_and_seed_has_its_own_sound(example: Exported) -> None:
    """The text reaches the UNet, as its length-one vector, and noise differs within a batch."""
    with FewStepPipeline(example.bundle) as model:
        first = model.generate(PROMPT, steps=2, batch=2, seed=1).audio
        other = model.generate("an old house", steps=2, seed=1).audio
    assert first is not None
    assert other is not None
    assert np.abs(first[0] - first[1]).max() > 0.1
    assert np.abs(first[0] - other[0]).max() > 1e-3


def test_a_long_prompt_is_cut_as_diffusers_cuts_it(example: Exported) -> None:
    """Beyond the tokenizer's length the closing token stays."""
    prompt = " ".join([PROMPT] * 5)
    generator = torch.Generator("cpu").manual_seed(SEED)
    theirs = example.pipeline(
        prompt, generator=generator, num_inference_steps=1, guidance_scale=1.0, audio_length_in_s=0.2
    )
    with FewStepPipeline(example.bundle) as model:
        ours = model.generate(prompt, steps=1, seconds=0.2, seed=SEED, seed_mode="torch-cpu")
    assert ours.audio is not None
    assert np.abs(ours.audio[:, 0] - theirs.audios).max() <= LIMIT * np.abs(theirs.audios).max()


def test_the_text_is_a_vector_of_length_one(example: Exported) -> None:
    """AudioLDM normalises the projected embedding; the graph does it."""
    words = example.pipeline.tokenizer([PROMPT, NEGATIVE], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        ours = Clap(example.folder / "text_encoder")(words.input_ids, words.attention_mask)
        raw = example.pipeline.text_encoder(**words).text_embeds
    assert torch.allclose(ours.norm(dim=-1), torch.ones(2))
    assert torch.allclose(ours, functional.normalize(raw, dim=-1), atol=1e-6)
    assert (raw.norm(dim=-1) - 1).abs().min() > 0.01


OLDER = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


@pytest.mark.parametrize("older", [False, True], ids=["parametrizations", "weight_g"])
def test_weight_norm_of_a_vocoder_is_folded(tmp_path: Path, older: bool) -> None:
    """A vocoder saved with weight norm on, in either spelling, makes the sound it makes, by plain weights."""
    normed = vocoder(normalize_before=True)
    normed.mean.normal_()
    normed.apply_weight_norm()
    with torch.no_grad():
        for name, parameter in normed.named_parameters():
            if name.endswith("original0"):
                parameter.mul_(1.5)
    normed.save_pretrained(tmp_path)
    if older:
        file = tmp_path / "model.safetensors"
        stored = load_file(file)
        for new, old in OLDER.items():
            stored = {name.replace(new, old): value for name, value in stored.items()}
        save_file(stored, file, {"format": "pt"})
    mel = torch.randn(2, 1, 5, BINS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, made = normed(mel.squeeze(1)), Vocoder(tmp_path)
        assert torch.allclose(made(mel), theirs, atol=1e-6)
    assert theirs.std() > 0.05
    assert not any("original" in name for name, _ in made.named_parameters())


def test_a_vocoder_of_other_weights_is_a_bad_source(tmp_path: Path) -> None:
    """A weight that is missing, and one of another shape, are named; transformers would draw them at random."""
    vocoder().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    save_file({name: value for name, value in stored.items() if name != "conv_pre.bias"}, file, {"format": "pt"})
    with pytest.raises(BadSource, match=r"conv_pre\.bias"):
        Vocoder(tmp_path)
    save_file({**stored, "conv_pre.bias": torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(BadSource, match=r"conv_pre\.bias"):
        Vocoder(tmp_path)


def test_the_recipe_of_a_distilled_audioldm(example: Exported) -> None:
    """Steps, betas, guidance, shape, scale, rate and the model's own length come from the configs."""
    contract = recipe(read_source(example.folder))
    base, sound = contract.stages
    assert base.sampler.noise_schedule is not None
    assert (base.sampler.kind, base.sampler.steps, base.sampler.noise_schedule.beta_end) == ("lcm", 4, 0.0195)
    assert (base.guidance.kind, base.guidance.scale, base.guidance.maximum) == ("cfg", 1.0, 2.5)
    assert (base.init.shape, base.init.length) == ((CHANNELS, "length", BINS // 2), ROWS)
    assert base.init.downscale == 2 * HOP
    assert base.decode is not None
    assert base.decode.scale == 0.92
    assert (sound.sampler.kind, sound.denoise.feeds) == ("direct", {"mel": "@previous"})
    assert (contract.media.kind, contract.media.rate) == ("audio", RATE)
    assert tokenizers(read_source(example.folder))["default"].length == LENGTH


PUBLISHED: dict[str, dict[str, Any]] = {
    "text_encoder/config.json": {"max_position_embeddings": 514, "projection_dim": 512},
    "tokenizer/tokenizer_config.json": {"model_max_length": 512},
    "unet/config.json": {
        "sample_size": 128,
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": [128, 256, 384, 640],
        "cross_attention_dim": [128, 256, 384, 640],
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
        "projection_class_embeddings_input_dim": 512,
    },
    "vae/config.json": {"latent_channels": 8, "block_out_channels": [128, 256, 512], "scaling_factor": 0.9227914},
    "vocoder/config.json": {
        "model_in_dim": 64,
        "sampling_rate": 16000,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    },
}


def test_the_published_configs_give_the_entry_of_the_catalogue(made: Exported, tmp_path: Path) -> None:
    """A folder of audioldm-s-full-v2's sizes under LCMScheduler is what the catalogue holds, signatures and all."""
    source, entry = read_source(edited(made.folder, tmp_path / "m", PUBLISHED)), catalogue.entry("audioldm")
    assert recipe(source) == entry.recipe
    found = {job.part: job for job in jobs(source)}
    assert {part: job.inputs for part, job in found.items()} == {
        name: each.inputs for name, each in entry.parts.items()
    }
    assert {name: each.length for name, each in tokenizers(source).items()} == entry.tokenizers
    sizes = found["vocoder"].sizes  # ten milliseconds a frame, and 32 samples that hang over at the end
    assert sizes["samples"] == tuple(160 * frames + 32 for frames in sizes["mel_frames"])


def test_the_recipe_of_the_undistilled_model(ddim: Exported) -> None:
    """A leading grid with its offset, ten steps, guidance 2.5, and a last row that keeps the schedule's first noise."""
    sampler, guidance = (stage := recipe(read_source(ddim.folder)).stages[0]).sampler, stage.guidance
    assert sampler.grid is not None
    assert (sampler.kind, sampler.steps, sampler.grid.spacing, sampler.grid.offset) == ("ddim", 10, "leading", 1)
    assert not sampler.final_alpha_one
    assert (guidance.scale, guidance.maximum) == (2.5, 10.0)


def test_requests_outside_the_contract_are_refused(example: Exported) -> None:
    """Steps it was not distilled for, a picture's size, tiles, too much guidance."""
    with FewStepPipeline(example.bundle) as model:
        with pytest.raises(IllegalSteps):
            model.generate(PROMPT, steps=50)
        for option, value in {"width": 64, "tile": 64, "guidance": 9.0, "seconds": -1.0, "frames": 3}.items():
            with pytest.raises(BadRequest, match=option):
                model.generate(PROMPT, **{option: value})


REFUSALS = {
    "another class embedding": ("unet/config.json", "class_embed_type", "projection"),
    "no class embedding": ("unet/config.json", "class_embed_type", None),
    "another width of text": ("unet/config.json", "projection_class_embeddings_input_dim", 48),
    "attention to a text": ("unet/config.json", "cross_attention_dim", [8, 32]),
    "a guidance embedding": ("unet/config.json", "time_cond_proj_dim", 32),
    "a picture's conditions": ("unet/config.json", "addition_embed_type", "text"),
    "other latents": ("unet/config.json", "in_channels", 9),
    "pictures": ("vae/config.json", "out_channels", 3),
    "latents with their own mean": ("vae/config.json", "latents_mean", [0.0] * CHANNELS),
    "bins that make no whole latent": ("vocoder/config.json", "model_in_dim", 9),
    "another padding": ("text_encoder/config.json", "pad_token_id", 0),
    "padding on the left": ("tokenizer/tokenizer_config.json", "padding_side", "left"),
    "thresholding": ("scheduler/scheduler_config.json", "thresholding", True),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_modelled_is_refused_by_name(made: Exported, tmp_path: Path, what: str) -> None:
    """The field, or what it would mean, is named in the error."""
    file, field, value = REFUSALS[what]
    source = read_source(edited(made.folder, tmp_path / "m", {file: {field: value}}))
    with pytest.raises(UnsupportedModel, match="channels" if field == "in_channels" else field):
        (recipe(source), jobs(source), tokenizers(source))


def test_ddim_on_another_grid_is_refused_by_name(ddim: Exported, tmp_path: Path) -> None:
    """`linspace` is neither the published grid nor a distilled model's."""
    changes = {"scheduler/scheduler_config.json": {"timestep_spacing": "linspace"}}
    with pytest.raises(UnsupportedModel, match="timestep_spacing"):
        recipe(read_source(edited(ddim.folder, tmp_path / "m", changes)))


def test_another_scheduler_is_no_family(made: Exported, tmp_path: Path) -> None:
    """A sampler whose contract is not modelled leads to the list of families."""
    source = read_source(
        edited(made.folder, tmp_path / "m", {"model_index.json": {"scheduler": ["diffusers", "PNDMScheduler"]}})
    )
    with pytest.raises(UnknownFamily, match="audioldm"):
        family_of(source)


def test_a_small_decoder_of_pictures_has_no_place_here(made: Exported, tmp_path: Path) -> None:
    """What TAESD draws is no spectrogram, even with as many channels and levels."""
    small = diffusers.AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    small.save_pretrained(tmp_path / "taesd")
    with pytest.raises(UnsupportedModel, match="single pictures"):
        plan_diffusion(read_source(made.folder), DiffusionOptions(tiny_vae=str(tmp_path / "taesd")))
