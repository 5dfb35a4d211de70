"""AnimateDiff distilled to a few steps: a Stable Diffusion UNet that attends over time, decoded frame by frame.

AnimateLCM (Wang et al. 2024) is the folder with LCMScheduler, AnimateDiff-Lightning (Lin & Yang 2024) the one with
Euler steps on a trailing grid. The UNet is a UNetMotionModel, as `save_pretrained` writes it, or a UNet2DConditionModel
with a MotionAdapter beside it, as the hub keeps them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edgekit.bundle.manifest import Dim
from edgekit.bundle.recipe import Call, Denoise, Guidance, Init, Media, Recipe, Sampler, Stage
from edgekit.errors import UnsupportedModel
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.parts import (
    BATCH,
    HEIGHT,
    LENGTH,
    TIME,
    WIDTH,
    autoencoder,
    component,
    f32,
    sides,
    text_jobs,
)
from edgekit.export.families.schedulers import euler_sampler, lcm_sampler, refuse, scheduler_config
from edgekit.export.sources import Source

NETWORKS = "edgekit.export.families.networks_video"
UNETS = {"UNetMotionModel": "MotionUNet", "UNet2DConditionModel": "AdaptedUNet"}  # class -> builder in NETWORKS
LCM_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
LIGHTNING_STEPS = (1, 2, 4, 8)  # there is a checkpoint for each
FRAMES = 16  # what motion modules are trained on, 8 a second
FRAME_RATE = 8.0


def matches(source: Source) -> bool:
    """An AnimateDiff pipeline with LCMScheduler, or with Euler on a trailing grid."""
    if source.index.get("_class_name") != "AnimateDiffPipeline":
        return False
    if source.class_of("scheduler") == "LCMScheduler":
        return True
    euler = source.class_of("scheduler") == "EulerDiscreteScheduler"
    return euler and scheduler_config(source).get("timestep_spacing") == "trailing"


def recipe(source: Source) -> Recipe:
    """Six LCM steps with guidance 2, or four Euler steps without. Raises BadSource, UnsupportedModel."""
    unet = _unet(source)
    channels = unet["in_channels"]
    vae = autoencoder(source, channels)
    height, width = (side * vae.factor for side in sides(unet["sample_size"]))
    sampler, guidance = _contract(source)
    stage = Stage(
        name="base",
        init=Init(
            channels=channels,
            downscale=vae.factor,
            height=height,
            width=width,
            shape=(channels, "frames", "height", "width"),
            frames=min(FRAMES, _positions(source)),
        ),
        sampler=sampler,
        denoise=Denoise(
            part="unet",
            feeds={
                "sample": "@x",
                "timestep": "@t",
                "encoder_hidden_states": "text_encoder.last_hidden_state",
            },
            output="out_sample",
        ),
        guidance=guidance,
        decode=msgspec.structs.replace(vae.decode(), per_frame=True),
    )
    return Recipe(
        stages=(stage,),
        conditions=(Call("text_encoder", {"input_ids": "@tokens"}),),
        media=Media("video", FRAME_RATE),
    )


def jobs(source: Source) -> tuple[PartJob, ...]:
    """Text encoder, motion UNet, decoder of single frames. Raises BadSource, UnsupportedModel."""
    return (*text_jobs(source), _unet_job(source), autoencoder(source, _unet(source)["in_channels"]).decoder_job("vae"))


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """The text encoder's tokenizer. Raises BadSource."""
    return {"default": PromptTokenizer("tokenizer", int(source.config("text_encoder")["max_position_embeddings"]))}


def _contract(source: Source) -> tuple[Sampler, Guidance]:
    config = scheduler_config(source)
    if source.class_of("scheduler") == "LCMScheduler":
        guidance = Guidance(kind="cfg", scale=2.0, minimum=1.0, maximum=3.0)
        return lcm_sampler(config, LCM_STEPS, steps=6), guidance
    return euler_sampler(config, LIGHTNING_STEPS, steps=4), Guidance(kind="none")


def _unet(source: Source) -> dict[str, Any]:
    """The UNet's config, if all it asks for is fed."""
    config = component(source, "unet", tuple(UNETS))
    plain: dict[str, tuple[Any, ...]] = {
        "encoder_hid_dim_type": (None,),  # IP-Adapter
        "addition_embed_type": (None,),
        "time_cond_proj_dim": (None,),
        "class_embed_type": (None,),
    }
    refuse("unet", config, plain)
    if source.class_of("unet") == "UNet2DConditionModel":
        refuse("motion_adapter", component(source, "motion_adapter", ("MotionAdapter",)), {"conv_in_channels": (None,)})
    if config["in_channels"] != config["out_channels"]:
        raise UnsupportedModel(
            f"unet takes {config['in_channels']} channels and gives {config['out_channels']}: a picture as a "
            f"start (PIA) is not exported"
        )
    width = source.config("text_encoder").get("hidden_size")
    if config.get("cross_attention_dim") != width:
        raise UnsupportedModel(
            f"unet: cross_attention_dim is {config.get('cross_attention_dim')!r}; the text encoder gives {width}"
        )
    return config


def _positions(source: Source) -> int:
    """How many frames the motion modules have positions for."""
    part = "unet" if source.class_of("unet") == "UNetMotionModel" else "motion_adapter"
    return int(source.config(part).get("motion_max_seq_length", 32))


def _unet_job(source: Source) -> PartJob:
    config, kind = _unet(source), source.class_of("unet")
    latent: tuple[Dim, ...] = ("batch", config["in_channels"], "frames", "height", "width")
    most = _positions(source)
    return PartJob(
        part="unet",
        network=f"{NETWORKS}:{UNETS[str(kind)]}",
        folder="unet",
        inputs=(
            f32("sample", *latent),
            f32("timestep", "batch"),
            f32("encoder_hidden_states", "batch", "length", config["cross_attention_dim"]),
        ),
        outputs=(f32("out_sample", *latent),),
        sizes={
            "batch": BATCH,
            "frames": (min(3, most), min(FRAMES, most), min(2, most)),
            "height": HEIGHT,
            "width": WIDTH,
            "length": LENGTH,
        },
        fill={"timestep": TIME},
        lora="unet",
        most={"frames": most},
        beside=("motion_adapter",) if kind == "UNet2DConditionModel" else (),
    )


FAMILY = Family("animatediff", "text-to-video", matches, recipe, jobs, tokenizers)
