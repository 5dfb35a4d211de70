"""Torch-side builders of models whose pictures are tokens, as rows (batch, tokens) in reading order.

As in edgekit.export.families.networks: each is called with a component's folder; `forward` has the part's inputs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from edgekit.export.families.networks_base import Part, from_diffusers

CROP, AESTHETIC = (0.0, 0.0), 6.0  # AmusedPipeline's default micro-conditions: no crop, and a score people like


class UViT(Part):
    """UVit2DModel of aMUSEd (Patil et al. 2024): tokens of a square picture, some of them masked, to logits."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("UVit2DModel", folder))
        self.side = int(self.inner.config.sample_size)

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, size: Tensor) -> Tensor:
        """Ids (batch, tokens), text states, pooled text and (height, width) to (batch, tokens, codebook).

        The network is told width, height, crop and aesthetic score, in this order.
        """
        told = torch.cat([size.flip(1), size.new_tensor([*CROP, AESTHETIC]).expand(size.shape[0], -1)], dim=1)
        logits = self.inner(
            input_ids.unflatten(1, (self.side, self.side)),
            encoder_hidden_states=encoder_hidden_states,
            pooled_text_emb=text_embeds,
            micro_conds=told,
        )
        out: Tensor = logits.flatten(2).transpose(1, 2)
        return out


class TokenDecoder(Part):
    """VQModel's way from ids of codebook vectors to pictures."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("VQModel", folder))
        self.inner.encoder = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens) of a square picture to (batch, 3, height, width) in [-1, 1]."""
        batch, tokens = input_ids.shape
        side = round(tokens**0.5)
        shape = (batch, side, side, self.inner.config.latent_channels)
        picture = self.inner.decode(input_ids.flatten(), force_not_quantize=True, shape=shape, return_dict=False)[0]
        out: Tensor = picture.clamp(0, 1) * 2 - 1  # this model's pictures lie between 0 and 1
        return out
