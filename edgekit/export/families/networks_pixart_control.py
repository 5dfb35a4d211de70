"""Torch-side builders of PixArt-delta's ControlNet-Transformer (Chen et al. 2024, arXiv 2401.05252, section 4).

Copies of the transformer's first N blocks read the control picture's latent. What copy i gives goes through a linear
layer that training started at zero and is added to what main block i + 1 takes; the first copy starts from the hidden
state behind main block 0 plus the latent's patches, through a linear layer of the same kind.

Transformer and copies are one graph. A graph of the copies alone would hold main block 0 and the embeddings of time,
size and text a second time and compute them again, and N hidden states, 19 MB each at 1024 x 1024 pixels (4096 patches,
1152 wide), would travel from graph to graph in every row.

diffusers has no class for it. The order of things and the names of weights are those of its research project, which
public folders follow: examples/research_projects/pixart/controlnet_pixart_alpha.py (Apache-2.0).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgekit.export.families.networks import autoencoder_beside
from edgekit.export.families.networks_base import read_into
from edgekit.export.families.networks_dit import PixArt
from edgekit.export.sources import read_json


class ControlPicture(nn.Module):  # type: ignore[misc]
    """From a control picture to what the autoencoder takes; no weights."""

    def __init__(self, _: Path) -> None:
        super().__init__()

    def forward(self, control: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] to the same in [-1, 1]."""
        return 2 * control - 1


class ControlBlock(nn.Module):  # type: ignore[misc]
    """A copy of a transformer block without its weights, the linear layer behind it, and the first one's before it."""

    def __init__(self, block: nn.Module, width: int, first: bool) -> None:
        super().__init__()
        if first:
            self.before_proj = nn.Linear(width, width, device="meta")
        self.transformer_block: Any = copy.deepcopy(block).to("meta")
        self.after_proj = nn.Linear(width, width, device="meta")


class ControlBlocks(nn.Module):  # type: ignore[misc]
    """The folder `controlnet`: PixArtControlNetAdapterModel, its weights read one by one.

    Raises:
        BadSource: the files hold other weights than `num_layers` copies of the transformer's blocks.
    """

    def __init__(self, folder: Path, transformer: Any) -> None:
        super().__init__()
        count, width = int(read_json(folder / "config.json")["num_layers"]), transformer.inner_dim
        blocks = transformer.transformer_blocks[:count]
        self.controlnet_blocks = nn.ModuleList(ControlBlock(each, width, i == 0) for i, each in enumerate(blocks))
        read_into(self, folder, "ControlNet")


class ControlledPixArt(PixArt):
    """PixArtTransformer2DModel and the ControlNet in the folder beside it.

    Raises:
        BadSource: the files of either hold other weights than the configs ask for.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.controlnet = ControlBlocks(folder.parent / "controlnet", self.inner).eval()
        self.vae = autoencoder_beside(folder)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        *more: Tensor,
    ) -> Tensor:
        """As PixArt, then the control picture's latent as the encoder gives it, and how closely to follow it (batch,).

        The latent, shaped as the sample, is brought to the sample's scale here: a recipe's conditions are what an
        encoder gives. At 0 the prediction is PixArt's own.
        """
        *size, control_latent, control_scale = more
        patches = self.inner.pos_embed((control_latent - self.vae.shift) * self.vae.scale)
        with self._followed(patches, control_scale[:, None, None]):
            return super().forward(sample, timestep, encoder_hidden_states, encoder_attention_mask, *size)

    @contextlib.contextmanager
    def _followed(self, state: Tensor, scale: Tensor) -> Iterator[None]:
        """While this lasts, main blocks 1 to N take what the copies add; text and time are those of the main block."""

        def adds(copied: Any, first: bool) -> Callable[..., Any]:
            def add(
                _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                nonlocal state
                hidden, *rest = given
                state = copied.transformer_block(hidden + copied.before_proj(state) if first else state, *rest, **named)
                return (hidden + scale * copied.after_proj(state), *rest), named

            return add

        main = self.inner.transformer_blocks[1:]
        pairs = enumerate(zip(self.controlnet.controlnet_blocks, main, strict=False))
        hooks = [
            block.register_forward_pre_hook(adds(copied, first=i == 0), with_kwargs=True)
            for i, (copied, block) in pairs
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
