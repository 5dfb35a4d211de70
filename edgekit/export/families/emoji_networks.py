"""Torch-side builders of the emoji model's own two networks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import BadSource
from edgekit.export.families.weights import weight_files
from edgekit.export.sources import read_json


class Unfold(nn.Module):  # type: ignore[misc]
    """From folded pixels to a picture: (batch, 4 c, height, width) to (batch, c, 2 height, 2 width)."""

    def __init__(self, _: Path) -> None:
        super().__init__()

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Pixel shuffle by two."""
        return functional.pixel_shuffle(latent_sample, 2)


class ResidualBlock(nn.Module):  # type: ignore[misc]
    """x + conv(silu(conv(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape is kept."""
        out: Tensor = x + self.conv2(functional.silu(self.conv1(x)))
        return out


class ResidualUpscaler(nn.Module):  # type: ignore[misc]
    """Bicubic interpolation less what a small convolutional network says it gets wrong."""

    def __init__(self, in_channels: int = 3, channels: int = 48, blocks: int = 8, scale: int = 4) -> None:
        super().__init__()
        self.scale = scale
        self.head = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        self.tail1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail2 = nn.Conv2d(channels, in_channels * scale**2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 3, height, width) in [-1, 1] to (batch, 3, scale height, scale width)."""
        x = self.head(image)
        for block in self.blocks:
            x = block(x)
        residual = functional.pixel_shuffle(self.tail2(functional.silu(self.tail1(x))), self.scale)
        smooth = functional.interpolate(image, scale_factor=self.scale, mode="bicubic", align_corners=False)
        return smooth - residual


def load_upscaler(folder: Path) -> nn.Module:
    """The upscaler of a model folder, in float32 and evaluation mode.

    Raises:
        BadSource: config and weights do not fit each other.
    """
    from safetensors.torch import load_file

    config = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights |= load_file(path)
    try:
        model = ResidualUpscaler(**config)
        model.load_state_dict({name: weight.to(torch.float32) for name, weight in weights.items()})
    except (TypeError, RuntimeError) as why:
        raise BadSource(f"{folder}: {why}") from why
    return model.eval()
