"""Torch-side builder of Z-Image's transformer, for a batch of latents of one size and prompts of any length.

diffusers runs it on lists of pictures and prompts, each padded to a multiple of 32 tokens, with rotary positions in
complex numbers. Here a batch is one tensor, what a list would not hold is masked, and positions are real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.export.families.networks_base import Part, streamed

BLOCK = 32  # diffusers' SEQ_MULTI_OF: prompts and pictures are padded to multiples of it
PATCH = 2
ONLY = f"{PATCH}-1"  # the key of the embedder of 2 x 2 patches of one frame


class RealRotary:
    """Z-Image's attention with its rotations as sines and cosines, and a mask of the keys that are there."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, width), mask (batch, length), cosine and sine (batch or 1, length, 1, head_dim / 2, 2)."""
        assert encoder_hidden_states is None
        assert attention_mask is not None
        assert freqs_cis is not None
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.transpose(1, 2) for x in (_rotated(query, freqs_cis), _rotated(key, freqs_cis), value))
        out = functional.scaled_dot_product_attention(query, key, value, attention_mask[:, None, None])
        mixed: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return mixed


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Pairs of numbers turned as complex numbers are: (a + ib)(cos + i sin)."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.unbind(-1)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)


class Rotations(nn.Module):  # type: ignore[misc]
    """Cosine and sine of every place along the three axes (prompt and picture, row, column), looked up."""

    def __init__(self, theta: float, dims: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        super().__init__()
        for axis, (dim, length) in enumerate(zip(dims, lengths, strict=True)):
            frequency = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).to(torch.float32)
            self.register_buffer(f"axis{axis}", torch.stack([angle.cos(), angle.sin()], dim=-1), persistent=False)

    def forward(self, *places: Tensor) -> Tensor:
        """Places int64 (batch, length) on each axis to (batch, length, 1, head_dim / 2, 2)."""
        turns = [getattr(self, f"axis{axis}")[place] for axis, place in enumerate(places)]
        return torch.cat(turns, dim=2).unsqueeze(2)


class ZImage(Part):
    """ZImageTransformer2DModel (Z-Image-Turbo), pictures by 2 x 2 patches; time and sign are the pipeline's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(streamed("ZImageTransformer2DModel", folder))
        config = self.inner.config
        self.rotations = Rotations(config.rope_theta, tuple(config.axes_dims), tuple(config.axes_lens))
        for block in (*self.inner.noise_refiner, *self.inner.context_refiner, *self.inner.layers):
            block.attention.set_processor(RealRotary())

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        """Latent, time (batch,) in thousandths, text states and their mask (batch, length); like the latent."""
        model = self.inner
        time = model.t_embedder((1000 - timestep) / 1000 * model.t_scale)
        text, text_there, text_turns, ends = self._prompt(encoder_hidden_states, encoder_attention_mask)
        for block in model.context_refiner:
            text = block(text, text_there, text_turns)
        picture, there, turns, (height, width) = self._picture(sample, ends)
        for block in model.noise_refiner:
            picture = block(picture, there, turns, time)
        both = torch.cat([picture, text], dim=1)
        there, turns = torch.cat([there, text_there], dim=1), torch.cat([turns, text_turns], dim=1)
        for block in model.layers:
            both = block(both, there, turns, time)
        patches = model.all_final_layer[ONLY](both[:, : height * width], c=time)
        grid = patches.unflatten(-1, (PATCH, PATCH, -1)).unflatten(1, (height, width))
        return -grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _prompt(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, which of them are there, their rotations, and the length (batch, 1) of what is there."""
        own = mask != 0
        place = torch.arange(mask.shape[1])[None]
        ends = (mask.sum(dim=1, keepdim=True) + BLOCK - 1) // BLOCK * BLOCK
        tokens = torch.where(own[..., None], self.inner.cap_embedder(states), self.inner.cap_pad_token)
        nowhere = torch.zeros_like(place)
        turns = self.rotations(place + 1, nowhere, nowhere).expand(mask.shape[0], -1, -1, -1, -1)
        return tokens, place < ends, turns, ends

    def _picture(self, sample: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """As `_prompt`, and the picture's height and width in patches. Up to 31 padding tokens stand at place 0."""
        batch, channels = sample.shape[:2]
        numbers = channels * PATCH**2  # of a patch, row by row, channels innermost
        kernel = torch.eye(numbers).reshape(numbers, PATCH, PATCH, channels).permute(0, 3, 1, 2)
        patches = functional.conv2d(sample, kernel, stride=PATCH)
        height, width = patches.shape[2:]
        tokens = self.inner.all_x_embedder[ONLY](patches.flatten(2).transpose(1, 2))
        padding = self.inner.x_pad_token.expand(batch, BLOCK - 1, -1)
        row = torch.arange(height)[:, None].expand(height, width).flatten()
        column = torch.arange(width).expand(height, width).flatten()
        row, column = (functional.pad(place, (0, BLOCK - 1))[None].expand(batch, -1) for place in (row, column))
        depth = functional.pad((ends + 1).expand(batch, height * width), (0, BLOCK - 1))
        count = height * width
        there = torch.arange(count + BLOCK - 1)[None].expand(batch, -1) < (count + BLOCK - 1) // BLOCK * BLOCK
        return torch.cat([tokens, padding], dim=1), there, self.rotations(depth, row, column), (height, width)
