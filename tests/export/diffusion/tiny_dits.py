"""Pipelines around diffusion transformers with random weights and real shapes, each a second to make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.export.diffusion.tiny_pipelines import WORDS, fill_zeros, text_encoder, tokenizer

LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def unigram() -> PreTrainedTokenizerFast:
    """A vocabulary of pieces learned from a few words, in T5's form: `</s>` behind, `<pad>` for padding."""
    pieces = Tokenizer(models.Unigram())
    pieces.normalizer = normalizers.NFKC()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    pieces.train_from_iterator(WORDS, trainer)
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def t5(words: PreTrainedTokenizerFast, width: int = 32) -> T5EncoderModel:
    """Two layers of T5's encoder."""
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def autoencoder(channels: int, **changes: Any) -> diffusers.AutoencoderKL:
    """Two levels: pictures are twice the latent's size; one attention in the middle."""
    torch.manual_seed(2)
    config = {
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": channels,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    return diffusers.AutoencoderKL(**config, **changes).eval()


def pixart(sample_size: int = 128) -> diffusers.PixArtAlphaPipeline:
    """PixArt-delta: masked cross attention, twice the channels given; at 128 it is told the picture's size."""
    words = unigram()
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).eval()
    fill_zeros(transformer)
    return diffusers.PixArtAlphaPipeline(
        tokenizer=words,
        text_encoder=t5(words),
        vae=autoencoder(4),
        transformer=transformer,
        scheduler=diffusers.LCMScheduler(**LINEAR),
    )


def sd3(with_t5: bool = True) -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: QK norm and one block with dual attention; two CLIPs and T5."""
    first, second, third = tokenizer(), tokenizer(pad="!</w>"), unigram()
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=72,
        pooled_projection_dim=64,
        out_channels=8,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    fill_zeros(transformer)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(8, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=text_encoder(CLIPTextModelWithProjection, first),
        tokenizer=first,
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, second, hidden=24, hidden_act="gelu"),
        tokenizer_2=second,
        text_encoder_3=t5(third, width=72) if with_t5 else None,
        tokenizer_3=third if with_t5 else None,
    )


def flux(guidance_embeds: bool = False) -> diffusers.FluxPipeline:
    """FLUX.1-schnell: two-stream and one-stream blocks with rotary positions; with an embedded scale, dev's form."""
    first, second = tokenizer(), unigram()
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance_embeds,
    ).eval()
    fill_zeros(transformer)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=text_encoder(CLIPTextModel, first),
        tokenizer=first,
        text_encoder_2=t5(second),
        tokenizer_2=second,
        transformer=transformer,
    )


def byte_level(chat_template: str | None = None, start: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, in the form of Qwen (a chat template) or Gemma (`start` ahead of every text)."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    special = ["<pad>", *([start] if start else []), "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(WORDS, trainer)
    if start:
        pieces.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", model_max_length=4096, chat_template=chat_template
    )


def sana() -> diffusers.SanaSprintPipeline:
    """SANA-Sprint: linear attention, QK norm, a capped Gemma 2 and a deep-compression autoencoder."""
    words = byte_level(start="<bos>")
    torch.manual_seed(1)
    gemma = Gemma2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=32,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    ).eval()
    fill_zeros(transformer)
    torch.manual_seed(2)
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()
    return diffusers.SanaSprintPipeline(
        tokenizer=words,
        text_encoder=Gemma2Model(gemma).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.SCMScheduler(),
    )


QWEN_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def zimage() -> diffusers.ZImagePipeline:
    """Z-Image-Turbo: lists of prompts and pictures, complex rotary positions, a Qwen 3 that reads a chat's turn."""
    words = byte_level(chat_template=QWEN_TURNS)
    torch.manual_seed(1)
    qwen = Qwen3Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[600, 32, 32],
    ).eval()
    fill_zeros(transformer)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=Qwen3Model(qwen).eval(),
        tokenizer=words,
        transformer=transformer,
    )


DITS: dict[str, Callable[[], Any]] = {"pixart": pixart, "sd3": sd3, "flux": flux, "sana": sana, "zimage": zimage}
