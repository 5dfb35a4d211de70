"""aMUSEd with random weights and a real shape: pictures of sixteen tokens."""

from __future__ import annotations

import diffusers
import torch
from diffusers.pipelines.deprecated.amused import AmusedPipeline
from torch import nn
from transformers import CLIPTextModelWithProjection

from tests.export.diffusion.tiny_pipelines import fill_zeros, text_encoder, tokenizer

SIDE, CODES, MASK = 4, 24, 25


def transformer() -> diffusers.UVit2DModel:
    """One block each way, a downsampling, one transformer layer; logits that prefer some tokens to others."""
    torch.manual_seed(0)
    model = diffusers.UVit2DModel(
        hidden_size=8,
        cond_embed_dim=32,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=32,
        vocab_size=CODES + 8,
        codebook_size=CODES,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        sample_size=SIDE,
    ).eval()
    fill_zeros(model)
    nn.init.normal_(model.mlm_layer.conv2.weight, std=0.2)
    return model


def vqvae() -> diffusers.VQModel:
    """Two levels: a token is two by two pixels."""
    torch.manual_seed(2)
    model = diffusers.VQModel(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=8,
        norm_num_groups=2,
        num_vq_embeddings=CODES,
        sample_size=2 * SIDE,
        lookup_from_codebook=True,
    ).eval()
    nn.init.normal_(model.quantize.embedding.weight)  # its own start is too narrow to tell tokens apart
    return model


def amused() -> AmusedPipeline:
    """Sixteen tokens of twenty-four values."""
    words = tokenizer()
    return AmusedPipeline(
        vqvae=vqvae(),
        tokenizer=words,
        text_encoder=text_encoder(CLIPTextModelWithProjection, words),
        transformer=transformer(),
        scheduler=diffusers.AmusedScheduler(mask_token_id=MASK),
    )
