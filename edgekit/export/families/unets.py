"""Stable Diffusion's denoiser and its ControlNet, as PartJobs read from component configs.

Inputs come in one order, whatever the model has of them: sample, timestep, control picture and its scale, text states,
SDXL's second text states, pooled text and sizes, the w-embedding, mask and masked latents, ControlNet's residuals.
"""

from __future__ import annotations

from typing import Any

from edgekit.bundle.manifest import Dim, TensorSpec
from edgekit.errors import UnsupportedModel
from edgekit.export.families import PartJob
from edgekit.export.families.parts import (
    BATCH,
    HEIGHT,
    LENGTH,
    NETWORKS,
    TIME,
    WIDTH,
    component,
    downscale,
    f32,
    projection,
    text_encoders,
)
from edgekit.export.families.schedulers import refuse
from edgekit.export.sources import Source

MASK_CHANNELS = 1  # of an inpainting UNet's input, between the sample's and the masked picture's latents


def unet_config(source: Source) -> dict[str, Any]:
    """The UNet's config, if all it asks for is fed.

    Raises:
        UnsupportedModel: an extra input or attention that no recipe feeds.
    """
    config = component(source, "unet", ("UNet2DConditionModel",))
    _check_conditioned("unet", config)
    plain = {"dual_cross_attention": (False,), "center_input_sample": (False, True), "attention_type": ("default",)}
    refuse("unet", config, {**plain, "cross_attention_norm": (None,)})
    if config["in_channels"] not in (config["out_channels"], _inpainting_channels(config)):
        raise UnsupportedModel(
            f"unet takes {config['in_channels']} channels and gives {config['out_channels']}: only as many, or "
            f"{_inpainting_channels(config)} with a mask and a masked picture's, are fed; editing and learned variance "
            f"are not exported"
        )
    return config


def inpaints(config: dict[str, Any]) -> bool:
    """Whether a UNet is told the mask and the masked picture's latents (9 channels in, 4 out)."""
    return bool(config["in_channels"] == _inpainting_channels(config))


def _inpainting_channels(config: dict[str, Any]) -> int:
    return 2 * int(config["out_channels"]) + MASK_CHANNELS


def _check_conditioned(where: str, config: dict[str, Any]) -> None:
    """Refuse conditions that UNet and ControlNet could have and nothing here feeds."""
    plain: dict[str, tuple[Any, ...]] = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "encoder_hid_dim": (None,),
        "addition_embed_type": (None, "text", "text_time"),  # text pools what is fed already
    }
    refuse(where, config, plain)
    if not isinstance(config.get("cross_attention_dim"), int):
        raise UnsupportedModel(
            f"{where}: cross_attention_dim is {config.get('cross_attention_dim')!r}; only one width is"
        )


def unet_job(source: Source) -> PartJob:
    """The denoiser: (batch, channels, height, width), float32 timestep (batch,), text states -> `out_sample`.

    SDXL's second text encoder comes in as `encoder_hidden_states_2`, joined to the first one's inside the graph, with
    `text_embeds` (pooled) and `time_ids`; a guidance-distilled UNet takes `timestep_cond` (w-embedding). An inpainting
    UNet takes `mask` and `masked_image_latents` as the encoder gives them: they are scaled and joined inside the graph.
    Beside a ControlNet it takes the residuals, `down_residual_<i>` and `mid_residual`.

    Raises:
        BadSource, UnsupportedModel: a component this graph cannot have.
    """
    config = unet_config(source)
    latent: tuple[Dim, ...] = ("batch", config["out_channels"], "height", "width")
    inputs = [f32("sample", *latent), f32("timestep", "batch"), *_text_inputs(source, "unet", config)]
    if config.get("time_cond_proj_dim"):
        inputs.append(f32("timestep_cond", "batch", config["time_cond_proj_dim"]))
    sizes: dict[str, tuple[int, ...]] = {"batch": BATCH, **_latent_sizes(), "length": LENGTH}
    if inpaints(config):
        inputs += [f32("mask", "batch", MASK_CHANNELS, "height", "width"), f32("masked_image_latents", *latent)]
    if source.class_of("controlnet"):
        inputs += residuals(config)
        sizes |= _level_sizes(config)
    return PartJob(
        part="unet",
        network=f"{NETWORKS}:UNet",
        folder="unet",
        inputs=tuple(inputs),
        outputs=(f32("out_sample", *latent),),
        sizes=sizes,
        fill={"timestep": TIME, "time_ids": (0.0, 512.0), "mask": (0.0, 1.0)},
        lora="unet",
    )


def controlnet_config(source: Source) -> dict[str, Any]:
    """The ControlNet's config, if its residuals fit the UNet.

    Raises:
        BadSource, UnsupportedModel: several ControlNets, another kind of them, or one made for another UNet.
    """
    config, unet = component(source, "controlnet", ("ControlNetModel",)), unet_config(source)
    _check_conditioned("controlnet", config)
    refuse("controlnet", config, {"global_pool_conditions": (False,), "conditioning_channels": (3,)})
    if config["in_channels"] != unet["out_channels"]:
        raise UnsupportedModel(f"controlnet takes {config['in_channels']} channels, the unet {unet['out_channels']}")
    if residuals(config) != residuals(unet):
        raise UnsupportedModel(
            f"controlnet: block_out_channels is {config['block_out_channels']}, layers_per_block "
            f"{config['layers_per_block']}; the unet's are {unet['block_out_channels']} and "
            f"{unet['layers_per_block']}: it was made for another model"
        )
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    if factor != downscale(source):
        raise UnsupportedModel(
            f"controlnet: its embedding makes a control picture {factor} times smaller, the vae {downscale(source)}"
        )
    return config


def controlnet_job(source: Source) -> PartJob:
    """ControlNet (Zhang et al. 2023): sample, time, `control` (a picture in [0, 1]), its scale, text -> residuals.

    `control_scale` (batch,) multiplies every residual inside the graph.

    Raises:
        BadSource, UnsupportedModel: as `controlnet_config`.
    """
    config, factor = controlnet_config(source), downscale(source)
    given = [f32("sample", "batch", config["in_channels"], "height", "width"), f32("timestep", "batch")]
    given += [f32("control", "batch", 3, "image_height", "image_width"), f32("control_scale", "batch")]
    pixels = {f"image_{axis}": tuple(factor * size for size in sizes) for axis, sizes in _latent_sizes().items()}
    return PartJob(
        part="controlnet",
        network=f"{NETWORKS}:ControlNet",
        folder="controlnet",
        inputs=(*given, *_text_inputs(source, "controlnet", config)),
        outputs=tuple(residuals(config)),
        sizes={"batch": BATCH, **_latent_sizes(), "length": LENGTH, **pixels, **_level_sizes(config)},
        fill={"timestep": TIME, "time_ids": (0.0, 512.0), "control": (0.0, 1.0), "control_scale": (0.5, 1.5)},
    )


def residuals(config: dict[str, Any]) -> list[TensorSpec]:
    """What a ControlNet adds to a UNet's skip connections, in order, and to its middle."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    depths = [layers] * len(channels) if isinstance(layers, int) else layers
    found = [(channels[0], 0)]
    for level, (width, depth) in enumerate(zip(channels, depths, strict=True)):
        found += [(width, level)] * depth
        if level < len(channels) - 1:
            found.append((width, level + 1))
    last = len(channels) - 1
    named = [(f"down_residual_{i}", *each) for i, each in enumerate(found)] + [("mid_residual", channels[-1], last)]
    return [f32(name, "batch", width, *_axes(level)) for name, width, level in named]


def _axes(level: int) -> tuple[str, str]:
    """Names of height and width after `level` downsamplings by two, which round up."""
    return ("height", "width") if level == 0 else (f"height_{2**level}", f"width_{2**level}")


def _latent_sizes() -> dict[str, tuple[int, ...]]:
    return {"height": HEIGHT, "width": WIDTH}


def _level_sizes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(-(-size // 2**level) for size in sizes)
        for level in range(1, len(config["block_out_channels"]))
        for name, sizes in zip(_axes(level), (HEIGHT, WIDTH), strict=True)
    }


def _text_inputs(source: Source, where: str, config: dict[str, Any]) -> list[TensorSpec]:
    """What the text encoders give, and SDXL's sizes; held against the width the network takes."""
    names = ("encoder_hidden_states", "encoder_hidden_states_2")
    states = [
        f32(name, "batch", "length", source.config(part)["hidden_size"])
        for name, part in zip(names, text_encoders(source), strict=False)
    ]
    widths = sum(int(spec.shape[2]) for spec in states)
    if widths != config["cross_attention_dim"]:
        raise UnsupportedModel(
            f"{where} takes text states {config['cross_attention_dim']} wide, the text encoders give {widths} in all"
        )
    if config.get("addition_embed_type") != "text_time":
        return states
    return [*states, f32("text_embeds", "batch", projection(source, "text_encoder_2")), f32("time_ids", "batch", 6)]
