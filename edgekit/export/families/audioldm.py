"""AudioLDM (Liu et al. 2023, arXiv 2301.12503): sound from text by latent diffusion on mel spectrograms.

With LCMScheduler it is a UNet distilled to consistency (Luo et al. 2023, arXiv 2310.04378), for one to eight steps;
with DDIMScheduler the undistilled contract. The sample's height is time: a latent row is `factor * hop` samples of
sound, the autoencoder decodes to a spectrogram, and a stage of its own, the vocoder, makes the sound.

A request's seconds become as many whole latent rows as it takes, and the sound is cut to its length. diffusers first
cuts the seconds to whole frames of the spectrogram; where that leaves a row less, its sound is shorter than was asked.
"""

from __future__ import annotations

from math import prod
from typing import Any

import msgspec

from edgekit.bundle.manifest import Dim
from edgekit.bundle.recipe import Call, Denoise, Grid, Guidance, Init, Media, Recipe, Sampler, Stage
from edgekit.errors import UnsupportedModel
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.parts import BATCH, HEIGHT, TIME, Autoencoder, autoencoder, component, f32, sides
from edgekit.export.families.parts import NETWORKS as SHARED
from edgekit.export.families.schedulers import ddim_sampler, lcm_sampler, refuse, scheduler_config
from edgekit.export.families.texts import pads_right, text_job
from edgekit.export.sources import Source, read_json_if_any

NETWORKS = "edgekit.export.families.networks_audio"
SCHEDULERS = ("LCMScheduler", "DDIMScheduler")
LCM_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
DDIM_STEPS = (5, 8, 10, 15, 20, 25, 30, 40, 50, 100)
SCALE = 2.5  # AudioLDMPipeline's default; a distilled model needs none of it, and bears as much
MOST = 10.0  # what the undistilled model bears
PADDING = 1  # RoBERTa's id; positions are counted from behind it


def matches(source: Source) -> bool:
    """AudioLDMPipeline with LCMScheduler or DDIMScheduler."""
    return source.index.get("_class_name") == "AudioLDMPipeline" and source.class_of("scheduler") in SCHEDULERS


def recipe(source: Source) -> Recipe:
    """Four LCM steps without guidance, or ten of DDIM at 2.5; then the vocoder.

    Raises:
        BadSource, UnsupportedModel: a component or setting that is not modelled.
    """
    unet, vae, vocoder = _unet(source), _vae(source), _vocoder(source)
    sampler, guidance = _contract(source)
    hop = prod(vocoder["upsample_rates"])
    base = Stage(
        name="base",
        init=Init(
            channels=vae.channels,
            downscale=vae.factor * hop,
            shape=(vae.channels, "length", vocoder["model_in_dim"] // vae.factor),
            length=sides(unet["sample_size"])[0],
        ),
        sampler=sampler,
        denoise=Denoise(
            part="unet",
            feeds={"sample": "@x", "timestep": "@t", "class_labels": "text_encoder.text_embeds"},
            output="out_sample",
        ),
        guidance=guidance,
        decode=vae.decode(),
    )
    sound = Stage(
        name="vocoder",
        init=Init(kind="previous", channels=1, downscale=1),
        sampler=Sampler(kind="direct", steps=1, legal_steps=(1,)),
        denoise=Denoise("vocoder", {"mel": "@previous"}, "waveform"),
    )
    return Recipe(
        stages=(base, sound),
        conditions=(Call("text_encoder", {"input_ids": "@tokens", "attention_mask": "@mask"}),),
        media=Media("audio", float(vocoder["sampling_rate"])),
    )


def jobs(source: Source) -> tuple[PartJob, ...]:
    """CLAP's text encoder, UNet, decoder of spectrograms, vocoder. Raises BadSource, UnsupportedModel."""
    text = _text(source)
    embedding = f32("text_embeds", "batch", text["projection_dim"])
    encoder = text_job("text_encoder", "Clap", _length(source), text["vocab_size"], (embedding,))
    encoder = msgspec.structs.replace(encoder, network=f"{NETWORKS}:Clap", lora=None)
    return (encoder, _unet_job(source), _decoder_job(source), _vocoder_job(source))


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """RoBERTa's. Raises BadSource, UnsupportedModel."""
    pads_right(source, "tokenizer")
    return {"default": PromptTokenizer("tokenizer", _length(source))}


def _contract(source: Source) -> tuple[Sampler, Guidance]:
    config = scheduler_config(source)
    if source.class_of("scheduler") == "LCMScheduler":
        return lcm_sampler(config, LCM_STEPS, steps=4), Guidance(kind="cfg", scale=1.0, maximum=SCALE)
    spacing = config.get("timestep_spacing", "leading")
    refuse("scheduler", config, {"timestep_spacing": ("leading", "trailing")})
    sampler = ddim_sampler({**config, "timestep_spacing": "trailing"}, DDIM_STEPS, steps=10)
    if spacing == "leading":
        grid = Grid(spacing="leading", offset=int(config.get("steps_offset", 0)))
        sampler = msgspec.structs.replace(sampler, grid=grid)
    return sampler, Guidance(kind="cfg", scale=SCALE, maximum=MOST)


def _text(source: Source) -> dict[str, Any]:
    config = component(source, "text_encoder", ("ClapTextModelWithProjection",))
    refuse("text_encoder", config, {"pad_token_id": (PADDING,)})
    return config


def _length(source: Source) -> int:
    """How many ids a prompt has: the tokenizer's own maximum, and no more than there are positions."""
    positions = int(_text(source)["max_position_embeddings"]) - PADDING - 1
    told = read_json_if_any(source.root / "tokenizer" / "tokenizer_config.json").get("model_max_length", positions)
    return min(int(told), positions)


def _unet(source: Source) -> dict[str, Any]:
    """The UNet's config, if all it asks for is fed."""
    config = component(source, "unet", ("UNet2DConditionModel",))
    plain: dict[str, tuple[Any, ...]] = dict.fromkeys(
        ("time_cond_proj_dim", "encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type", "num_class_embeds"),
        (None,),
    )
    plain |= {
        "dual_cross_attention": (False,),
        "attention_type": ("default",),
        "class_embed_type": ("simple_projection",),
    }
    plain |= {"projection_class_embeddings_input_dim": (_text(source)["projection_dim"],)}
    refuse("unet", {"class_embed_type": None, **config}, plain)
    if config["in_channels"] != config["out_channels"]:
        raise UnsupportedModel(
            f"unet takes {config['in_channels']} channels and gives {config['out_channels']}: only as many is exported"
        )
    widths, levels = config.get("cross_attention_dim"), config["block_out_channels"]
    for kind, width, own in zip(
        config["down_block_types"], widths if isinstance(widths, list) else [widths] * len(levels), levels, strict=True
    ):
        if "CrossAttn" in kind and width not in (own, None):
            raise UnsupportedModel(
                f"unet: cross_attention_dim is {widths}; its attention sees only the sample, whose widths are {levels}"
            )
    return config


def _vae(source: Source) -> Autoencoder:
    """The autoencoder of spectrograms, if it fits UNet and vocoder."""
    refuse("vae", component(source, "vae", ("AutoencoderKL",)), {"in_channels": (1,), "out_channels": (1,)})
    vae, bins = autoencoder(source, _unet(source)["in_channels"]), _vocoder(source)["model_in_dim"]
    if bins % vae.factor:
        raise UnsupportedModel(f"vocoder: model_in_dim is {bins}; the vae needs a multiple of {vae.factor}")
    return vae


def _vocoder(source: Source) -> dict[str, Any]:
    return component(source, "vocoder", ("SpeechT5HifiGan",))


def _latent(source: Source, vae: Autoencoder) -> tuple[Dim, ...]:
    return ("batch", vae.channels, "length", _vocoder(source)["model_in_dim"] // vae.factor)


def _unet_job(source: Source) -> PartJob:
    config, latent = _unet(source), _latent(source, _vae(source))
    labels = f32("class_labels", "batch", config["projection_class_embeddings_input_dim"])
    return PartJob(
        part="unet",
        network=f"{NETWORKS}:LabelledUNet",
        folder="unet",
        inputs=(f32("sample", *latent), f32("timestep", "batch"), labels),
        outputs=(f32("out_sample", *latent),),
        sizes={"batch": BATCH, "length": HEIGHT},
        fill={"timestep": TIME},
        lora="unet",
    )


def _decoder_job(source: Source) -> PartJob:
    """`latent_sample` (batch, channels, length, width) to `sample`, a log-mel spectrogram (batch, 1, frames, bins)."""
    vae, bins = _vae(source), _vocoder(source)["model_in_dim"]
    rows = HEIGHT[1:]
    return PartJob(
        part="vae_decoder",
        network=f"{SHARED}:Decoder",
        folder="vae",
        inputs=(f32("latent_sample", *_latent(source, vae)),),
        outputs=(f32("sample", "batch", 1, "mel_frames", bins),),
        sizes={"batch": BATCH[:2], "length": rows, "mel_frames": tuple(vae.factor * size for size in rows)},
        weights=("decoder.", "post_quant_conv."),
    )


def _vocoder_job(source: Source) -> PartJob:
    """`mel` (batch, 1, frames, bins) to `waveform` (batch, samples)."""
    config = _vocoder(source)
    return PartJob(
        part="vocoder",
        network=f"{NETWORKS}:Vocoder",
        folder="vocoder",
        inputs=(f32("mel", "batch", 1, "mel_frames", config["model_in_dim"]),),
        outputs=(f32("waveform", "batch", "samples"),),
        sizes={"batch": BATCH, "mel_frames": HEIGHT, "samples": tuple(_samples(config, size) for size in HEIGHT)},
    )


def _samples(config: dict[str, Any], frames: int) -> int:
    """How many samples a vocoder makes: each transposed convolution multiplies, and an odd overhang adds one."""
    for rate, kernel in zip(config["upsample_rates"], config["upsample_kernel_sizes"], strict=True):
        frames = frames * rate + (kernel - rate) % 2
    return frames


FAMILY = Family("audioldm", "text-to-audio", matches, recipe, jobs, tokenizers)
