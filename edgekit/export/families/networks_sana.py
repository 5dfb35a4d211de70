"""Torch-side builders of SANA-Sprint: a transformer with linear attention, and the deep-compression autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.export.families.networks_base import Part, streamed
from edgekit.export.families.networks_dit import SinCosPatches

SMALLEST = 1e-15  # of a sum of weights


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """sum_j (q . k_j) v_j / sum_j (q . k_j) of non-negative queries and keys, (batch, heads, head_dim, length) each.

    diffusers adds 1e-15 to the divisor; the exporter takes that for nothing and removes it, and 0 / 0 is left.
    """
    sums = torch.matmul(torch.matmul(functional.pad(value, (0, 0, 0, 1), value=1.0), key.transpose(2, 3)), query)
    return sums[:, :, :-1] / sums[:, :, -1:].clamp(min=SMALLEST)


class LinearAttention:
    """The processor of SANA's self-attention (Xie et al. 2024, section 2.2)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, width); the shape is kept."""
        assert encoder_hidden_states is None
        assert attention_mask is None
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.transpose(1, 2).unflatten(1, (attn.heads, -1)) for x in (query, key, value))
        mixed = linear_attention(query.relu(), key.relu(), value)
        out: Tensor = attn.to_out[0](mixed.flatten(1, 2).transpose(1, 2))
        return out


class SanaSprint(Part):
    """SanaTransformer2DModel as a TrigFlow: it was trained as a flow, and the way from one to the other is inside.

    Chen et al. 2025 (SANA-Sprint), section 3.1: at angle t the flow's time is s = sin t / (sin t + cos t).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(streamed("SanaTransformer2DModel", folder))
        if self.inner.patch_embed.pos_embed is not None:
            self.inner.patch_embed = SinCosPatches(self.inner.patch_embed)
        for block in self.inner.transformer_blocks:
            block.attn1.set_processor(LinearAttention())

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        """Latent of unit scale, angle (batch,), text states, their mask, guidance (batch,); F of the TrigFlow.

        The clean latent is cos(t) x - sin(t) F.
        """
        time = timestep.sin() / (timestep.cos() + timestep.sin())
        s = time[:, None, None, None]
        length = torch.sqrt(s**2 + (1 - s) ** 2)
        x = sample * length
        flow = self.inner(
            x,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            guidance=guidance,
            timestep=time,
            return_dict=False,
        )[0]
        out: Tensor = ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * flow) / length
        return out


class DeepDecoder(Part):
    """AutoencoderDC's way from latents to pictures (Chen et al. 2025, DC-AE)."""

    def __init__(self, folder: Path) -> None:
        from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

        super().__init__(streamed("AutoencoderDC", folder))
        self.inner.encoder = None
        for module in self.inner.modules():
            if isinstance(module, SanaMultiscaleLinearAttention):
                module.apply_linear_attention = linear_attention

    def forward(self, latent_sample: Tensor) -> Tensor:
        """(batch, channels, height, width) to pictures in about [-1, 1]."""
        out: Tensor = self.inner.decode(latent_sample, return_dict=False)[0]
        return out
