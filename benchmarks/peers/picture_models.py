"""Pipelines of random weights in published shapes, and the plain ONNX graphs anyone gets of them.

    python picture_models.py folder MODEL TARGET     the folder that `save_pretrained` writes, weights in float16
    python picture_models.py plain SOURCE TARGET     every part by torch.onnx.export, and host.npz (see `host`)

Speed depends on shapes, and not on what the numbers are. MODEL is of MODELS. Last layers of decoders are rescaled, so
that pictures have contrast and differences between engines show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.export.diffusion import tiny_dits as dits
from tests.export.diffusion import tiny_pipelines as tiny

SIZE, LATENT = 512, 64
PROMPT = "photo of an old house"
CONTRAST = 0.5  # standard deviation of what a decoder draws, of [-1, 1]
SD = {"sample_size": LATENT, "cross_attention_dim": 768, "attention_head_dim": 8}
SD15 = {**SD, "block_out_channels": (320, 640, 1280, 1280), "time_cond_proj_dim": 256}
BK_SDM_TINY = {
    **SD,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 1,
    "mid_block_type": None,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
PIXART_XL = {
    "sample_size": LATENT,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 768,  # of the T5 here; the published one is 4096 wide
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}


def clip(kind: type, words: Any, width: int, layers: int = 12) -> Any:
    """A CLIP text model with heads of 64, 77 positions and the published vocabulary's size."""
    sizes = {"num_attention_heads": width // 64, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    return tiny.text_encoder(
        kind, words, width, vocab_size=49408, max_position_embeddings=77, projection_dim=width, **sizes
    )


def words(pad: str = tiny.END) -> Any:
    """The tokenizer of a few words, for 77 positions."""
    made = tiny.tokenizer(pad)
    made.model_max_length = 77
    return made


def autoencoder_kl(**changes: Any) -> Any:
    """Stable Diffusion's autoencoder, 84 M parameters."""
    sides = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    made = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=SIZE, **sides, **changes
    )
    return contrasted(made, made.decoder.conv_out)


def autoencoder_tiny() -> Any:
    """TAESD's shape, 2.4 M parameters."""
    made = diffusers.AutoencoderTiny()
    return contrasted(made, made.decoder.layers[-1])


def contrasted(made: Any, last: nn.Module) -> Any:
    """The autoencoder with its last layer scaled and shifted, so that unit noise is decoded to CONTRAST around grey."""
    with torch.no_grad():
        for _ in range(2):  # a small decoder bends its input, and what it gives is not linear in its last layer's bias
            drawn = made.decode(torch.randn(1, 4, 16, 16)).sample
            last.weight *= CONTRAST / drawn.std()
            last.bias *= 0
            last.bias -= made.decode(torch.randn(1, 4, 16, 16)).sample.mean() / 2
    return made.eval()


def unet(config: dict[str, Any]) -> Any:
    made = diffusers.UNet2DConditionModel(**config).eval()
    tiny.fill_zeros(made)
    return made


def stable_diffusion(kind: Any, shape: dict[str, Any], vae: Any, scheduler: Any) -> Any:
    """A pipeline with CLIP ViT-L and nothing that checks or prepares pictures."""
    ids = words()
    return kind(
        unet=unet(shape),
        vae=vae,
        text_encoder=clip(CLIPTextModel, ids, 768),
        tokenizer=ids,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def lcm() -> Any:
    """LCM in Stable Diffusion 1.5's shape: 860 M, guidance embedded; AutoencoderKL."""
    scheduler = diffusers.LCMScheduler(**tiny.BETAS)
    return stable_diffusion(diffusers.LatentConsistencyModelPipeline, SD15, autoencoder_kl(), scheduler)


def bk_tiny() -> Any:
    """BK-SDM-Tiny's shape, 323 M, with a one-step contract; AutoencoderTiny."""
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", **tiny.BETAS)
    return stable_diffusion(diffusers.StableDiffusionPipeline, BK_SDM_TINY, autoencoder_tiny(), scheduler)


def sdxl(divisor: int = 1) -> Any:
    """SDXL-Turbo, text encoders of 12 and 32 layers; by two: every width halved, depths and heads of 64 kept.

    The UNet has 2567 M parameters, or 645 M.
    """
    ids, more = words(), words(pad="!</w>")
    shape = {
        "sample_size": LATENT,
        "block_out_channels": tuple(width // divisor for width in (320, 640, 1280)),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": tuple(width // divisor // 64 for width in (320, 640, 1280)),
        "cross_attention_dim": 2048 // divisor,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280 // divisor,
    }
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(shape),
        vae=autoencoder_kl(scaling_factor=0.13025),
        text_encoder=clip(CLIPTextModel, ids, 768 // divisor),
        text_encoder_2=clip(CLIPTextModelWithProjection, more, 1280 // divisor, layers=32),
        tokenizer=ids,
        tokenizer_2=more,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **tiny.BETAS),
        add_watermarker=False,
    )


def pixart() -> Any:
    """PixArt-delta's transformer for 512 pixels, 610 M; a T5 of base size in place of XXL; AutoencoderKL."""
    ids = dits.unigram()
    transformer = diffusers.PixArtTransformer2DModel(**PIXART_XL).eval()
    tiny.fill_zeros(transformer)
    return diffusers.PixArtAlphaPipeline(
        tokenizer=ids,
        text_encoder=T5EncoderModel(T5Config(**T5_BASE, feed_forward_proj="gated-gelu")).eval(),
        vae=autoencoder_kl(),
        transformer=transformer,
        scheduler=diffusers.LCMScheduler(**dits.LINEAR),
    )


SMALL = {  # two levels with attention in both, and a latent of 32: every metric has what it needs
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "sample_size": 32,
}


def small_lcm() -> Any:
    """LCM's networks, 1 M: guidance embedded; AutoencoderKL."""
    ids = tiny.tokenizer()
    return diffusers.LatentConsistencyModelPipeline(
        unet=tiny.unet(**SMALL, time_cond_proj_dim=32, cross_attention_dim=64),
        vae=tiny.autoencoder_kl(),
        text_encoder=tiny.text_encoder(CLIPTextModel, ids, 64),
        tokenizer=ids,
        scheduler=diffusers.LCMScheduler(**tiny.BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def small_sdxl() -> Any:
    """SDXL-Turbo's networks, 2 M: two text encoders, pooled text and sizes, several blocks in a transformer."""
    ids, more = tiny.tokenizer(), tiny.tokenizer(pad="!</w>")
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    shape = {**SMALL, "transformer_layers_per_block": (1, 2), "use_linear_projection": True}
    return diffusers.StableDiffusionXLPipeline(
        unet=tiny.unet(**shape, **added, projection_class_embeddings_input_dim=80, cross_attention_dim=112),
        vae=tiny.autoencoder_kl(),
        text_encoder=tiny.text_encoder(CLIPTextModel, ids, 64),
        text_encoder_2=tiny.text_encoder(CLIPTextModelWithProjection, more, 48),
        tokenizer=ids,
        tokenizer_2=more,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **tiny.BETAS),
        add_watermarker=False,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "small-lcm": small_lcm,
    "small-sdxl": small_sdxl,
    "lcm": lcm,
    "tiny": bk_tiny,
    "pixart": pixart,
    "half-sdxl": partial(sdxl, 2),
    "sdxl": sdxl,
}
DENOISERS = ("unet", "transformer")


class Text(nn.Module):
    """What a pipeline takes of a text encoder: the last states, or SDXL's last but one and the pooled text."""

    def __init__(self, inner: nn.Module, penultimate: bool) -> None:
        super().__init__()
        self.inner, self.penultimate = inner, penultimate

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        told = {} if attention_mask is None else {"attention_mask": attention_mask}
        out = self.inner(input_ids, **told, output_hidden_states=self.penultimate)
        if not self.penultimate:
            return out.last_hidden_state
        pooled = getattr(out, "text_embeds", None)
        return out.hidden_states[-2] if pooled is None else (out.hidden_states[-2], pooled)


class UNet(nn.Module):
    """The UNet; what is there of w-embedding, pooled text and sizes follows in this order."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        given = {"timestep_cond": timestep_cond, "added_cond_kwargs": added, "return_dict": False}
        return self.inner(sample, timestep, encoder_hidden_states, **given)[0]


class Transformer(nn.Module):
    """PixArt's transformer: the noise, without the variance."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        told = {"resolution": None, "aspect_ratio": None}
        given = {"encoder_attention_mask": encoder_attention_mask, "added_cond_kwargs": told, "return_dict": False}
        return self.inner(sample, encoder_hidden_states, timestep, **given)[0].chunk(2, dim=1)[0]


class Decoder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.inner.decode(latent_sample, return_dict=False)[0]


def host(pipeline: Any) -> dict[str, np.ndarray]:
    """What the program around the graphs supplies to draw one picture in one step, as arrays.

    A step is linear in the sample and in the network's answer: `linear` holds the sample's start, the network's input
    scale, and both factors; `timestep`; `latents`, unit noise; `decode`, what latents are divided by; then ids and
    masks by the name of their text encoder, and the network's other inputs by their own.
    """
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(1)
    time = scheduler.timesteps[0]
    start = float(scheduler.init_noise_sigma)
    scale = float(scheduler.scale_model_input(torch.ones(1), time))
    factors = []
    for noise, sample in ((0.0, 1.0), (1.0, 0.0)):
        scheduler.set_timesteps(1)
        scheduler.scale_model_input(torch.ones(1), time)
        factors.append(float(scheduler.step(torch.full((1,), noise), time, torch.full((1,), sample)).prev_sample))
    found: dict[str, Any] = {
        "linear": np.array([start, scale, *factors]),
        "timestep": np.array([int(time)]),
        "latents": np.random.default_rng(0).standard_normal((1, 4, LATENT, LATENT), dtype=np.float32),
        "decode": np.array(pipeline.vae.config.scaling_factor),
    }
    for name, ids in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if getattr(pipeline, name, None) is not None:
            masked = hasattr(pipeline, "transformer")
            length = 120 if masked else 77
            made = getattr(pipeline, ids)(PROMPT, padding="max_length", max_length=length, truncation=True)
            found[f"{name}.input_ids"] = np.array([made.input_ids], np.int64)
            if masked:
                found[f"{name}.attention_mask"] = np.array([made.attention_mask], np.int64)
                found["encoder_attention_mask"] = found[f"{name}.attention_mask"]
    if hasattr(pipeline, "get_guidance_scale_embedding"):
        width = pipeline.unet.config.time_cond_proj_dim
        if width:  # the default of LatentConsistencyModelPipeline is 8.5, and it embeds that less one
            found["timestep_cond"] = pipeline.get_guidance_scale_embedding(torch.tensor([7.5]), width).numpy()
    if hasattr(pipeline, "text_encoder_2"):
        found["time_ids"] = np.array([[SIZE, SIZE, 0, 0, SIZE, SIZE]], np.float32)
    return found


def plain(source: Path, target: Path) -> None:
    """Every part as torch.onnx.export gives it: its own opset, attention in primitives, sizes free where it can."""
    target.mkdir(parents=True)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
    given = host(pipeline)
    np.savez(target / "host.npz", **given)
    text, pooled = [], None
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(pipeline, name, None) is None:
                continue
            network = Text(getattr(pipeline, name), penultimate=hasattr(pipeline, "text_encoder_2")).eval()
            feeds = {key.partition(".")[2]: value for key, value in given.items() if key.startswith(f"{name}.")}
            write(network, twice(feeds), target / f"{name}.onnx")
            states = network(*twice(feeds).values())
            states, pooled = (states, None) if isinstance(states, Tensor) else states
            text.append(states)
        decoder = {"latent_sample": torch.from_numpy(given["latents"]).repeat(2, 1, 1, 1)}
        write(Decoder(pipeline.vae).eval(), decoder, target / "vae_decoder.onnx", space=True)
        names = ("latents", "timestep", "timestep_cond", "time_ids", "encoder_attention_mask")
        feeds = twice({name: given[name] for name in names if name in given})
        feeds = {"sample": feeds.pop("latents"), "timestep": feeds.pop("timestep"), **feeds}
        feeds["encoder_hidden_states"] = torch.cat(text, -1)
        if pooled is not None:
            feeds["text_embeds"] = pooled
        inner = getattr(pipeline, "transformer", None) or pipeline.unet
        if hasattr(pipeline, "transformer"):  # torch.export cannot trace PixArt's with a free batch or size
            one = {name: value[:1] for name, value in feeds.items()}
            write(Transformer(inner).eval(), one, target / "denoiser.onnx", free=False)
        else:
            write(UNet(inner).eval(), feeds, target / "denoiser.onnx", space=True)


def twice(feeds: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Batch 2: torch.export takes an axis of one for a constant."""
    return {name: torch.from_numpy(value).repeat(2, *[1] * (value.ndim - 1)) for name, value in feeds.items()}


def write(network: nn.Module, feeds: dict[str, Tensor], path: Path, space: bool = False, free: bool = True) -> None:
    """The exporter's defaults; if `free` the batch is, and of the first input, with `space`, height and width."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: {0: dynamic} for name in feeds}
    if space:
        shapes[next(iter(feeds))] |= {2: dynamic, 3: dynamic}
    torch.onnx.export(
        network,
        (),
        path,
        kwargs=feeds,
        input_names=list(feeds),
        dynamic_shapes=shapes if free else None,
        dynamo=True,
        verbose=False,
    )


def main() -> None:
    kind, source, target = sys.argv[1:]
    torch.manual_seed(0)
    if kind == "folder":
        MODELS[source]().to(dtype=torch.float16).save_pretrained(target)
    else:
        plain(Path(source), Path(target))


if __name__ == "__main__":
    main()
