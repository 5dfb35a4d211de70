"""Torch-side builders of the parts of Stable Diffusion pipelines: load one component, give it a graph's signature.

Each is called with the component's folder and returns a module in evaluation mode, in float32, whose `forward` takes
the part's inputs in order and returns its outputs in order. Only safetensors on this disk are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit.export.families.networks_base import Part, from_diffusers, from_transformers, streamed
from edgekit.export.families.parts import Autoencoder
from edgekit.export.sources import read_json


class UNet(Part):
    """UNet2DConditionModel, and whatever it is conditioned on: its config says which inputs there are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(streamed("UNet2DConditionModel", folder))
        config = self.inner.config
        self.joins = config.in_channels != config.out_channels  # inpainting: mask and masked latents join the sample
        self.vae = autoencoder_beside(folder) if self.joins else None

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor) -> Tensor:
        """Latent, time (batch,), text states to the prediction, shaped as the latent; inputs in edgekit's order.

        SDXL's two text states (Podell et al. 2023) are joined along their width. A masked picture's latents are brought
        to the sample's scale here, for a recipe's conditions are what an encoder gives.
        """
        rest = list(more)
        states, added = _text(self.inner.config, encoder_hidden_states, rest)
        embedding = rest.pop(0) if self.inner.config.time_cond_proj_dim else None
        if self.vae is not None:
            mask, masked = rest.pop(0), rest.pop(0)
            sample = torch.cat([sample, mask, (masked - self.vae.shift) * self.vae.scale], dim=1)
        out: Tensor = self.inner(
            sample,
            timestep,
            states,
            timestep_cond=embedding,
            added_cond_kwargs=added,
            down_block_additional_residuals=tuple(rest[:-1]) if rest else None,
            mid_block_additional_residual=rest[-1] if rest else None,
            return_dict=False,
        )[0]
        return out


class ControlNet(Part):
    """ControlNetModel (Zhang et al. 2023): a copy of the UNet's first half that sees a control picture."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("ControlNetModel", folder))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        control: Tensor,
        control_scale: Tensor,
        encoder_hidden_states: Tensor,
        *more: Tensor,
    ) -> tuple[Tensor, ...]:
        """Latent, time (batch,), picture in [0, 1], strength (batch,), text states to the UNet's residuals."""
        states, added = _text(self.inner.config, encoder_hidden_states, list(more))
        down, middle = self.inner(sample, timestep, states, control, added_cond_kwargs=added, return_dict=False)
        scale = control_scale[:, None, None, None]
        return (*(scale * each for each in down), scale * middle)


def _text(config: Any, states: Tensor, rest: list[Tensor]) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Text states as a UNet takes them, and SDXL's pooled text and sizes, taken off the front of `rest`."""
    if config.addition_embed_type != "text_time":
        return states, None
    second, pooled, time_ids = (rest.pop(0) for _ in range(3))
    return torch.cat([states, second], dim=-1), {"text_embeds": pooled, "time_ids": time_ids}


def autoencoder_beside(folder: Path) -> Autoencoder:
    """The autoencoder beside a component."""
    config = read_json(folder.parent / "vae" / "config.json")
    return Autoencoder.of(str(config.get("_class_name")), config)


class LastHidden(Part):
    """CLIP text model: ids (batch, length) to the last hidden state."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_transformers("CLIPTextModel", folder, "eager"))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to (batch, length, width), after the final layer norm."""
        out: Tensor = self.inner(input_ids).last_hidden_state
        return out


class Penultimate(LastHidden):
    """SDXL's first text encoder: the hidden state before the last layer, without the final norm."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to (batch, length, width)."""
        out: Tensor = self.inner(input_ids, output_hidden_states=True).hidden_states[-2]
        return out


class PenultimateAndPooled(Part):
    """SDXL's second text encoder: the hidden state before the last layer, and the projected pooled one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_transformers("CLIPTextModelWithProjection", folder, "eager"))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length) to (batch, length, width) and (batch, projection)."""
        out = self.inner(input_ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds


class Pooled(LastHidden):
    """CLIP text model: the state of the last token, after the final norm (FLUX)."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to (batch, width)."""
        out: Tensor = self.inner(input_ids).pooler_output
        return out


class Decoder(Part):
    """AutoencoderKL's way from latents to pictures."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("AutoencoderKL", folder))
        self.inner.encoder = None

    def forward(self, latent_sample: Tensor) -> Tensor:
        """(batch, channels, height, width) to pictures in about [-1, 1]."""
        out: Tensor = self.inner.decode(latent_sample, return_dict=False)[0]
        return out


class MeanEncoder(Part):
    """AutoencoderKL's way from pictures to the mean of their latents."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("AutoencoderKL", folder))
        self.inner.decoder = None

    def forward(self, sample: Tensor) -> Tensor:
        """Pictures in [-1, 1] to (batch, channels, height, width)."""
        out: Tensor = self.inner.encode(sample).latent_dist.mode()
        return out


class TinyDecoder(Decoder):
    """AutoencoderTiny's decoder (TAESD)."""

    def __init__(self, folder: Path) -> None:
        Part.__init__(self, from_diffusers("AutoencoderTiny", folder))
        self.inner.encoder = None


class TinyEncoder(Part):
    """AutoencoderTiny's encoder (TAESD)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("AutoencoderTiny", folder))
        self.inner.decoder = None

    def forward(self, sample: Tensor) -> Tensor:
        """Pictures in [-1, 1] to (batch, channels, height, width)."""
        out: Tensor = self.inner.encode(sample, return_dict=False)[0]
        return out
