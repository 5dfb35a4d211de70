"""AudioLDM with a real shape and weights that no library's own start decides: numpy draws every one of them.

So the sound of tests/golden/pipelines/audioldm.npz, which diffusers' pipeline made, is what these models make wherever
they are built, with or without that pipeline. To renew it: python -m tests.export.diffusion.tiny_audio
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from tests.export.diffusion.tiny_pipelines import WORDS

GOLDEN = Path(__file__).parents[2] / "golden" / "pipelines" / "audioldm.npz"
GOLDEN_CALL = {"num_inference_steps": 4, "guidance_scale": 2.0, "audio_length_in_s": 0.5}
PROMPT, NEGATIVE, SEED = "a dog on the grass", "the cat", 11

LENGTH = 16  # of a prompt, and the width of its projection: diffusers cuts negative prompts by the latter
BINS, CHANNELS, ROWS = 8, 4, 10  # of a spectrogram; of a latent, and how many it has by default
RATE, RATES = 1600, (4, 4)  # samples a second; a frame of a spectrogram is 16 samples, 10 ms, as in the published model
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}


def drawn(model: nn.Module, seed: int, gain: float = 1.0) -> Any:
    """A model whose weights keep the size of what goes through them, times `gain`; norms are near one."""
    noise = np.random.Generator(np.random.Philox(seed))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = noise.standard_normal(tuple(parameter.shape))
            if parameter.ndim > 1:
                value *= gain / np.sqrt(parameter[0].numel())
            else:
                value = 0.1 * value + (name.endswith("weight"))
            parameter.copy_(torch.from_numpy(value))
    return model.eval()


def tokenizer() -> RobertaTokenizer:
    """Byte pairs learned from a few words, in RoBERTa's form: `<s>` before, `</s>` behind, `<pad>` is 1."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(WORDS, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return RobertaTokenizer(vocab={**learned["vocab"], "<mask>": 300}, merges=merges, model_max_length=LENGTH)


def text_encoder(words: RobertaTokenizer) -> ClapTextModelWithProjection:
    """Two layers of CLAP's text model."""
    config = ClapTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH + 2,
        projection_dim=LENGTH,
    )
    return drawn(ClapTextModelWithProjection(config), 1)


def unet() -> diffusers.UNet2DConditionModel:
    """Two levels, the lower attending to itself; the text is joined to the time as a vector."""
    config = {
        "sample_size": ROWS,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": (8, 16),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": LENGTH,
        "class_embeddings_concat": True,
    }
    return drawn(diffusers.UNet2DConditionModel(**config), 2)


def vae() -> diffusers.AutoencoderKL:
    """Two levels of an autoencoder of spectrograms, with a scale of its own."""
    config = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": CHANNELS,
        "norm_num_groups": 2,
        "scaling_factor": 0.92,
    }
    return drawn(diffusers.AutoencoderKL(**config), 3)


def vocoder(**changes: Any) -> SpeechT5HifiGan:
    """Two upsamplings, the second by an odd overhang, which makes one sample more than a multiple."""
    config = {
        "model_in_dim": BINS,
        "sampling_rate": RATE,
        "upsample_initial_channel": 8,
        "upsample_rates": list(RATES),
        "upsample_kernel_sizes": [8, 7],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "normalize_before": False,
    }
    return drawn(SpeechT5HifiGan(SpeechT5HifiGanConfig(**{**config, **changes})), 4, gain=1.2)


def lcm_scheduler() -> diffusers.LCMScheduler:
    """Of a UNet distilled to consistency."""
    return diffusers.LCMScheduler(**BETAS)


def ddim_scheduler(**changes: Any) -> diffusers.DDIMScheduler:
    """As the published AudioLDM has it: a leading grid, offset by one, that ends at the schedule's first point."""
    plain = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    return diffusers.DDIMScheduler(**{**BETAS, **plain, **changes})


def save_folder(folder: Path) -> Path:
    """The folder of a tiny AudioLDM as `save_pretrained` of the pipeline would write it, but without the pipeline."""
    words = tokenizer()
    parts = {
        "text_encoder": text_encoder(words),
        "tokenizer": words,
        "unet": unet(),
        "vae": vae(),
        "vocoder": vocoder(),
        "scheduler": lcm_scheduler(),
    }
    index: dict[str, Any] = {"_class_name": "AudioLDMPipeline", "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def audioldm(folder: Path) -> Any:
    """diffusers' own pipeline of a folder; it is deprecated there, and may be gone one day."""
    from diffusers.pipelines.deprecated.audioldm import AudioLDMPipeline

    pipeline = AudioLDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def in_torch(pipeline: Any, batch: int = 1, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents (batch, channels, rows, width) and sound (batch, samples) of the pipeline."""
    latents: list[torch.Tensor] = []
    sound = pipeline(
        prompt=[PROMPT] * batch,
        generator=torch.Generator("cpu").manual_seed(SEED),
        callback=lambda row, t, x: latents.append(x.clone()),
        **changes,
    ).audios
    return latents[-1].numpy(), sound


def golden_call() -> dict[str, Any]:
    """What the frozen sound was asked with."""
    return {**GOLDEN_CALL, "negative_prompt": [NEGATIVE]}


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as root:
        frozen = in_torch(audioldm(save_folder(Path(root) / "folder")), **golden_call())
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, latents=frozen[0], sound=frozen[1])
