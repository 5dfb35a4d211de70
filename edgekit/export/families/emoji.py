"""The project's own emoji model: 32x32 pictures from words in one to eight flow-matching steps, then four times larger.

The UNet works on pixels, folded two by two into 12 channels, so its "decoder" is a pixel shuffle without weights.
"""

from __future__ import annotations

import msgspec

from edgekit.bundle.recipe import Call, Decode, Denoise, Grid, Guidance, Init, Recipe, Sampler, Stage
from edgekit.errors import UnsupportedModel
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.parts import BATCH, component, f32, text_jobs
from edgekit.export.families.schedulers import flow_lcm_sampler, scheduler_config
from edgekit.export.families.unets import unet_config, unet_job
from edgekit.export.sources import Source

NETWORKS = "edgekit.export.families.emoji_networks"
LEGAL_STEPS = (1, 2, 4, 8)
FOLD = 2  # pixels folded into channels, each way
SCALE = 3.0


def matches(source: Source) -> bool:
    """A folder whose pipeline class is EmojiPipeline."""
    return source.index.get("_class_name") == "EmojiPipeline"


def recipe(source: Source) -> Recipe:
    """A base stage of four steps by default, then one pass of the upscaler. Raises BadSource, UnsupportedModel."""
    unet = unet_config(source)
    if not unet.get("time_cond_proj_dim"):
        raise UnsupportedModel("unet.time_cond_proj_dim is null; the emoji model embeds its guidance scale")
    size = unet["sample_size"] * FOLD
    base = Stage(
        name="base",
        init=Init(channels=unet["in_channels"], downscale=FOLD, width=size, height=size, fixed_size=True),
        # The scheduler's own grid ends at sigma 0.001, where a step changes nothing; its card says even steps instead.
        sampler=msgspec.structs.replace(
            flow_lcm_sampler(scheduler_config(source), LEGAL_STEPS, steps=4), grid=Grid("uniform")
        ),
        denoise=Denoise(
            part="unet",
            feeds={
                "sample": "@x",
                "timestep": "@t",
                "encoder_hidden_states": "text_encoder.last_hidden_state",
                "timestep_cond": "@w_embedding",
            },
            output="out_sample",
        ),
        guidance=Guidance(
            kind="w_embedding", scale=float(source.index.get("guidance_scale", SCALE)), dim=unet["time_cond_proj_dim"]
        ),
        decode=Decode("decoder", {"latent_sample": "@latent"}, "sample"),
    )
    factor = _upscaler(source)["scale"]
    upscale = Stage(
        name="upscale",
        init=Init(kind="previous", channels=3, downscale=1, width=size, height=size),
        sampler=Sampler(kind="direct", steps=1, legal_steps=(1,)),
        denoise=Denoise("upscaler", {"image": "@previous"}, "upscaled"),
        upscale=factor,
    )
    return Recipe(stages=(base, upscale), conditions=(Call("text_encoder", {"input_ids": "@tokens"}),))


def jobs(source: Source) -> tuple[PartJob, ...]:
    """Text encoder, UNet, pixel-shuffle decoder and upscaler. Raises BadSource, UnsupportedModel."""
    channels, config = unet_config(source)["in_channels"], _upscaler(source)
    folded = {"batch": BATCH[:2], "height": (9, 16), "width": (13, 16)}
    unfolded = {f"image_{axis}": tuple(FOLD * size for size in folded[axis]) for axis in ("height", "width")}
    enlarged = {
        f"upscaled_{axis}": tuple(config["scale"] * size for size in folded[axis]) for axis in ("height", "width")
    }
    decoder = PartJob(
        part="decoder",
        network=f"{NETWORKS}:Unfold",
        folder="",
        inputs=(f32("latent_sample", "batch", channels, "height", "width"),),
        outputs=(f32("sample", "batch", channels // FOLD**2, "image_height", "image_width"),),
        sizes=folded | unfolded,
    )
    upscaler = PartJob(
        part="upscaler",
        network=f"{NETWORKS}:load_upscaler",
        folder="upscaler",
        inputs=(f32("image", "batch", config["in_channels"], "height", "width"),),
        outputs=(f32("upscaled", "batch", config["in_channels"], "upscaled_height", "upscaled_width"),),
        sizes=folded | enlarged,
    )
    return (*text_jobs(source), unet_job(source), decoder, upscaler)


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """The word tokenizer, cut and padded to the text encoder's positions. Raises BadSource."""
    return {"default": PromptTokenizer("tokenizer", int(source.config("text_encoder")["max_position_embeddings"]))}


def _upscaler(source: Source) -> dict[str, int]:
    return component(source, "upscaler", ("ResidualUpscaler",))


FAMILY = Family("emoji", "text-to-image", matches, recipe, jobs, tokenizers)
