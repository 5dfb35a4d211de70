"""Torch-side builders of the parts of Stable Diffusion pipelines: load one component, give it a graph's signature.

Each is called with the component's folder and returns a module in evaluation mode, in float32, whose `forward` takes
the part's inputs in order and returns its outputs in order. Only safetensors on this disk are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.errors import BadSource
from edgekit.export.families.weights import variant_of, weight_files
from edgekit.export.headers import read_header
from edgekit.export.sources import read_json

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def _from_diffusers(name: str, folder: Path) -> Any:
    import diffusers

    model = getattr(diffusers, name).from_pretrained(
        folder, torch_dtype=torch.float32, variant=variant_of(folder), use_safetensors=True, local_files_only=True
    )
    return model.eval()


def _streamed_unet(folder: Path) -> Any:
    """A UNet with its weights read one by one: from_pretrained holds the stored and the widened copy at once.

    Raises:
        BadSource: the files hold other weights than the config asks for.
    """
    import accelerate
    from diffusers import UNet2DConditionModel

    with accelerate.init_empty_weights():
        model = UNet2DConditionModel.from_config(read_json(folder / "config.json"))
    awaited = {name: parameter.shape for name, parameter in model.named_parameters()}
    for path in weight_files(folder):
        for name, tensor in _tensors(path):
            if awaited.pop(name, None) != tensor.shape:
                raise BadSource(f"{path}: {name} {tuple(tensor.shape)} is no weight of the unet its config describes")
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    if awaited:
        raise BadSource(f"{folder}: {len(awaited)} weights are missing, among them {next(iter(awaited))}")
    return model.eval()


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a safetensors file in float32, each read when asked for and then let go."""
    for name, entry in read_header(path).entries.items():
        if entry.dtype not in STORED:
            raise BadSource(f"{path}: {name} is stored as {entry.dtype}; weights must be {', '.join(STORED)}")
        raw = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset)
        yield name, torch.from_numpy(raw).view(STORED[entry.dtype]).reshape(entry.shape).to(torch.float32)


def _clip(name: str, folder: Path) -> Any:
    import transformers

    # eager: plain softmax, without the IsNaN guard that fused attention decomposes to
    model = getattr(transformers, name).from_pretrained(
        folder,
        dtype=torch.float32,
        variant=variant_of(folder),
        use_safetensors=True,
        local_files_only=True,
        attn_implementation="eager",
    )
    return model.eval()


class Part(nn.Module):  # type: ignore[misc]
    """A component behind a graph's signature; `inner` is what LoRA files and attention processors address."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner


class UNet(Part):
    """UNet2DConditionModel with one text encoder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_streamed_unet(folder))

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        """Latent, time (batch,), text states and w-embedding to the prediction, shaped as the latent."""
        out: Tensor = self.inner(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]
        return out


class UNetXL(UNet):
    """UNet2DConditionModel with SDXL's two text encoders, pooled text and size conditioning (Podell et al. 2023)."""

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_2: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """As UNet; the two text states are joined along their width."""
        out: Tensor = self.inner(
            sample,
            timestep,
            torch.cat([encoder_hidden_states, encoder_hidden_states_2], dim=-1),
            timestep_cond=timestep_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]
        return out


class LastHidden(Part):
    """CLIP text model: ids (batch, length) to the last hidden state."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_clip("CLIPTextModel", folder))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to (batch, length, width), after the final layer norm."""
        out: Tensor = self.inner(input_ids).last_hidden_state
        return out


class Penultimate(LastHidden):
    """SDXL's first text encoder: the hidden state before the last layer, without the final norm."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to (batch, length, width)."""
        out: Tensor = self.inner(input_ids, output_hidden_states=True).hidden_states[-2]
        return out


class PenultimateAndPooled(Part):
    """SDXL's second text encoder: the hidden state before the last layer, and the projected pooled one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_clip("CLIPTextModelWithProjection", folder))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length) to (batch, length, width) and (batch, projection)."""
        out = self.inner(input_ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds


class Decoder(Part):
    """AutoencoderKL's way from latents to pictures."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_from_diffusers("AutoencoderKL", folder))
        self.inner.encoder = None

    def forward(self, latent_sample: Tensor) -> Tensor:
        """(batch, channels, height, width) to pictures in about [-1, 1]."""
        out: Tensor = self.inner.decode(latent_sample, return_dict=False)[0]
        return out


class MeanEncoder(Part):
    """AutoencoderKL's way from pictures to the mean of their latents."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_from_diffusers("AutoencoderKL", folder))
        self.inner.decoder = None

    def forward(self, sample: Tensor) -> Tensor:
        """Pictures in [-1, 1] to (batch, channels, height, width)."""
        out: Tensor = self.inner.encode(sample).latent_dist.mode()
        return out


class TinyDecoder(Decoder):
    """AutoencoderTiny's decoder (TAESD)."""

    def __init__(self, folder: Path) -> None:
        Part.__init__(self, _from_diffusers("AutoencoderTiny", folder))
        self.inner.encoder = None


class TinyEncoder(Part):
    """AutoencoderTiny's encoder (TAESD)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_from_diffusers("AutoencoderTiny", folder))
        self.inner.decoder = None

    def forward(self, sample: Tensor) -> Tensor:
        """Pictures in [-1, 1] to (batch, channels, height, width)."""
        out: Tensor = self.inner.encode(sample, return_dict=False)[0]
        return out
