"""aMUSEd (Patil et al. 2024): a picture as tokens, all masked at first, that a U-ViT fills in over a dozen rows.

Its networks are trained on one square size, which is the bundle's.
"""

from __future__ import annotations

from typing import Any

from edgekit.bundle.manifest import TensorSpec
from edgekit.bundle.recipe import Call, Decode, Denoise, Guidance, Init, Recipe, Sampler, Stage, Tokens
from edgekit.errors import UnsupportedModel
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.parts import BATCH, clip_job, component, f32, projection
from edgekit.export.families.schedulers import refuse, scheduler_config
from edgekit.export.sources import Source

NETWORKS = "edgekit.export.families.networks_tokens"
STEPS = 12  # AmusedPipeline's defaults
SCALE = 10.0
TEMPERATURE = (2.0, 0.0)
LEGAL_STEPS = tuple(range(1, 25))


def matches(source: Source) -> bool:
    """A folder whose pipeline is AmusedPipeline."""
    return source.index.get("_class_name") == "AmusedPipeline"


def recipe(source: Source) -> Recipe:
    """Twelve rows by default, guidance 10. Raises BadSource, UnsupportedModel."""
    config, scheduler = _transformer(source), scheduler_config(source)
    refuse("scheduler", scheduler, {"masking_schedule": ("cosine", "linear")})
    factor, side = _downscale(source), config["sample_size"]
    stage = Stage(
        name="base",
        init=Init(kind="mask", downscale=factor, width=side * factor, height=side * factor, fixed_size=True),
        sampler=Sampler(
            kind="masked_tokens",
            steps=STEPS,
            legal_steps=LEGAL_STEPS,
            tokens=Tokens(
                length=side**2,
                vocabulary=config["codebook_size"],
                mask_id=int(scheduler["mask_token_id"]),
                schedule=scheduler.get("masking_schedule", "cosine"),
                choice_temperature=TEMPERATURE,
            ),
        ),
        denoise=Denoise(
            part="transformer",
            feeds={
                "input_ids": "@x",
                "encoder_hidden_states": "text_encoder.hidden_states",
                "text_embeds": "text_encoder.text_embeds",
                "size": "@size",
            },
            output="logits",
        ),
        guidance=Guidance(kind="cfg", scale=SCALE),
        decode=Decode("vq_decoder", {"input_ids": "@latent"}, "sample"),
    )
    return Recipe(stages=(stage,), conditions=(Call("text_encoder", {"input_ids": "@tokens"}),))


def jobs(source: Source) -> tuple[PartJob, ...]:
    """Text encoder, transformer and decoder. Raises BadSource, UnsupportedModel."""
    config, factor = _transformer(source), _downscale(source)
    tokens, length = config["sample_size"] ** 2, source.config("text_encoder")["max_position_embeddings"]
    ids = TensorSpec("input_ids", "int64", ("batch", tokens))
    transformer = PartJob(
        part="transformer",
        network=f"{NETWORKS}:UViT",
        folder="transformer",
        inputs=(
            ids,
            f32("encoder_hidden_states", "batch", length, config["encoder_hidden_size"]),
            f32("text_embeds", "batch", config["cond_embed_dim"]),
            f32("size", "batch", 2),
        ),
        outputs=(f32("logits", "batch", tokens, config["codebook_size"]),),
        sizes={"batch": BATCH[:2]},
        fill={"input_ids": (0, config["vocab_size"]), "size": (1.0, 512.0)},
    )
    side = config["sample_size"] * factor
    decoder = PartJob(
        part="vq_decoder",
        network=f"{NETWORKS}:TokenDecoder",
        folder="vqvae",
        inputs=(ids,),
        outputs=(f32("sample", "batch", 3, side, side),),
        sizes={"batch": BATCH[:2]},
        fill={"input_ids": (0, config["codebook_size"])},
        weights=("decoder.", "post_quant_conv.", "quantize."),
    )
    return (clip_job(source, "text_encoder", "PenultimateAndPooled"), transformer, decoder)


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """The text encoder's tokenizer. Raises BadSource."""
    return {"default": PromptTokenizer("tokenizer", int(source.config("text_encoder")["max_position_embeddings"]))}


def _transformer(source: Source) -> dict[str, Any]:
    """The U-ViT's config, if the other parts fit it."""
    config = component(source, "transformer", ("UVit2DModel",))
    widths = {"encoder_hidden_size": source.config("text_encoder").get("hidden_size")}
    widths["cond_embed_dim"] = projection(source, "text_encoder")
    for field, width in widths.items():
        if config[field] != width:
            raise UnsupportedModel(f"transformer: {field} is {config[field]}; the text encoder gives {width}")
    if config["codebook_size"] > _codebook(source)["num_vq_embeddings"]:
        raise UnsupportedModel(
            f"transformer: codebook_size is {config['codebook_size']}; the vqvae has "
            f"{_codebook(source)['num_vq_embeddings']} vectors"
        )
    return config


def _codebook(source: Source) -> dict[str, Any]:
    """The VQ autoencoder's config, if its decoder looks tokens up."""
    config = component(source, "vqvae", ("VQModel",))
    refuse("vqvae", config, {"lookup_from_codebook": (True,), "vq_embed_dim": (None, config["latent_channels"])})
    return config


def _downscale(source: Source) -> int:
    return int(2 ** (len(_codebook(source)["block_out_channels"]) - 1))


FAMILY = Family("amused", "text-to-image", matches, recipe, jobs, tokenizers)
