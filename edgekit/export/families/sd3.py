"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a flow in one to eight Euler steps, turbo models without guidance.

Two CLIP encoders and T5 say the prompt; a pipeline saved without T5 feeds zeros in its place. Nothing in a folder tells
a turbo model from its teacher, so guidance is off unless asked for.
"""

from __future__ import annotations

from typing import Any

from edgekit.bundle.recipe import Call, Denoise, Guidance, Recipe, Stage
from edgekit.errors import UnsupportedModel
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.dit import FLOW_STEPS, NETWORKS, PART, denoiser_job, flow_sampler, in_patches
from edgekit.export.families.parts import autoencoder, clip_job, component, f32, projection, vae_jobs
from edgekit.export.families.schedulers import refuse
from edgekit.export.families.texts import pads_right, t5_job, t5_width
from edgekit.export.sources import Source

PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
LENGTH = 256  # StableDiffusion3Pipeline's max_sequence_length, of T5's ids


def matches(source: Source) -> bool:
    """A Stable Diffusion 3 pipeline with FlowMatchEulerDiscreteScheduler."""
    known = source.index.get("_class_name") in PIPELINES
    return known and source.class_of("scheduler") == "FlowMatchEulerDiscreteScheduler"


def recipe(source: Source) -> Recipe:
    """Four steps by default, guidance off. Raises BadSource, UnsupportedModel."""
    config = _transformer(source)
    vae = autoencoder(source, config["in_channels"])
    feeds = {
        "sample": "@x",
        "timestep": "@t",
        "encoder_hidden_states": "text_encoder.hidden_states",
        "encoder_hidden_states_2": "text_encoder_2.hidden_states",
        "text_embeds": "text_encoder.text_embeds",
        "text_embeds_2": "text_encoder_2.text_embeds",
    }
    conditions = [Call(CLIPS[0], {"input_ids": "@tokens"}), Call(CLIPS[1], {"input_ids": "@tokens.second"})]
    if source.class_of(T5):
        feeds["encoder_hidden_states_3"] = f"{T5}.last_hidden_state"
        conditions.append(Call(T5, {"input_ids": "@tokens.third"}))
    side = config["sample_size"] * vae.factor
    stage = Stage(
        name="base",
        init=in_patches(vae.init(side, side), config["patch_size"]),
        sampler=flow_sampler(source, "flow", FLOW_STEPS, steps=4),
        denoise=Denoise(PART, feeds, "out_sample"),
        guidance=Guidance(kind="cfg", scale=1.0, minimum=1.0, maximum=10.0),
        decode=vae.decode(),
    )
    return Recipe(stages=(stage,), conditions=tuple(conditions))


def jobs(source: Source) -> tuple[PartJob, ...]:
    """Two or three text encoders, the transformer, decoder and encoder. Raises BadSource, UnsupportedModel."""
    config = _transformer(source)
    texts = [clip_job(source, name, "PenultimateAndPooled") for name in CLIPS]
    lengths = {job.outputs[0].shape[1] for job in texts}
    if len(lengths) > 1:
        raise UnsupportedModel(f"the two CLIP encoders take {lengths} ids; their states are joined, so both must agree")
    inputs = [
        f32("encoder_hidden_states", *texts[0].outputs[0].shape),
        f32("encoder_hidden_states_2", *texts[1].outputs[0].shape),
        f32("text_embeds", "batch", projection(source, CLIPS[0])),
        f32("text_embeds_2", "batch", projection(source, CLIPS[1])),
    ]
    pooled = projection(source, CLIPS[0]) + projection(source, CLIPS[1])
    if pooled != config["pooled_projection_dim"]:
        raise UnsupportedModel(f"transformer takes {config['pooled_projection_dim']} of pooled text, not {pooled}")
    if source.class_of(T5):
        texts.append(t5_job(source, T5, LENGTH))
        inputs.append(f32("encoder_hidden_states_3", "batch", LENGTH, t5_width(source, T5)))
    return (
        *texts,
        denoiser_job(f"{NETWORKS}:SD3", config["in_channels"], tuple(inputs)),
        *vae_jobs(source, config["in_channels"]),
    )


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """CLIP's twice and T5's. Raises BadSource, UnsupportedModel."""
    found = {
        name: PromptTokenizer(folder, int(source.config(encoder)["max_position_embeddings"]))
        for name, folder, encoder in zip(("default", "second"), ("tokenizer", "tokenizer_2"), CLIPS, strict=True)
    }
    if source.class_of(T5):
        pads_right(source, "tokenizer_3")
        found["third"] = PromptTokenizer("tokenizer_3", LENGTH)
    return found


def _transformer(source: Source) -> dict[str, Any]:
    config = component(source, "transformer", ("SD3Transformer2DModel",))
    refuse("transformer", config, {"patch_size": (2,), "out_channels": (config["in_channels"],)})
    return config


FAMILY = Family("sd3", "text-to-image", matches, recipe, jobs, tokenizers)
