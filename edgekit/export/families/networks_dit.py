"""Torch-side builders of diffusion transformers: PixArt, SD3 and FLUX behind a graph's signature.

What a pipeline of diffusers does around its transformer with tensors alone is done here, inside the graph: joining text
states, packing latents into patches, position ids, units of time. Positions are computed from the size the graph is
given, so that one graph draws every size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.export.families.networks_base import Part, streamed


class SinCosPatches(nn.Module):  # type: ignore[misc]
    """diffusers' PatchEmbed for any size: its code looks up or computes positions by a size known when it is traced."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.proj, self.base, self.zoom = stock.proj, float(stock.base_size), float(stock.interpolation_scale)
        width = self.proj.out_channels // 4  # sines and cosines of two axes
        frequency = 1 / 10000 ** (torch.arange(width, dtype=torch.float64) / width)
        self.register_buffer("frequency", frequency.to(torch.float32), persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, patches, width of the model), row by row."""
        patches = self.proj(latent)
        height, width = patches.shape[2:]
        rows, columns = self._axis(height), self._axis(width)
        both = torch.cat([columns.expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1)
        return patches.flatten(2).transpose(1, 2) + both.flatten(0, 1)

    def _axis(self, size: int) -> Tensor:
        place = torch.arange(size, dtype=torch.float32) * (self.base / self.zoom) / size
        angle = place[:, None] * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class PixArt(Part):
    """PixArtTransformer2DModel (Chen et al. 2024), cross attention to the prompt's own T5 states."""

    def __init__(self, folder: Path) -> None:
        super().__init__(streamed("PixArtTransformer2DModel", folder))
        self.inner.pos_embed = SinCosPatches(self.inner.pos_embed)
        # The model squeezes axis 1, the patches, behind this: nothing in torch, but an invalid Squeeze in a graph.
        self.inner.proj_out.register_forward_hook(lambda _, __, patches: patches.unsqueeze(1))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """Latent, time, text states and their mask, pixels and aspect; the prediction has twice the latent's channels.

        (batch, channels, height, width), (batch,), (batch, length, width), (batch, length), (batch, 2), (batch, 1).
        """
        out: Tensor = self.inner(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep,
            added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
            return_dict=False,
        )[0]
        return out


class SD3(Part):
    """SD3Transformer2DModel (Esser et al. 2024) with two CLIP encoders and T5, or zeros where T5 was left out."""

    LENGTH = 256  # StableDiffusion3Pipeline's max_sequence_length, of T5's ids

    def __init__(self, folder: Path) -> None:
        super().__init__(streamed("SD3Transformer2DModel", folder))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_2: Tensor,
        text_embeds: Tensor,
        text_embeds_2: Tensor,
        encoder_hidden_states_3: Tensor | None = None,
    ) -> Tensor:
        """Latent, time (batch,), states and pooled text of both CLIPs, T5's states; the prediction is like the latent.

        CLIP's states lie beside each other, filled up to T5's width, and T5's behind them (the paper's figure 2).
        """
        clip = torch.cat([encoder_hidden_states, encoder_hidden_states_2], dim=-1)
        width = self.inner.config.joint_attention_dim
        clip = functional.pad(clip, (0, width - clip.shape[-1]))
        if encoder_hidden_states_3 is None:
            encoder_hidden_states_3 = clip.new_zeros((clip.shape[0], self.LENGTH, width))
        out: Tensor = self.inner(
            hidden_states=sample,
            encoder_hidden_states=torch.cat([clip, encoder_hidden_states_3], dim=1),
            pooled_projections=torch.cat([text_embeds, text_embeds_2], dim=-1),
            timestep=timestep,
            return_dict=False,
        )[0]
        return out


def fold_patches(x: Tensor, size: int = 2) -> Tensor:
    """Squares of pixels into channels: (batch, c, height, width) to (batch, c size^2, height / size, width / size).

    A convolution with an identity for a kernel: a reshape would demand even sides before it was traced.
    """
    channels = x.shape[1] * size**2
    kernel = torch.eye(channels, dtype=x.dtype).reshape(channels, x.shape[1], size, size)
    return functional.conv2d(x, kernel, stride=size)


def unfold_patches(x: Tensor, height: int, width: int, size: int = 2) -> Tensor:
    """Patches (batch, height width, c size^2) back to (batch, c, height size, width size)."""
    grid = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return functional.pixel_shuffle(grid, size)


class Flux(Part):
    """FluxTransformer2DModel on whole latents: packing by 2 x 2, position ids and the unit of time are inside."""

    def __init__(self, folder: Path) -> None:
        super().__init__(streamed("FluxTransformer2DModel", folder))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Latent, time (batch,) in thousandths, T5's states, CLIP's pooled text, guidance (batch,); like the latent."""
        packed = fold_patches(sample)
        height, width = packed.shape[2:]
        rows = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width)
        columns = torch.arange(width, dtype=torch.float32).expand(height, width)
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        out = self.inner(
            hidden_states=packed.flatten(2).transpose(1, 2),
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep / 1000,
            img_ids=places,
            txt_ids=torch.zeros((encoder_hidden_states.shape[1], 3)),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unfold_patches(out, height, width)
