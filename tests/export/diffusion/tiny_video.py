"""Few-step video pipelines with random weights and real shapes, saved as folders like the hub's."""

from __future__ import annotations

import diffusers
import torch
from transformers import CLIPTextModel

from tests.export.diffusion.tiny_pipelines import autoencoder_kl, fill_zeros, text_encoder, tokenizer

LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
FRAMES = 5  # of the longest tiny video


def motion_unet() -> diffusers.UNetMotionModel:
    """Two levels, the lower with cross-attention; every level attends over time."""
    torch.manual_seed(0)
    model = diffusers.UNetMotionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        cross_attention_dim=32,
        num_attention_heads=2,
        norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=FRAMES,
        use_motion_mid_block=False,
    ).eval()
    fill_zeros(model)
    return model


def motion_adapter() -> diffusers.MotionAdapter:
    """The adapter's own folder of weights, which a saved pipeline carries beside the UNet that holds them already."""
    torch.manual_seed(3)
    return diffusers.MotionAdapter(
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=FRAMES,
        use_motion_mid_block=False,
    ).eval()


def animatelcm() -> diffusers.AnimateDiffPipeline:
    """AnimateLCM: consistency steps on linear betas."""
    words = tokenizer()
    return diffusers.AnimateDiffPipeline(
        unet=motion_unet(),
        motion_adapter=motion_adapter(),
        vae=autoencoder_kl(),
        text_encoder=text_encoder(CLIPTextModel, words),
        tokenizer=words,
        scheduler=diffusers.LCMScheduler(**LINEAR),
    )


def lightning_scheduler() -> diffusers.EulerDiscreteScheduler:
    """What makes it AnimateDiff-Lightning: Euler on a trailing grid and linear betas."""
    return diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", **LINEAR)
