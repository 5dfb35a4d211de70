"""PixArt-alpha and -delta (Chen et al. 2024): T5, a diffusion transformer, LCMScheduler in one to eight steps.

PixArt-delta is the latent-consistency form of PixArt-alpha; it needs no guidance (scale 1) and bears a little. Models
of 1024 pixels are told the picture's size and aspect. The transformer predicts noise and variance; the noise is kept.

With a ControlNet in the folder (PixArt-delta's ControlNet-Transformer) the transformer's graph also takes the latent of
a control picture, encoded once, and how closely to follow it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edgekit.bundle.manifest import TensorSpec
from edgekit.bundle.recipe import Call, Denoise, Guidance, Recipe, Stage
from edgekit.errors import UnsupportedModel
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.dit import NETWORKS, PART, denoiser_job, in_patches
from edgekit.export.families.parts import autoencoder, component, f32, vae_jobs
from edgekit.export.families.schedulers import lcm_sampler, refuse, scheduler_config
from edgekit.export.families.texts import pads_right, t5_job, t5_width
from edgekit.export.sources import Source

PIPELINES = ("PixArtAlphaPipeline", "PixArtAlphaControlnetPipeline")  # the second: diffusers' research project pixart
CONTROL = "edgekit.export.families.networks_pixart_control"
LEGAL_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
LENGTH = 120  # PixArtAlphaPipeline's max_sequence_length
TOLD_SIZE = 128  # latent sides of the model that PixArtAlphaPipeline tells the size of the picture


def matches(source: Source) -> bool:
    """PixArtAlphaPipeline, with or without a ControlNet, and LCMScheduler."""
    return source.index.get("_class_name") in PIPELINES and source.class_of("scheduler") == "LCMScheduler"


def recipe(source: Source) -> Recipe:
    """Four steps by default. Raises BadSource, UnsupportedModel."""
    config = _transformer(source)
    channels, vae = config["in_channels"], autoencoder(source, config["in_channels"])
    feeds = {
        "sample": "@x",
        "timestep": "@t",
        "encoder_hidden_states": "text_encoder.last_hidden_state",
        "encoder_attention_mask": "@mask",
    }
    if config["sample_size"] == TOLD_SIZE:
        feeds |= {"resolution": "@size", "aspect_ratio": "@aspect"}
    conditions = [Call("text_encoder", {"input_ids": "@tokens", "attention_mask": "@mask"})]
    if _controlled(source, config):
        feeds |= {"control_latent": "vae_encoder.latent_sample", "control_scale": "@control_scale"}
        conditions.append(Call("control_picture", {"control": "@control"}))
        conditions.append(Call("vae_encoder", {"sample": "control_picture.sample"}))
    side = config["sample_size"] * vae.factor
    stage = Stage(
        name="base",
        init=in_patches(vae.init(side, side), config["patch_size"]),
        sampler=lcm_sampler(scheduler_config(source), LEGAL_STEPS, steps=4),
        denoise=Denoise(PART, feeds, "out_sample", keep_channels=channels),
        guidance=Guidance(kind="cfg", scale=1.0, minimum=1.0, maximum=4.5),
        decode=vae.decode(),
    )
    return Recipe(stages=(stage,), conditions=tuple(conditions))


def jobs(source: Source) -> tuple[PartJob, ...]:
    """T5, the transformer, decoder and encoder; for a ControlNet the unit of its picture. As `recipe` raises."""
    config = _transformer(source)
    channels, controlled = config["in_channels"], _controlled(source, config)
    inputs = [
        f32("encoder_hidden_states", "batch", LENGTH, t5_width(source, "text_encoder")),
        TensorSpec("encoder_attention_mask", "int64", ("batch", LENGTH)),
    ]
    fill = {"encoder_attention_mask": (0.0, 2.0)}
    if config["sample_size"] == TOLD_SIZE:
        inputs += [f32("resolution", "batch", 2), f32("aspect_ratio", "batch", 1)]
        fill |= {"resolution": (256.0, 1024.0), "aspect_ratio": (0.5, 2.0)}
    if controlled:
        inputs += [f32("control_latent", "batch", channels, "height", "width"), f32("control_scale", "batch")]
        fill["control_scale"] = (0.5, 1.5)
    network = f"{CONTROL}:ControlledPixArt" if controlled else f"{NETWORKS}:PixArt"
    transformer = denoiser_job(network, channels, tuple(inputs), gives=config["out_channels"], fill=fill)
    text, vae = t5_job(source, "text_encoder", LENGTH, masked=True), vae_jobs(source, channels)
    if not controlled:
        return (text, transformer, *vae)
    return (text, _picture_job(vae[1]), msgspec.structs.replace(transformer, beside=("controlnet",)), *vae)


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """T5's, on prompts in lower case. Raises BadSource, UnsupportedModel."""
    pads_right(source, "tokenizer")
    return {"default": PromptTokenizer("tokenizer", LENGTH, lower=True)}


def _transformer(source: Source) -> dict[str, Any]:
    config = component(source, "transformer", ("PixArtTransformer2DModel", "Transformer2DModel"))
    told = config.get("sample_size") == TOLD_SIZE
    plain: dict[str, tuple[Any, ...]] = {"norm_type": ("ada_norm_single",), "attention_type": ("default",)}
    plain |= {"patch_size": (2,), "use_additional_conditions": (None, told)}
    refuse("transformer", config, plain)
    return config


def _controlled(source: Source, transformer: dict[str, Any]) -> bool:
    """Whether there is a ControlNet, which must be one that fits. Raises BadSource, UnsupportedModel."""
    if source.class_of("controlnet") is None and source.index.get("_class_name") == PIPELINES[0]:
        return False
    config = component(source, "controlnet", ("PixArtControlNetAdapterModel",))
    copies, blocks = config.get("num_layers"), transformer["num_layers"]
    if not isinstance(copies, int) or not 1 <= copies < blocks:
        raise UnsupportedModel(
            f"controlnet: num_layers is {copies!r}; each of its blocks adds to what a later one of the transformer's "
            f"{blocks} takes, so only 1 to {blocks - 1} is exported"
        )
    return True


def _picture_job(encoder: PartJob) -> PartJob:
    """From a control picture in [0, 1] to what the encoder takes, so that it needs no graph of its own for this."""
    picture = encoder.inputs[0]
    return PartJob(
        part="control_picture",
        network=f"{CONTROL}:ControlPicture",
        folder="",
        inputs=(msgspec.structs.replace(picture, name="control"),),
        outputs=(picture,),
        sizes=encoder.sizes,
        fill={"control": (0.0, 1.0)},
    )


FAMILY = Family("pixart", "text-to-image", matches, recipe, jobs, tokenizers)
