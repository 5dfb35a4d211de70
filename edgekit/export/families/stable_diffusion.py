"""The recipe that Stable Diffusion pipelines share: text encoders once, a UNet per step, a decoder, an encoder."""

from __future__ import annotations

from edgekit.bundle.recipe import Call, Decode, Denoise, Guidance, Init, Recipe, Sampler, Stage
from edgekit.errors import UnsupportedModel
from edgekit.export.families import PartJob, PromptTokenizer
from edgekit.export.families.parts import (
    downscale,
    text_encoders,
    text_jobs,
    unet_config,
    unet_job,
    vae_config,
    vae_jobs,
)
from edgekit.export.sources import Source

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
IMG2IMG = ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline")


def jobs(source: Source) -> tuple[PartJob, ...]:
    """Every graph of the pipeline. Raises BadSource, UnsupportedModel."""
    return (*text_jobs(source), unet_job(source), *vae_jobs(source))


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """One tokenizer per text encoder, under the names that `conditions` asks for. Raises BadSource."""
    folders = {"default": "tokenizer", "second": "tokenizer_2"}
    encoders = text_encoders(source)
    return {
        name: PromptTokenizer(folder, int(source.config(encoder)["max_position_embeddings"]))
        for (name, folder), encoder in zip(folders.items(), encoders, strict=False)
    }


def recipe(source: Source, sampler: Sampler, guidance: Guidance) -> Recipe:
    """The contract around a family's sampler and guidance.

    Raises:
        UnsupportedModel: SDXL's second text encoder without its UNet, or the other way round.
    """
    unet, vae = unet_config(source), vae_config(source)
    xl = len(text_encoders(source)) == 2
    if xl != (unet.get("addition_embed_type") == "text_time"):
        raise UnsupportedModel(
            f"the pipeline has {1 + xl} text encoder(s) while unet.addition_embed_type is "
            f"{unet.get('addition_embed_type')!r}; text_time goes with two"
        )
    feeds = {"sample": "@x", "timestep": "@t"}
    conditions = [Call("text_encoder", {"input_ids": "@tokens"})]
    if xl:
        conditions.append(Call("text_encoder_2", {"input_ids": "@tokens.second"}))
        feeds["encoder_hidden_states"] = "text_encoder.hidden_states"
        feeds["encoder_hidden_states_2"] = "text_encoder_2.hidden_states"
        feeds |= {"text_embeds": "text_encoder_2.text_embeds", "time_ids": "@time_ids"}
    else:
        feeds["encoder_hidden_states"] = "text_encoder.last_hidden_state"
    if guidance.kind == "w_embedding":
        feeds["timestep_cond"] = "@w_embedding"
    scale, shift = float(vae["scaling_factor"]), float(vae.get("shift_factor") or 0.0)
    factor, size = downscale(source), _size(unet["sample_size"])
    stage = Stage(
        name="base",
        init=Init(
            channels=unet["in_channels"],
            downscale=factor,
            height=size[0] * factor,
            width=size[1] * factor,
            encode=Call("vae_encoder", {"sample": "@image"}),
            scale=scale,
            shift=shift,
        ),
        sampler=sampler,
        denoise=Denoise("unet", feeds, "out_sample"),
        guidance=guidance,
        decode=Decode("vae_decoder", {"latent_sample": "@latent"}, "sample", scale=scale, shift=shift),
    )
    return Recipe(stages=(stage,), conditions=tuple(conditions))


def _size(sample_size: int | list[int]) -> tuple[int, int]:
    if isinstance(sample_size, int):
        return sample_size, sample_size
    height, width = sample_size
    return height, width
