"""Pipelines that an IP-Adapter goes into, and adapters of random weights: a file, and the image encoder beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.export.diffusion import tiny_pipelines as tiny
from tests.export.diffusion.tiny_svd import image_encoder

TOKENS, EMBEDDING = 4, 32
FILE = "ip-adapter.safetensors"


def sd() -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1.5's shape, LCMScheduler: with and without guidance; no image encoder."""
    words = tiny.tokenizer()
    return diffusers.StableDiffusionPipeline(
        unet=tiny.unet(**tiny.ONE_LEVEL),
        vae=tiny.autoencoder_tiny(),
        text_encoder=tiny.text_encoder(CLIPTextModel, words),
        tokenizer=words,
        scheduler=diffusers.LCMScheduler(**tiny.BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    """SDXL's shape, TCDScheduler; the image encoder is a component of its own folder."""
    words, more = tiny.tokenizer(), tiny.tokenizer(pad="!</w>")
    return diffusers.StableDiffusionXLPipeline(
        unet=tiny.unet_xl(),
        vae=tiny.autoencoder_tiny(),
        text_encoder=tiny.text_encoder(CLIPTextModel, words),
        text_encoder_2=tiny.text_encoder(CLIPTextModelWithProjection, more, hidden=24),
        tokenizer=words,
        tokenizer_2=more,
        scheduler=diffusers.TCDScheduler(**tiny.BETAS),
        image_encoder=image_encoder(),
        feature_extractor=extractor(),
        add_watermarker=False,
    )


def extractor() -> Any:
    """CLIP's preprocessing at 224 pixels, by PIL."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})


PROMPTED = {"ip-sd": sd, "ip-sdxl": sdxl}


def weights(unet: Any, embedding: int = EMBEDDING) -> dict[str, torch.Tensor]:
    """A plain IP-Adapter for a UNet, numbered by diffusers' own list of attention processors."""
    torch.manual_seed(9)
    width = unet.config.cross_attention_dim
    made = {
        "image_proj.proj.weight": torch.randn(TOKENS * width, embedding) / embedding**0.5,
        "image_proj.proj.bias": 0.3 * torch.randn(TOKENS * width),
        "image_proj.norm.weight": 1 + 0.1 * torch.randn(width),
        "image_proj.norm.bias": 0.3 * torch.randn(width),
    }
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(cross):
        shape = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for each in "kv":
            made[f"ip_adapter.{2 * number + 1}.to_{each}_ip.weight"] = torch.randn(shape) / shape[1] ** 0.5
    return made


def save_adapter(unet: Any, folder: Path, **changes: torch.Tensor | None) -> Path:
    """An adapter's file in a folder, with some weights replaced or, where None, left out (dots written as __)."""
    changed = {re.sub("__", ".", name): value for name, value in changes.items()}
    made = {name: value for name, value in {**weights(unet), **changed}.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / FILE)
    return folder / FILE


def reference(height: int = 300, width: int = 410, seed: int = 5) -> Image.Image:
    """Coloured blobs, neither square nor small."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
