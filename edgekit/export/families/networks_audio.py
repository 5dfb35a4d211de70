"""Torch-side builders of text-to-sound models: CLAP's text, a UNet told the text as one vector, a vocoder.

As in edgekit.export.families.networks: each is called with a component's folder; `forward` has the part's inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from edgekit.errors import BadSource
from edgekit.export.families.networks_base import Part, from_transformers, streamed, tensors
from edgekit.export.families.weights import weight_files
from edgekit.export.sources import read_json

# A weight under weight norm is two tensors, by today's spelling and torch's older one: its length and its direction.
LENGTH, DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"
OLDER = {"weight_g": LENGTH, "weight_v": DIRECTION}
UNUSED = {"mean", "scale"}  # of spectrograms that are normalised; files of vocoders that do not may lack them


class Clap(Part):
    """CLAP's text encoder (Wu et al. 2023): the projected embedding, brought to length 1 as AudioLDM does it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(from_transformers("ClapTextModelWithProjection", folder, "eager"))  # it has no other

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) ids and mask to (batch, projection)."""
        embedding = self.inner(input_ids, attention_mask=attention_mask).text_embeds
        return functional.normalize(embedding, dim=-1)


class LabelledUNet(Part):
    """UNet2DConditionModel on a vector of the text beside its time; its attention sees nothing but the sample."""

    def __init__(self, folder: Path) -> None:
        super().__init__(streamed("UNet2DConditionModel", folder))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Latent (batch, channels, length, width), time (batch,), vector (batch, projection) to the prediction."""
        out: Tensor = self.inner(sample, timestep, None, class_labels=class_labels, return_dict=False)[0]
        return out


class Vocoder(Part):
    """SpeechT5HifiGan (HiFi-GAN, Kong et al. 2020), its weight norm folded into the weights where it was saved with it.

    Raises:
        BadSource: the files hold other weights than the config asks for.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(_hifigan(folder))

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel spectrograms (batch, 1, frames, bins) to sound (batch, samples) in [-1, 1]."""
        out: Tensor = self.inner(mel.squeeze(1))
        return out


def _hifigan(folder: Path) -> Any:
    """The vocoder with plain weights. transformers would leave weights that are stored as two at random values."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**read_json(folder / "config.json")))
    stored = {_spelled(name): tensor for path in weight_files(folder) for name, tensor in tensors(path)}
    normed = any(name.endswith(LENGTH) for name in stored)
    if normed:
        model.apply_weight_norm()
    try:
        missing, unknown = model.load_state_dict(stored, strict=False)
    except RuntimeError as why:  # a shape
        raise BadSource(f"{folder}: {' '.join(str(why).split())}") from why
    if wrong := sorted({*missing, *unknown} - UNUSED):
        raise BadSource(f"{folder}: {len(wrong)} weights are missing or of another vocoder, among them {wrong[0]}")
    if normed:
        _fold(model)
    return model.eval()


def _spelled(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{OLDER[leaf]}" if leaf in OLDER else name


def _fold(model: nn.Module) -> None:
    """Weight norm away (Salimans & Kingma 2016): every weight becomes the product it stands for."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
