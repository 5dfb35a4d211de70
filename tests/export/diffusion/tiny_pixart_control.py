"""PixArt-delta with a ControlNet-Transformer: random weights in the public folders' layout, and the slow obvious twin.

The twin is the paper's figure of section 4 (Chen et al. 2024, arXiv 2401.05252) in the order of diffusers' research
project examples/research_projects/pixart: the transformer of a real pipeline, block by block, in place of its forward.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.export.diffusion import tiny_dits
from tests.export.diffusion.tiny_pipelines import fill_zeros, shake

BLOCKS, COPIES = 4, 2  # the last main block takes nothing from a copy


def pixart() -> diffusers.PixArtAlphaPipeline:
    """tiny_dits' PixArt with BLOCKS blocks."""
    pipeline = tiny_dits.pixart()
    torch.manual_seed(0)
    deeper = diffusers.PixArtTransformer2DModel.from_config(
        {**pipeline.transformer.config, "num_layers": BLOCKS}
    ).eval()
    fill_zeros(deeper)
    pipeline.register_modules(transformer=deeper)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Adapter(nn.Module):
    """Copies of the first blocks, moved away from them as training moves them, with linear layers that are not zero."""

    def __init__(self, transformer: Any, copies: int = COPIES) -> None:
        super().__init__()
        torch.manual_seed(5)
        width = transformer.inner_dim
        self.controlnet_blocks = nn.ModuleList()
        for number in range(copies):
            block = nn.Module()
            if number == 0:
                block.before_proj = nn.Linear(width, width)
            block.transformer_block = copy.deepcopy(transformer.transformer_blocks[number])
            block.after_proj = nn.Linear(width, width)
            self.controlnet_blocks.append(block)
        shake(self)
        self.eval()

    def save(self, folder: Path) -> None:
        """The folder `controlnet`: a config of one field, and the weights."""
        folder.mkdir()
        config = {"_class_name": "PixArtControlNetAdapterModel", "num_layers": len(self.controlnet_blocks)}
        (folder / "config.json").write_text(json.dumps(config))
        weights = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def save(pipeline: Any, adapter: Adapter, folder: Path, name: str = "PixArtAlphaControlnetPipeline") -> Path:
    """A pipeline's folder with a ControlNet in it, and in its index."""
    pipeline.save_pretrained(folder)
    adapter.save(folder / "controlnet")
    index = json.loads((folder / "model_index.json").read_text())
    row = ["controlnet_pixart_alpha", "PixArtControlNetAdapterModel"]
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name, "controlnet": row}))
    return folder


def predict(
    transformer: Any,
    adapter: Adapter,
    sample: Tensor,
    timestep: Tensor,
    text: Tensor,
    mask: Tensor,
    added: dict[str, Tensor],
    control: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """The transformer's prediction under control, by diffusers' own layers one by one.

    Args:
        transformer, adapter: the two models.
        sample, timestep, text, mask, added: as PixArtTransformer2DModel takes them.
        control: the control picture's latent, scaled, shaped as the sample.
        scale: how closely to follow it.
    """
    height, width = (side // transformer.config.patch_size for side in sample.shape[2:])
    hidden, state = transformer.pos_embed(sample), transformer.pos_embed(control)
    time, embedded = transformer.adaln_single(timestep, added, batch_size=len(sample), hidden_dtype=sample.dtype)
    text = transformer.caption_projection(text)
    bias = (1 - mask.to(sample.dtype))[:, None] * -10000.0
    told = {"encoder_hidden_states": text, "encoder_attention_mask": bias, "timestep": time}
    for number, block in enumerate(transformer.transformer_blocks):
        if 1 <= number <= len(adapter.controlnet_blocks):
            copied = adapter.controlnet_blocks[number - 1]
            if number == 1:
                state = hidden + copied.before_proj(state)
            state = copied.transformer_block(state, **told)
            hidden = hidden + scale * copied.after_proj(state)
        hidden = block(hidden, **told)
    shift, gain = (transformer.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    patches = transformer.proj_out(transformer.norm_out(hidden) * (1 + gain) + shift)
    rows = patches.reshape(len(sample), height, width, 2, 2, transformer.out_channels)
    return rows.permute(0, 5, 1, 3, 2, 4).reshape(len(sample), -1, 2 * height, 2 * width)


def latent_of(pipeline: Any, picture: Any, height: int, width: int) -> Tensor:
    """The control picture at the size of the sample's picture, encoded to the mean, scaled: (1, channels, ...)."""
    pixels = pipeline.image_processor.preprocess(picture, height=height, width=width)
    with torch.no_grad():
        return pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor


@contextlib.contextmanager
def followed(pipeline: Any, adapter: Adapter, control: Tensor, scale: float) -> Iterator[None]:
    """While this lasts, a pipeline's transformer is the twin: tokens, guidance, scheduler and decoder stay its own."""
    transformer = pipeline.transformer

    def forward(sample: Tensor, **given: Any) -> tuple[Tensor]:
        text, mask = given["encoder_hidden_states"], given["encoder_attention_mask"]
        whole = control.expand(len(sample), -1, -1, -1)
        added = given["added_cond_kwargs"]
        return (predict(transformer, adapter, sample, given["timestep"], text, mask, added, whole, scale),)

    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward
