"""Few-step pipelines with random weights and real shapes, saved as folders like the hub's; each is a second to make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# Warnings of other people's packages about each other; a test module takes these as its `pytestmark`.
FOREIGN = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]

WORDS = ["a red apple on the table", "the cat and the dog", "blue sky, green grass", "photo of an old house"] * 4
START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 16
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(pad: str = END) -> CLIPTokenizer:
    """A byte-pair vocabulary learned from a few words, in CLIP's form."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    letters = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=letters, special_tokens=[], show_progress=False
    )
    bpe.train_from_iterator(WORDS, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokens = list(dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *learned["vocab"], START, END]))
    merges = [tuple(pair) for pair in learned["merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS, pad_token=pad)


def save_slow_tokenizer(made: CLIPTokenizer, folder: Path) -> None:
    """The older form of a tokenizer folder: vocab.json and merges.txt, no tokenizer.json."""
    (folder / "tokenizer.json").unlink(missing_ok=True)
    model = json.loads(made.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if not isinstance(pair, str) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def text_encoder(kind: type, words: CLIPTokenizer, hidden: int = 32, **changes: Any) -> Any:
    """A two-layer CLIP text model."""
    torch.manual_seed(1)
    config = {
        "hidden_size": hidden,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": len(words),
        "max_position_embeddings": POSITIONS,
        "projection_dim": 32,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return kind(CLIPTextConfig(**{**config, **changes})).eval()


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    """Two levels, the lower with self- and cross-attention."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    model = diffusers.UNet2DConditionModel(**{**config, **changes}).eval()
    fill_zeros(model)
    return model


ONE_LEVEL = {  # half the nodes: for what does not need a downsampling
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


def unet_xl() -> diffusers.UNet2DConditionModel:
    """One level with SDXL's pooled text and sizes."""
    return unet(
        **ONE_LEVEL,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=56,
    )


def shake(model: nn.Module) -> None:
    """Move every weight a little, so that two models of one config differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def fill_zeros(model: nn.Module) -> None:
    """Give layers that start at zero a value: comparing zeros with zeros proves nothing."""
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05)


def autoencoder_kl() -> diffusers.AutoencoderKL:
    """Two levels: pictures are twice the latent's size; one attention in the middle."""
    torch.manual_seed(2)
    model = diffusers.AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    return model.eval()


def autoencoder_tiny() -> diffusers.AutoencoderTiny:
    """Two levels of TAESD's blocks; the last layer is raised, so that pictures are not black."""
    torch.manual_seed(2)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with torch.no_grad():
        model.decoder.layers[-1].weight *= 4
        model.decoder.layers[-1].bias += 0.5
    return model.eval()


def lcm() -> diffusers.LatentConsistencyModelPipeline:
    """Latent consistency: guidance embedded, AutoencoderKL."""
    words = tokenizer()
    return diffusers.LatentConsistencyModelPipeline(
        unet=unet(time_cond_proj_dim=32),
        vae=autoencoder_kl(),
        text_encoder=text_encoder(CLIPTextModel, words),
        tokenizer=words,
        scheduler=diffusers.LCMScheduler(**BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_turbo() -> diffusers.StableDiffusionPipeline:
    """SD-Turbo: networks of Stable Diffusion 2.1 (linear projections, heads by level, gelu), Euler, trailing."""
    words = tokenizer(pad="!</w>")
    return diffusers.StableDiffusionPipeline(
        unet=unet(**ONE_LEVEL, use_linear_projection=True, attention_head_dim=(4,)),
        vae=autoencoder_tiny(),
        text_encoder=text_encoder(CLIPTextModel, words, hidden_act="gelu"),
        tokenizer=words,
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_turbo() -> diffusers.StableDiffusionXLPipeline:
    """SDXL-Turbo: Euler ancestral on a trailing grid, two text encoders, pooled text and sizes."""
    words, more = tokenizer(), tokenizer(pad="!</w>")
    return diffusers.StableDiffusionXLPipeline(
        unet=unet_xl(),
        vae=autoencoder_kl(),
        text_encoder=text_encoder(CLIPTextModel, words),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, more, hidden=24),
        tokenizer=words,
        tokenizer_2=more,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **BETAS),
        add_watermarker=False,
    )


PIPELINES = {"lcm": lcm, "sd-turbo": sd_turbo, "sdxl-turbo": sdxl_turbo}
FAMILY_OF = {"lcm": "lcm", "sd-turbo": "turbo", "sdxl-turbo": "turbo"}
