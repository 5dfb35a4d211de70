"""SANA-Sprint (Chen et al. 2025): a TrigFlow in one to four consistency steps, two by default, guidance embedded.

Gemma 2 reads the prompt behind a long instruction, of which only the first state is kept. Samples have unit scale
here: SCMScheduler's `sigma_data` multiplies sample, noise and prediction alike and is divided out at the end.
"""

from __future__ import annotations

from typing import Any

from edgekit.bundle.recipe import Call, Decode, Denoise, Grid, Guidance, Init, Recipe, Sampler, Stage
from edgekit.errors import BadManifest, BadSource
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.dit import HEIGHT, PART, WIDTH, denoiser_job
from edgekit.export.families.parts import BATCH, component, f32
from edgekit.export.families.schedulers import refuse, scheduler_config
from edgekit.export.families.texts import text_job
from edgekit.export.sources import Source
from edgekit.runtime.tokenizer import Tokenizer

NETWORKS = "edgekit.export.families.networks_sana"
LEGAL_STEPS = (1, 2, 3, 4)
ANGLES = (1.57080, 1.3)  # SanaSprintPipeline's max_timesteps and intermediate_timesteps, of two steps
SCALE = 4.5  # SanaSprintPipeline's guidance_scale
KEPT = 300  # and its max_sequence_length: states that the transformer sees
# The instruction the model was trained with, as SanaSprintPipeline has it (configs/sana_app_config of NVlabs/Sana).
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image \
generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships \
to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully \
on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a \
diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or \
evaluations:
User Prompt: """


def matches(source: Source) -> bool:
    """SanaSprintPipeline with SCMScheduler."""
    return source.index.get("_class_name") == "SanaSprintPipeline" and source.class_of("scheduler") == "SCMScheduler"


def recipe(source: Source) -> Recipe:
    """Two steps by default. Raises BadSource, UnsupportedModel."""
    config, vae = _transformer(source), _autoencoder(source)
    refuse("scheduler", scheduler_config(source), {"prediction_type": ("trigflow",)})
    feeds = {
        "sample": "@x",
        "timestep": "@t",
        "encoder_hidden_states": "text_encoder.last_hidden_state",
        "encoder_attention_mask": "text_encoder.mask",
        "guidance": "@guidance",
    }
    side = int(config["sample_size"]) * _factor(vae)
    stage = Stage(
        name="base",
        init=Init(
            channels=config["in_channels"],
            downscale=_factor(vae),
            multiple=config["patch_size"],
            width=side,
            height=side,
        ),
        sampler=Sampler(
            kind="trig_consistency",
            steps=2,
            legal_steps=LEGAL_STEPS,
            prediction="v_prediction",
            timesteps=ANGLES,
            grid=Grid(spacing="linspace"),
            sigma_data=1.0,
        ),
        denoise=Denoise(PART, feeds, "out_sample"),
        guidance=Guidance(kind="embedded", scale=SCALE, factor=float(config.get("guidance_embeds_scale", 0.1))),
        decode=Decode("vae_decoder", {"latent_sample": "@latent"}, "sample", scale=float(vae["scaling_factor"])),
    )
    text = Call("text_encoder", {"input_ids": "@tokens", "attention_mask": "@mask"})
    return Recipe(stages=(stage,), conditions=(text,))


def jobs(source: Source) -> tuple[PartJob, ...]:
    """Gemma 2, the transformer and the decoder. Raises BadSource, UnsupportedModel."""
    config, vae = _transformer(source), _autoencoder(source)
    gemma = component(source, "text_encoder", ("Gemma2Model",))
    states = f32("last_hidden_state", "batch", KEPT, gemma["hidden_size"])
    mask = f32("mask", "batch", KEPT)
    inputs = (
        f32("encoder_hidden_states", *states.shape),
        f32("encoder_attention_mask", *mask.shape),
        f32("guidance", "batch"),
    )
    # a mask's own numbers are 0 and 1, which attention adds as -10000 and 0; the probes see all between
    fill = {"timestep": (0.1, 1.57), "guidance": (0.1, 1.0), "encoder_attention_mask": (0.999, 1.0)}
    small = {"height": HEIGHT[1:], "width": WIDTH[1:]}
    pixels = {f"image_{axis}": tuple(_factor(vae) * side for side in sides) for axis, sides in small.items()}
    decoder = PartJob(
        part="vae_decoder",
        network=f"{NETWORKS}:DeepDecoder",
        folder="vae",
        inputs=(f32("latent_sample", "batch", vae["latent_channels"], "height", "width"),),
        outputs=(f32("sample", "batch", 3, "image_height", "image_width"),),
        sizes={"batch": BATCH[:2], **small, **pixels},
        weights=("decoder.",),
    )
    return (
        text_job("text_encoder", "Gemma2", _length(source), gemma["vocab_size"], (states, mask)),
        denoiser_job(f"{NETWORKS}:SanaSprint", config["in_channels"], inputs, fill=fill),
        decoder,
    )


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:
    """Gemma's, on prompts in lower case behind the instruction. Raises BadSource."""
    template = f"{INSTRUCTION}{{}}"
    return {"default": PromptTokenizer("tokenizer", _length(source), template=template, lower=True)}


def _length(source: Source) -> int:
    """Ids of instruction and prompt together, as the pipeline counts them. Raises BadSource."""
    path = source.root / "tokenizer" / "tokenizer.json"
    try:
        words = Tokenizer.from_file(path)
    except (OSError, BadManifest) as why:
        raise BadSource(f"{path}: {why}; save the tokenizer with transformers, which writes that file") from why
    return len(words.encode(INSTRUCTION)) + KEPT - 2


def _factor(vae: dict[str, Any]) -> int:
    return int(2 ** (len(vae["encoder_block_out_channels"]) - 1))


def _autoencoder(source: Source) -> dict[str, Any]:
    return component(source, "vae", ("AutoencoderDC",))


def _transformer(source: Source) -> dict[str, Any]:
    config = component(source, "transformer", ("SanaTransformer2DModel",))
    refuse("transformer", config, {"guidance_embeds": (True,), "out_channels": (config["in_channels"], None)})
    return config


FAMILY = Family("sana-sprint", "text-to-image", matches, recipe, jobs, tokenizers)
