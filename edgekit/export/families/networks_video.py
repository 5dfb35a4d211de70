"""Torch-side builders of video models: networks whose sample counts frames beside height and width.

As in edgekit.export.families.networks: each is called with a component's folder; `forward` has the part's inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from edgekit.errors import BadSource
from edgekit.export.families.networks_base import Part, from_diffusers


@contextlib.contextmanager
def plain_repeats() -> Iterator[None]:
    """While this lasts, `repeat_interleave` along axis 0 is an expansion.

    The exporter's own decomposition expands one axis too few where `output_size` is given, as diffusers does.
    """
    stock = Tensor.repeat_interleave

    def repeated(x: Tensor, repeats: int, dim: int = 0, output_size: Any = None) -> Tensor:  # noqa: ARG001
        assert dim == 0, "frames are folded into the batch"
        return x.unsqueeze(1).expand(-1, repeats, *x.shape[1:]).flatten(0, 1)

    Tensor.repeat_interleave = repeated
    try:
        yield
    finally:
        Tensor.repeat_interleave = stock


class MotionUNet(Part):
    """UNetMotionModel: Stable Diffusion's UNet with attention over time (AnimateDiff, Guo et al. 2024)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_diffusers("UNetMotionModel", folder))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Latents (batch, channels, frames, height, width), time (batch,) and text states to the prediction."""
        with plain_repeats():
            states = encoder_hidden_states.repeat_interleave(sample.shape[2], dim=0)  # every frame reads the same text
            out: Tensor = self.inner(sample, timestep, states, return_dict=False)[0]
        return out


class AdaptedUNet(MotionUNet):
    """A UNet2DConditionModel and the MotionAdapter in the folder beside it, joined as the pipeline joins them.

    Raises:
        BadSource: the adapter is one of another UNet.
    """

    def __init__(self, folder: Path) -> None:
        from diffusers import UNetMotionModel

        unet = from_diffusers("UNet2DConditionModel", folder)
        adapter = from_diffusers("MotionAdapter", folder.parent / "motion_adapter")
        try:
            joined = UNetMotionModel.from_unet2d(unet, adapter)
        except (ValueError, RuntimeError) as why:
            raise BadSource(f"{folder} and {folder.parent / 'motion_adapter'} do not fit each other: {why}") from why
        Part.__init__(self, joined.eval())
