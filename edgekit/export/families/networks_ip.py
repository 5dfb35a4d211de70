"""Torch-side builders of image prompts: CLIP's picture tower, and a UNet with an IP-Adapter in it (Ye et al. 2023).

As in edgekit.export.families.networks, but that the UNet's builder is also called with the adapter's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.export.families.ip_adapter import CLIP_MEAN, CLIP_STD, PROJECTION, cross_attentions
from edgekit.export.families.networks import UNet
from edgekit.export.families.networks_base import Part, from_transformers, tensors


class PromptPicture(Part):
    """CLIP's picture tower on a square that is cut and sized already."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_transformers("CLIPVisionModelWithProjection", folder, "eager"))
        self.mean, self.std = (torch.tensor(row)[:, None, None] for row in (CLIP_MEAN, CLIP_STD))

    def forward(self, image: Tensor) -> Tensor:
        """A picture (batch, 3, side, side) in [0, 1] to its embedding (batch, projection)."""
        out: Tensor = self.inner((image - self.mean) / self.std).image_embeds
        return out


class Projection(nn.Module):  # type: ignore[misc]
    """The embedding of a picture as a few tokens, which the adapter's layers attend to."""

    def __init__(self, weight: Tensor, bias: Tensor, norm: Tensor, norm_bias: Tensor) -> None:
        super().__init__()
        for name, value in {"weight": weight, "bias": bias, "norm": norm, "norm_bias": norm_bias}.items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """(batch, projection) to (batch, tokens, width)."""
        tokens = functional.linear(image_embeds, self.weight, self.bias).unflatten(-1, (-1, self.norm.shape[0]))
        return functional.layer_norm(tokens, self.norm.shape, self.norm, self.norm_bias)


class Seen:
    """The picture's tokens (batch, tokens, width) and how closely they are followed (batch,), while a UNet runs."""

    tokens: Tensor
    scale: Tensor


class DecoupledAttention(nn.Module):  # type: ignore[misc]
    """A diffusers attention processor: attention to the text, and as much as asked of attention to the picture.

    Equation 5 of the paper: both have the text's query; the picture has a key and a value of its own. The calls of
    scaled_dot_product_attention become one node each when the UNet is exported.
    """

    def __init__(self, key: Tensor, value: Tensor, seen: Seen) -> None:
        super().__init__()
        self.key, self.value = (nn.Parameter(weight, requires_grad=False) for weight in (key, value))
        self._seen = seen

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,  # noqa: ARG002 - no prompt is masked in Stable Diffusion
        temb: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """(batch, length, width) and the text's states; the shape is kept."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def attend(key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = functional.scaled_dot_product_attention(query, split(key), split(value))
            return out.transpose(1, 2).flatten(2)

        query, tokens = split(attn.to_q(hidden_states)), self._seen.tokens
        text = attend(attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        picture = attend(functional.linear(tokens, self.key), functional.linear(tokens, self.value))
        out: Tensor = attn.to_out[0](text + self._seen.scale[:, None, None] * picture)
        return out


class PromptedUNet(UNet):
    """UNet2DConditionModel with a plain IP-Adapter that fits it (edgekit.export.families.ip_adapter)."""

    def __init__(self, folder: Path, adapter: Path) -> None:
        super().__init__(folder)
        weights = dict(tensors(adapter))
        self.projection = Projection(*(weights[name] for name in PROJECTION))
        self._seen = Seen()
        for number, name in enumerate(cross_attentions(folder)):
            key, value = (weights[f"ip_adapter.{2 * number + 1}.to_{each}_ip.weight"] for each in "kv")
            self.inner.get_submodule(name).set_processor(DecoupledAttention(key, value, self._seen))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor) -> Tensor:
        """As UNet's, then the embedding (batch, projection) and how closely it is followed (batch,)."""
        *rest, image_embeds, self._seen.scale = more
        self._seen.tokens = self.projection(image_embeds)
        try:
            return super().forward(sample, timestep, encoder_hidden_states, *rest)
        finally:
            del self._seen.tokens, self._seen.scale
