"""Pipelines with a part more: ControlNet beside the UNet, an inpainting UNet, a small second decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.export.diffusion import tiny_pipelines as tiny

UNCHECKED: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def controlnet(unet: Any) -> diffusers.ControlNetModel:
    """A ControlNet made from a UNet as diffusers makes one, its zero convolutions filled; halves a control picture."""
    torch.manual_seed(4)
    model = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()
    tiny.fill_zeros(model)
    return model


def control_sd() -> diffusers.StableDiffusionControlNetPipeline:
    """Stable Diffusion 1.5's shape, two levels, ControlNet, TCDScheduler."""
    words, denoiser = tiny.tokenizer(), tiny.unet()
    return diffusers.StableDiffusionControlNetPipeline(
        unet=denoiser,
        controlnet=controlnet(denoiser),
        vae=tiny.autoencoder_tiny(),
        text_encoder=tiny.text_encoder(CLIPTextModel, words),
        tokenizer=words,
        scheduler=diffusers.TCDScheduler(**tiny.BETAS),
        **UNCHECKED,
    )


def control_sdxl() -> diffusers.StableDiffusionXLControlNetPipeline:
    """SDXL's shape, ControlNet, TCDScheduler."""
    words, more = tiny.tokenizer(), tiny.tokenizer(pad="!</w>")
    denoiser = tiny.unet_xl()
    return diffusers.StableDiffusionXLControlNetPipeline(
        unet=denoiser,
        controlnet=controlnet(denoiser),
        vae=tiny.autoencoder_tiny(),
        text_encoder=tiny.text_encoder(CLIPTextModel, words),
        text_encoder_2=tiny.text_encoder(CLIPTextModelWithProjection, more, hidden=24),
        tokenizer=words,
        tokenizer_2=more,
        scheduler=diffusers.TCDScheduler(**tiny.BETAS),
        add_watermarker=False,
    )


def inpaint_sd() -> diffusers.StableDiffusionInpaintPipeline:
    """A UNet of nine channels under TCDScheduler, AutoencoderKL."""
    words = tiny.tokenizer()
    return diffusers.StableDiffusionInpaintPipeline(
        unet=tiny.unet(in_channels=9, **tiny.ONE_LEVEL),
        vae=tiny.autoencoder_kl(),
        text_encoder=tiny.text_encoder(CLIPTextModel, words),
        tokenizer=words,
        scheduler=diffusers.TCDScheduler(**tiny.BETAS),
        **UNCHECKED,
    )


CONDITIONED = {"control-sd": control_sd, "control-sdxl": control_sdxl, "inpaint-sd": inpaint_sd}
WITH_TINY = ("inpaint-sd",)  # saved with a small decoder beside the large one


def small_decoder(folder: Path, **changes: Any) -> diffusers.AutoencoderTiny:
    """An AutoencoderTiny saved in `folder`, with some fields of its config changed."""
    model = tiny.autoencoder_tiny()
    torch.manual_seed(6)
    tiny.shake(model)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return model
