"""Torch-side builders of Stable Video Diffusion (Blattmann et al. 2023): a picture, seen twice, and the video after it.

As in edgekit.export.families.networks: each is called with a component's folder; `forward` has the part's inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit.export.families.networks_base import Part, from_diffusers, from_transformers
from edgekit.export.families.networks_video import plain_repeats
from edgekit.export.families.svd import CLIP_SIDE
from edgekit.export.sources import read_json

LEAST_SIGMA = 0.001  # of the blur, in pixels: none to speak of, where nothing is made smaller
CUBIC = -0.75  # of the interpolation kernel (Keys 1981), torch's choice
STRENGTH = 2  # place of the noise's strength among the time ids


class ImageEncoder(Part):
    """CLIP's picture tower on the given picture, resized and normalised as the pipeline does it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_transformers("CLIPVisionModelWithProjection", folder, "eager"))
        config = read_json(folder.parent / "feature_extractor" / "preprocessor_config.json")
        self.mean, self.std = (torch.tensor(config[key])[:, None, None] for key in ("image_mean", "image_std"))

    def forward(self, image: Tensor) -> Tensor:
        """A picture (batch, 3, height, width) in [-1, 1], of any size, to its embedding (batch, projection)."""
        seen = resized(image, CLIP_SIDE) / 2 + 0.5
        out: Tensor = self.inner((seen - self.mean) / self.std).image_embeds
        return out


def resized(sample: Tensor, side: int) -> Tensor:
    """(batch, channels, height, width) to (..., side, side): a blur, then cubic interpolation between the corners.

    The pipeline's `_resize_with_antialiasing`. Both steps are linear and go along one axis at a time, so that each axis
    is one matrix, made from its size; a convolution would need a kernel as long as the size says.
    """
    rows, columns = (_interpolation(size, side) @ _blur(size, side) for size in sample.shape[2:])
    return rows @ sample @ columns.T


def _blur(size: int, side: int) -> Tensor:
    """(size, size): a Gaussian cut off at two sigma and at least a pixel, at the edges of a mirrored picture.

    sigma is half of what the picture is larger than `side` by, as a factor; the reach is that of an odd kernel at least
    four sigma wide (scikit-image's rule, with a narrower kernel).
    """
    at = torch.arange(size, dtype=torch.float32)
    last = at[-1]
    sigma = (((last + 1) / side - 1) / 2).clamp(min=LEAST_SIGMA)
    reach = ((4 * sigma).clamp(min=3).floor() / 2).floor()

    def weight(distance: Tensor) -> Tensor:
        return torch.exp(-distance.square() / (2 * sigma.square())) * (distance.abs() <= reach)

    here, there = at[:, None], at[None, :]
    mirrored = weight(here + there) * (there > 0) + weight(2 * last - here - there) * (there < last)
    total = 2 * weight(at).sum() - weight(torch.zeros(1))
    return (weight(here - there) + mirrored) / total


def _interpolation(size: int, side: int) -> Tensor:
    """(side, size): cubic convolution between the corners, over neighbours that stay inside."""
    at = torch.arange(size, dtype=torch.float32)
    last = at[-1]
    place = torch.arange(side, dtype=torch.float32) * (last / (side - 1))
    first, matrix = place.floor(), torch.zeros(side, 1)
    for tap in range(-1, 3):
        distance = (place - first - tap).abs()
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance * distance + 1
        far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
        weight = torch.where(distance <= 1, near, far)
        inside = (first + tap).clamp(min=0).minimum(last)
        matrix = matrix + (inside[:, None] == at[None, :]) * weight[:, None]
    return matrix


class NoisedEncoder(Part):
    """The autoencoder's mean of a picture with a little noise on it, unscaled: what every frame is joined with."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("AutoencoderKLTemporalDecoder", folder))
        self.inner.decoder = None

    def forward(self, sample: Tensor, noise: Tensor, added_time_ids: Tensor) -> Tensor:
        """A picture in [-1, 1], unit noise like it, (frames a second - 1, motion bucket, strength) to its latents."""
        noised = sample + added_time_ids[:, STRENGTH, None, None, None] * noise
        out: Tensor = self.inner.encode(noised).latent_dist.mode()
        return out


class FramesUNet(Part):
    """UNetSpatioTemporalConditionModel: frames joined with the picture's latents, told the picture's embedding."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("UNetSpatioTemporalConditionModel", folder))

    def forward(
        self, sample: Tensor, timestep: Tensor, image_embeds: Tensor, image_latents: Tensor, added_time_ids: Tensor
    ) -> Tensor:
        """Latents (batch, frames, channels, height, width), time (batch,), what is known of the picture, and the ids.

        The prediction is shaped as the latents. Every frame sees the picture's latents (batch, channels, height, width)
        as the encoder gives them, beside its own; the embedding (batch, width) is one token to attend to.
        """
        still = image_latents[:, None].expand(-1, sample.shape[1], -1, -1, -1)
        with plain_repeats():
            out: Tensor = self.inner(
                torch.cat([sample, still], dim=2), timestep, image_embeds[:, None], added_time_ids, return_dict=False
            )[0]
        return out


class FramesDecoder(Part):
    """The autoencoder's decoder, which smooths over the frames of one video."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("AutoencoderKLTemporalDecoder", folder))
        self.inner.encoder = None

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Latents (batch, frames, channels, height, width) to as many frames of 3 channels in about [-1, 1]."""
        frames = latent_sample.shape[1]
        pictures: Any = self.inner.decode(latent_sample.flatten(0, 1), num_frames=frames, return_dict=False)[0]
        out: Tensor = pictures.unflatten(0, (-1, frames))
        return out
