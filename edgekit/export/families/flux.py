"""FLUX.1-schnell (Black Forest Labs 2024): a flow in one to four Euler steps, guidance distilled away or embedded.

FLUX.1-dev and its few-step LoRAs are told the guidance scale, as a number, and shift their grid by the picture's size;
a folder of theirs is exported once its scheduler has `use_dynamic_shifting` off and a `shift` of its own.
"""

from __future__ import annotations

from typing import Any

from edgekit.bundle.recipe import Call, Denoise, Guidance, Recipe, Stage
from edgekit.errors import UnsupportedModel
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.dit import NETWORKS, PART, denoiser_job, flow_sampler, in_patches
from edgekit.export.families.parts import autoencoder, clip_job, component, f32, vae_jobs
from edgekit.export.families.schedulers import refuse
from edgekit.export.families.texts import pads_right, t5_job, t5_width
from edgekit.export.sources import Source

PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")
LEGAL_STEPS = (1, 2, 3, 4)
EMBEDDED_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
LENGTH = 256  # T5's ids; FLUX.1-schnell was trained with no more
SAMPLE_SIZE = 128  # FluxPipeline's default
PATCH = 2  # latent pixels packed into channels, each way


def matches(source: Source) -> bool:
    """A FLUX.1 pipeline with FlowMatchEulerDiscreteScheduler."""
    known = source.index.get("_class_name") in PIPELINES
    return known and source.class_of("scheduler") == "FlowMatchEulerDiscreteScheduler"


def recipe(source: Source) -> Recipe:
    """Four steps by default. Raises BadSource, UnsupportedModel."""
    config = _transformer(source)
    vae = autoencoder(source, config["in_channels"] // PATCH**2)
    feeds = {
        "sample": "@x",
        "timestep": "@t",
        "encoder_hidden_states": "text_encoder_2.last_hidden_state",
        "pooled_projections": "text_encoder.pooler_output",
    }
    embedded = bool(config.get("guidance_embeds"))
    if embedded:
        feeds["guidance"] = "@guidance"
    side = SAMPLE_SIZE * vae.factor
    stage = Stage(
        name="base",
        init=in_patches(vae.init(side, side), PATCH),
        sampler=flow_sampler(source, "uniform", EMBEDDED_STEPS if embedded else LEGAL_STEPS, steps=4),
        denoise=Denoise(PART, feeds, "out_sample"),
        guidance=Guidance(kind="embedded", scale=3.5) if embedded else Guidance(kind="none"),
        decode=vae.decode(),
    )
    conditions = (
        Call("text_encoder", {"input_ids": "@tokens"}),
        Call("text_encoder_2", {"input_ids": "@tokens.second"}),
    )
    return Recipe(stages=(stage,), conditions=conditions)


def jobs(source: Source) -> tuple[PartJob, ...]:
    """CLIP's pooled text, T5, the transformer, decoder and encoder. Raises BadSource, UnsupportedModel."""
    config = _transformer(source)
    channels = config["in_channels"] // PATCH**2
    clip = clip_job(source, "text_encoder", "Pooled")
    inputs = [
        f32("encoder_hidden_states", "batch", LENGTH, t5_width(source, "text_encoder_2")),
        f32("pooled_projections", *clip.outputs[0].shape),
    ]
    if config.get("guidance_embeds"):
        inputs.append(f32("guidance", "batch"))
    transformer = denoiser_job(f"{NETWORKS}:Flux", channels, tuple(inputs), fill={"guidance": (1.0, 8.0)})
    return (clip, t5_job(source, "text_encoder_2", LENGTH), transformer, *vae_jobs(source, channels))


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """CLIP's and T5's. Raises BadSource, UnsupportedModel."""
    pads_right(source, "tokenizer_2")
    positions = int(source.config("text_encoder")["max_position_embeddings"])
    return {"default": PromptTokenizer("tokenizer", positions), "second": PromptTokenizer("tokenizer_2", LENGTH)}


def _transformer(source: Source) -> dict[str, Any]:
    config = component(source, "transformer", ("FluxTransformer2DModel",))
    refuse("transformer", config, {"patch_size": (1,), "out_channels": (None, config["in_channels"])})
    if config["in_channels"] % PATCH**2:
        raise UnsupportedModel(f"transformer: in_channels is {config['in_channels']}; patches are {PATCH} x {PATCH}")
    return config


FAMILY = Family("flux", "text-to-image", matches, recipe, jobs, tokenizers)
