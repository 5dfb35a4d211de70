"""The graphs that Stable Diffusion pipelines share, as PartJobs read from component configs.

Names of inputs and outputs are those of diffusers' ONNX exports (`sample`, `timestep`, `out_sample`, `latent_sample`).
Axes: `batch`; `height`, `width` of the latent; `image_height`, `image_width` of the picture; `length` of the text.
"""

from __future__ import annotations

from typing import Any

from edgekit.bundle.manifest import Dim, TensorSpec
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import PartJob
from edgekit.export.families.schedulers import refuse
from edgekit.export.sources import Source

NETWORKS = "edgekit.export.families.networks"
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")

# One size per probe; the first is traced. An odd latent makes diffusers' UNet resize by the sizes of its skip tensors,
# so that the graph answers for every size and not just for multiples of 2 ** (number of downsamplings).
BATCH = (2, 1, 2)
HEIGHT, WIDTH = (9, 8, 5), (13, 8, 10)
LENGTH = (7, 77, 77)
TIME = (0.0, 999.0)


def f32(name: str, *shape: Dim) -> TensorSpec:
    """A float32 tensor of a graph's signature."""
    return TensorSpec(name, "float32", shape)


def component(source: Source, name: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """The config of a component whose class is one of `classes`.

    Raises:
        BadSource: the folder has no such component. UnsupportedModel: it is of another class.
    """
    kind = source.class_of(name)
    if kind is None:
        raise BadSource(f"{source.root}/model_index.json names no {name}; an export needs one")
    if kind not in classes:
        raise UnsupportedModel(f"{name} is a {kind}; only {' or '.join(classes)} is exported")
    return source.config(name)


def unet_config(source: Source) -> dict[str, Any]:
    """The UNet's config, if all it asks for is fed.

    Raises:
        UnsupportedModel: an extra input or attention that no recipe feeds.
    """
    config = component(source, "unet", ("UNet2DConditionModel",))
    plain: dict[str, tuple[Any, ...]] = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "encoder_hid_dim": (None,),
        "addition_embed_type": (None, "text", "text_time"),  # text pools what is fed already
        "attention_type": ("default",),
        "cross_attention_norm": (None,),
        "dual_cross_attention": (False,),
        "center_input_sample": (False, True),
    }
    refuse("unet", config, plain)
    if not isinstance(config.get("cross_attention_dim"), int):
        raise UnsupportedModel(f"unet: cross_attention_dim is {config.get('cross_attention_dim')!r}; only one width is")
    if config["in_channels"] != config["out_channels"]:
        raise UnsupportedModel(
            f"unet takes {config['in_channels']} channels and gives {config['out_channels']}: inpainting, editing and "
            f"learned variance are not exported"
        )
    return config


def unet_job(source: Source) -> PartJob:
    """The denoiser: (batch, channels, height, width), float32 timestep (batch,), text states -> `out_sample`.

    SDXL's second text encoder comes in as `encoder_hidden_states_2`, joined to the first one's inside the graph, with
    `text_embeds` (pooled) and `time_ids`; a guidance-distilled UNet takes `timestep_cond` (w-embedding).

    Raises:
        BadSource, UnsupportedModel: a component this graph cannot have.
    """
    config = unet_config(source)
    latent: tuple[Dim, ...] = ("batch", config["in_channels"], "height", "width")
    inputs = [f32("sample", *latent), f32("timestep", "batch")]
    for name, part in zip(("encoder_hidden_states", "encoder_hidden_states_2"), text_encoders(source), strict=False):
        inputs.append(f32(name, "batch", "length", source.config(part)["hidden_size"]))
    if config.get("addition_embed_type") == "text_time":
        inputs += [f32("text_embeds", "batch", _projection(source)), f32("time_ids", "batch", 6)]
    if config.get("time_cond_proj_dim"):
        inputs.append(f32("timestep_cond", "batch", config["time_cond_proj_dim"]))
    widths = sum(int(spec.shape[2]) for spec in inputs if spec.name.startswith("encoder_hidden_states"))
    if widths != config["cross_attention_dim"]:
        raise UnsupportedModel(
            f"unet takes text states {config['cross_attention_dim']} wide, the text encoders give {widths} in all"
        )
    return PartJob(
        part="unet",
        network=f"{NETWORKS}:{'UNetXL' if len(text_encoders(source)) == 2 else 'UNet'}",
        folder="unet",
        inputs=tuple(inputs),
        outputs=(f32("out_sample", *latent),),
        sizes={"batch": BATCH, "height": HEIGHT, "width": WIDTH, "length": LENGTH},
        fill={"timestep": TIME, "time_ids": (0.0, 512.0)},
        lora="unet",
    )


def text_encoders(source: Source) -> tuple[str, ...]:
    """Names of the pipeline's text encoders: one, or SDXL's two."""
    return ("text_encoder", "text_encoder_2") if source.class_of("text_encoder_2") else ("text_encoder",)


def text_jobs(source: Source) -> tuple[PartJob, ...]:
    """Every text encoder: `input_ids` int64 (batch, length of its positions) -> hidden states, and SDXL's pooled text.

    Stable Diffusion takes the last hidden state; SDXL the penultimate of both, and the second's projected pooled one.

    Raises:
        BadSource, UnsupportedModel: another class of encoder, or one that needs an attention mask.
    """
    names = text_encoders(source)
    jobs = []
    for name in names:
        config = component(source, name, TEXT_ENCODERS)
        refuse(name, config, {"use_attention_mask": (False, None)})
        length, hidden = config["max_position_embeddings"], config["hidden_size"]
        outputs = [f32("last_hidden_state" if len(names) == 1 else "hidden_states", "batch", length, hidden)]
        network = "LastHidden" if len(names) == 1 else "Penultimate"
        if name == "text_encoder_2":
            outputs.append(f32("text_embeds", "batch", _projection(source)))
            network = "PenultimateAndPooled"
        jobs.append(
            PartJob(
                part=name,
                network=f"{NETWORKS}:{network}",
                folder=name,
                inputs=(TensorSpec("input_ids", "int64", ("batch", length)),),
                outputs=tuple(outputs),
                sizes={"batch": BATCH[:2]},
                fill={"input_ids": (0, config["vocab_size"])},
                lora=name,
            )
        )
    return tuple(jobs)


def vae_config(source: Source) -> dict[str, Any]:
    """The autoencoder's config, if only a scale and shift part its latents from the UNet's. Raises UnsupportedModel."""
    config = component(source, "vae", AUTOENCODERS)
    refuse("vae", config, {"latents_mean": (None,), "latents_std": (None,)})
    return config


def downscale(source: Source) -> int:
    """Picture pixels per latent pixel."""
    config = vae_config(source)
    blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return int(2 ** (len(blocks) - 1))


def vae_jobs(source: Source) -> tuple[PartJob, PartJob]:
    """Decoder and encoder, without the scale and shift between the latents and the UNet's: the recipe has those.

    The encoder gives the mean of an AutoencoderKL's distribution, so that a picture is always encoded alike.

    Raises:
        BadSource, UnsupportedModel: a component these graphs cannot have.
    """
    config, factor = vae_config(source), downscale(source)
    channels = config["latent_channels"]
    if channels != unet_config(source)["in_channels"]:
        raise UnsupportedModel(f"the vae has {channels} latent channels, the unet {unet_config(source)['in_channels']}")
    latent = f32("latent_sample", "batch", channels, "height", "width")
    image = f32("sample", "batch", 3, "image_height", "image_width")
    tiny = source.class_of("vae") == "AutoencoderTiny"
    small = {"batch": BATCH[:2], "height": HEIGHT[1:], "width": WIDTH[1:]}
    pixels = {f"image_{axis}": tuple(factor * size for size in small[axis]) for axis in ("height", "width")}
    return (
        PartJob(
            part="vae_decoder",
            network=f"{NETWORKS}:{'TinyDecoder' if tiny else 'Decoder'}",
            folder="vae",
            inputs=(latent,),
            outputs=(image,),
            sizes=small | pixels,
            weights=("decoder.", "post_quant_conv."),
        ),
        PartJob(
            part="vae_encoder",
            network=f"{NETWORKS}:{'TinyEncoder' if tiny else 'MeanEncoder'}",
            folder="vae",
            inputs=(image,),
            outputs=(latent,),
            sizes=small | pixels,
            weights=("encoder.", "quant_conv."),
        ),
    )


def _projection(source: Source) -> int:
    width = component(source, "text_encoder_2", ("CLIPTextModelWithProjection",))["projection_dim"]
    assert isinstance(width, int)
    return width
