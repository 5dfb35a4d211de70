"""What Stable Diffusion pipelines share: text encoders once, a UNet per step, a decoder, an encoder.

Optional parts come with the pipeline's class and components: a ControlNet that runs ahead of the UNet in every step,
and an inpainting UNet that sees the mask and the masked picture. A plain UNet inpaints too: the runtime puts the known
part of the picture back after every step, which takes no graph but the encoder's.
"""

from __future__ import annotations

import msgspec

from edgekit.bundle.recipe import Call, Denoise, Guidance, Recipe, Sampler, Stage
from edgekit.errors import UnsupportedModel
from edgekit.export.families import PartJob, PromptTokenizer
from edgekit.export.families.parts import autoencoder, sides, text_encoders, text_jobs, vae_jobs
from edgekit.export.families.schedulers import refuse
from edgekit.export.families.unets import controlnet_config, controlnet_job, inpaints, residuals, unet_config, unet_job
from edgekit.export.sources import Source

PLAIN = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PIPELINES = (
    *PLAIN,
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
)


def scheduled(source: Source, *schedulers: str) -> bool:
    """Whether a folder holds a Stable Diffusion pipeline with one of these scheduler classes."""
    return source.index.get("_class_name") in PIPELINES and source.class_of("scheduler") in schedulers


def jobs(source: Source) -> tuple[PartJob, ...]:
    """Every graph of the pipeline. Raises BadSource, UnsupportedModel."""
    control = (controlnet_job(source),) if source.class_of("controlnet") else ()
    channels = unet_config(source)["out_channels"]
    return (*text_jobs(source), *control, unet_job(source), *vae_jobs(source, channels))


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """One tokenizer per text encoder, under the names that `conditions` asks for. Raises BadSource."""
    folders = {"default": "tokenizer", "second": "tokenizer_2"}
    encoders = text_encoders(source)
    return {
        name: PromptTokenizer(folder, int(source.config(encoder)["max_position_embeddings"]))
        for (name, folder), encoder in zip(folders.items(), encoders, strict=False)
    }


def guided(source: Source, scale: float, maximum: float, rescale: float = 0.0) -> Guidance:
    """Classifier-free guidance from none (1) to `maximum`, `scale` by default."""
    zero_empty = bool(source.index.get("force_zeros_for_empty_prompt", False))
    return Guidance(kind="cfg", scale=scale, minimum=1.0, maximum=maximum, rescale=rescale, zero_empty=zero_empty)


def no_embedding(source: Source, scheduler: str) -> None:
    """Refuse a UNet that embeds its guidance scale. Raises UnsupportedModel."""
    if unet_config(source).get("time_cond_proj_dim"):
        raise UnsupportedModel(
            f"unet.time_cond_proj_dim is set: a guidance embedding belongs to LCMScheduler, not {scheduler}"
        )


def recipe(source: Source, sampler: Sampler, guidance: Guidance) -> Recipe:
    """The contract around a family's sampler and guidance.

    Raises:
        UnsupportedModel: SDXL's second text encoder without its UNet, or the other way round.
    """
    unet = unet_config(source)
    vae = autoencoder(source, unet["out_channels"])
    refuse("model_index.json", source.index, {"requires_aesthetics_score": (False, None)})  # SDXL's refiner
    height, width = (side * vae.factor for side in sides(unet["sample_size"]))
    text = _text_feeds(source)
    feeds = {"sample": "@x", "timestep": "@t", **text}
    conditions = [Call("text_encoder", {"input_ids": "@tokens"})]
    if "text_embeds" in text:
        conditions.append(Call("text_encoder_2", {"input_ids": "@tokens.second"}))
    if guidance.kind == "w_embedding":
        feeds["timestep_cond"] = "@w_embedding"
    if inpaints(unet):
        conditions.append(Call("vae_encoder", {"sample": "@masked_image"}))
        feeds |= {"mask": "@inpaint_mask", "masked_image_latents": "vae_encoder.latent_sample"}
    before: tuple[Call, ...] = ()
    if source.class_of("controlnet"):
        before = (_control(source, text),)
        feeds |= {spec.name: f"controlnet.{spec.name}" for spec in residuals(unet)}
    stage = Stage(
        name="base",
        init=vae.init(height, width),
        sampler=sampler,
        denoise=Denoise("unet", feeds, "out_sample", before=before),
        guidance=guidance,
        decode=vae.decode(),
    )
    return Recipe(stages=(stage,), conditions=tuple(conditions))


def _text_feeds(source: Source) -> dict[str, str]:
    """What UNet and ControlNet are told of the prompt."""
    xl = len(text_encoders(source)) == 2
    kind = unet_config(source).get("addition_embed_type")
    if xl != (kind == "text_time"):
        raise UnsupportedModel(
            f"the pipeline has {1 + xl} text encoder(s) while unet.addition_embed_type is {kind!r}; text_time goes "
            f"with two"
        )
    if not xl:
        return {"encoder_hidden_states": "text_encoder.last_hidden_state"}
    return {
        "encoder_hidden_states": "text_encoder.hidden_states",
        "encoder_hidden_states_2": "text_encoder_2.hidden_states",
        "text_embeds": "text_encoder_2.text_embeds",
        "time_ids": "@time_ids",
    }


def _control(source: Source, text: dict[str, str]) -> Call:
    """ControlNet on the sample and time of a row."""
    if controlnet_config(source).get("addition_embed_type") != "text_time":
        text = {name: fed for name, fed in text.items() if name not in ("text_embeds", "time_ids")}
    feeds = {"sample": "@x", "timestep": "@t", "control": "@control", "control_scale": "@control_scale"}
    return Call("controlnet", {**feeds, **text})


def with_timesteps(sampler: Sampler, *timesteps: float) -> Sampler:
    """A sampler that visits these timesteps and no others."""
    count = len(timesteps)
    fixed: Sampler = msgspec.structs.replace(sampler, timesteps=timesteps, steps=count, legal_steps=(count,))
    return fixed
