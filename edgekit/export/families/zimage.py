"""Z-Image-Turbo (Tongyi 2025): Qwen 3 reads the prompt as a chat's turn; a flow in one to nine unguided Euler steps."""

from __future__ import annotations

from typing import Any

from edgekit.bundle.manifest import TensorSpec
from edgekit.bundle.recipe import Call, Denoise, Guidance, Recipe, Stage
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.dit import PART, denoiser_job, flow_sampler, in_patches
from edgekit.export.families.parts import autoencoder, component, f32, vae_jobs
from edgekit.export.families.schedulers import refuse
from edgekit.export.families.texts import pads_right, text_job
from edgekit.export.language.assets import chat_template
from edgekit.export.sources import Source, read_json_if_any
from edgekit.runtime.llm.chat import ChatTemplate

NETWORK = "edgekit.export.families.networks_zimage:ZImage"
LEGAL_STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
LENGTH = 512  # ZImagePipeline's max_sequence_length
SIDE = 1024  # and its default picture
PATCH = 2
PROMPT = "a prompt"  # stands in for one while a chat template is read


def matches(source: Source) -> bool:
    """ZImagePipeline with FlowMatchEulerDiscreteScheduler."""
    known = source.index.get("_class_name") == "ZImagePipeline"
    return known and source.class_of("scheduler") == "FlowMatchEulerDiscreteScheduler"


def recipe(source: Source) -> Recipe:
    """Eight steps by default, no guidance. Raises BadSource, UnsupportedModel."""
    vae = autoencoder(source, _transformer(source)["in_channels"])
    feeds = {
        "sample": "@x",
        "timestep": "@t",
        "encoder_hidden_states": "text_encoder.hidden_states",
        "encoder_attention_mask": "@mask",
    }
    stage = Stage(
        name="base",
        init=in_patches(vae.init(SIDE, SIDE), PATCH),
        sampler=flow_sampler(source, "uniform", LEGAL_STEPS, steps=8),
        denoise=Denoise(PART, feeds, "out_sample"),
        guidance=Guidance(kind="none"),
        decode=vae.decode(),
    )
    text = Call("text_encoder", {"input_ids": "@tokens", "attention_mask": "@mask"})
    return Recipe(stages=(stage,), conditions=(text,))


def jobs(source: Source) -> tuple[PartJob, ...]:
    """Qwen 3 without its last layer, the transformer, decoder and encoder. Raises BadSource, UnsupportedModel."""
    channels = _transformer(source)["in_channels"]
    qwen = component(source, "text_encoder", ("Qwen3Model", "Qwen3ForCausalLM"))
    states = f32("hidden_states", "batch", LENGTH, qwen["hidden_size"])
    inputs = (
        f32("encoder_hidden_states", *states.shape),
        TensorSpec("encoder_attention_mask", "int64", ("batch", LENGTH)),
    )
    return (
        text_job("text_encoder", "Qwen3", LENGTH, qwen["vocab_size"], (states,)),
        denoiser_job(NETWORK, channels, inputs, fill={"encoder_attention_mask": (0.0, 2.0)}),
        *vae_jobs(source, channels),
    )


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """Qwen's, the prompt as a user's turn that waits for its answer. Raises BadSource, UnsupportedModel."""
    pads_right(source, "tokenizer")
    return {"default": PromptTokenizer("tokenizer", LENGTH, template=_turns(source))}


def _turns(source: Source) -> str:
    """What the chat template puts around one user's prompt."""
    folder = source.root / "tokenizer"
    template = chat_template(folder, read_json_if_any(folder / "tokenizer_config.json"))
    if template is None:
        raise BadSource(f"{folder} has no chat template, which Z-Image reads prompts by; is the download complete?")
    before, found, after = ChatTemplate(template).render([{"role": "user", "content": PROMPT}]).partition(PROMPT)
    if not found or "{" in before + after or "}" in before + after:
        raise UnsupportedModel(
            f"{folder}: the chat template must leave a prompt as it is, and have no braces around it"
        )
    return f"{before}{{}}{after}"


def _transformer(source: Source) -> dict[str, Any]:
    config = component(source, "transformer", ("ZImageTransformer2DModel",))
    plain: dict[str, tuple[Any, ...]] = {"siglip_feat_dim": (None,), "all_f_patch_size": ((1,),)}
    refuse("transformer", config, {**plain, "all_patch_size": ((PATCH,),)})
    return config


FAMILY = Family("zimage", "text-to-image", matches, recipe, jobs, tokenizers)
