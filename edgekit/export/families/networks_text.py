"""Torch-side builders of text encoders besides CLIP: T5, Gemma 2 and Qwen 3, each on ids of a fixed length.

As in edgekit.export.families.networks, each is called with the component's folder and gives a module in float32 and
evaluation mode whose `forward` takes the part's inputs in order. Only safetensors on this disk are read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from edgekit.export.families.networks_base import Part, from_transformers
from edgekit.export.sources import read_json


class T5(Part):
    """T5's encoder, blind to which ids are padding, as SD3 and FLUX were trained with it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_transformers("T5EncoderModel", folder))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to (batch, length, width)."""
        out: Tensor = self.inner(input_ids).last_hidden_state
        return out


class MaskedT5(T5):
    """T5's encoder on a prompt's own ids: PixArt's."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """(batch, length) ids and mask to (batch, length, width)."""
        out: Tensor = self.inner(input_ids, attention_mask=attention_mask).last_hidden_state
        return out


class Gemma2(Part):
    """Gemma 2 as SANA sees it: the first state and the last `KEPT - 1`, behind which the instruction is cut away.

    Its attention caps scores by a tanh, which no fused operator of ONNX Runtime does: it stays in primitives.
    """

    KEPT = 300  # SanaSprintPipeline's max_sequence_length

    def __init__(self, folder: Path) -> None:
        capped = read_json(folder / "config.json").get("attn_logit_softcapping") is not None
        super().__init__(from_transformers("Gemma2Model", folder, "eager" if capped else "sdpa"))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length) ids and mask to states (batch, KEPT, width) and their mask, float32 (batch, KEPT)."""
        states = self.inner(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        mask = attention_mask.to(torch.float32)
        return _ends(states, self.KEPT), _ends(mask, self.KEPT)


def _ends(x: Tensor, kept: int) -> Tensor:
    return torch.cat([x[:, :1], x[:, 1 - kept :]], dim=1)


class Qwen3(Part):
    """Qwen 3 as Z-Image sees it: the hidden state before the last layer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_transformers("Qwen3Model", folder))
        self.inner.layers = self.inner.layers[:-1]  # what the last layer makes of it is not asked for
        self.inner.norm = torch.nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) ids and mask to (batch, length, width)."""
        first = torch.ones_like(attention_mask[:, :1])  # always the prompt's: no query is left without a key
        seen = torch.cat([first, attention_mask[:, 1:]], dim=1)
        out: Tensor = self.inner(input_ids, attention_mask=seen, use_cache=False).last_hidden_state
        return out
