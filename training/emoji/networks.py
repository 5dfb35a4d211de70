"""The networks of the emoji model: stock diffusers and transformers classes in small sizes.

Images are RGB in [-1, 1] of 32x32 pixels; the UNet sees them pixel-unshuffled by two, as (B, 12, 16, 16).
`m` is the velocity noise - image of the straight path x = (1 - sigma) image + sigma noise, so image = x - sigma m.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

IMAGE = 32  # pixels of the generated image
LENGTH = 16  # tokens of every prompt; shorter ones are padded with [PAD] = 0
TEXT_WIDTH = 160
GUIDANCE_WIDTH = 64  # width of the guidance embedding (`time_cond_proj_dim`)


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    """A two-layer CLIP text model; only its last hidden state (B, 16, 160) is used."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=0,  # the pooled output reads the first [PAD]; nothing uses it
    )
    model = CLIPTextModel(config)
    for name, weight in model.named_parameters():
        if name.endswith("token_embedding.weight"):
            nn.init.normal_(weight, std=1.0)  # CLIP's 0.02 hides the words for the first thousands of steps
        elif name.endswith("position_embedding.weight"):
            nn.init.normal_(weight, std=0.2)
    return model


def make_unet() -> UNet2DConditionModel:
    """A three-level UNet on (B, 12, 16, 16); the text enters by attention at 4x4 and, pooled, with the time everywhere.

    The pooled path (`addition_embed_type="text"`) matters: by cross-attention alone a run of 60,000 samples had hardly
    learnt to heed the prompt.
    """
    unet = UNet2DConditionModel(
        sample_size=IMAGE // 2,
        in_channels=12,
        out_channels=12,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        time_cond_proj_dim=GUIDANCE_WIDTH,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    _start_as_identity(unet)
    return unet


def _start_as_identity(unet: UNet2DConditionModel) -> None:
    """Zero the last layer of every residual branch, of the output and of the guidance embedding."""
    last = [unet.conv_out, unet.time_embedding.cond_proj]
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")):
            last.append(module)
    for layer in last:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def fold(images: Tensor) -> Tensor:
    """(B, 3, 32, 32) -> (B, 12, 16, 16)."""
    return F.pixel_unshuffle(images, 2)


def unfold(latents: Tensor) -> Tensor:
    """(B, 12, 16, 16) -> (B, 3, 32, 32)."""
    return F.pixel_shuffle(latents, 2)


def guidance_embedding(scale: Tensor, width: int = GUIDANCE_WIDTH) -> Tensor:
    """(B,) guidance scales -> (B, width), as `get_guidance_scale_embedding(scale - 1)` of diffusers' LCM pipeline."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1))
    angles = 1000.0 * (scale.float() - 1.0)[:, None] * torch.exp(exponents)[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def velocity(unet: nn.Module, x: Tensor, sigma: Tensor, text: Tensor, guidance: Tensor | None = None) -> Tensor:
    """The velocity m (B, 12, 16, 16) at x; sigma is (B,), guidance the (B, 64) embedding or None (the teacher)."""
    out: Tensor = unet(x, sigma * 1000.0, text, timestep_cond=guidance, return_dict=False)[0]
    return out
