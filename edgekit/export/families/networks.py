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
from edgekit.export.families.parts import Autoencoder
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
    """UNet2DConditionModel, and whatever it is conditioned on: its config says which inputs there are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_streamed_unet(folder))
        config = self.inner.config
        self.joins = config.in_channels != config.out_channels  # inpainting: mask and masked latents join the sample
        self.vae = _neighbour(folder) if self.joins else None

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor) -> Tensor:
        """Latent, time (batch,), text states to the prediction, shaped as the latent; inputs in edgekit's order.

        SDXL's two text states (Podell et al. 2023) are joined along their width. A masked picture's latents are brought
        to the sample's scale here, for a recipe's conditions are what an encoder gives.
        """
        rest = list(more)
        states, added = _text(self.inner.config, encoder_hidden_states, rest)
        embedding = rest.pop(0) if self.inner.config.time_cond_proj_dim else None
        if self.vae is not None:
            mask, masked = rest.pop(0), rest.pop(0)
            sample = torch.cat([sample, mask, (masked - self.vae.shift) * self.vae.scale], dim=1)
        out: Tensor = self.inner(
            sample,
            timestep,
            states,
            timestep_cond=embedding,
            added_cond_kwargs=added,
            down_block_additional_residuals=tuple(rest[:-1]) if rest else None,
            mid_block_additional_residual=rest[-1] if rest else None,
            return_dict=False,
        )[0]
        return out


class ControlNet(Part):
    """ControlNetModel (Zhang et al. 2023): a copy of the UNet's first half that sees a control picture."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_from_diffusers("ControlNetModel", folder))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        control: Tensor,
        control_scale: Tensor,
        encoder_hidden_states: Tensor,
        *more: Tensor,
    ) -> tuple[Tensor, ...]:
        """Latent, time (batch,), picture in [0, 1], strength (batch,), text states to the UNet's residuals."""
        states, added = _text(self.inner.config, encoder_hidden_states, list(more))
        down, middle = self.inner(sample, timestep, states, control, added_cond_kwargs=added, return_dict=False)
        scale = control_scale[:, None, None, None]
        return (*(scale * each for each in down), scale * middle)


def _text(config: Any, states: Tensor, rest: list[Tensor]) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Text states as a UNet takes them, and SDXL's pooled text and sizes, taken off the front of `rest`."""
    if config.addition_embed_type != "text_time":
        return states, None
    second, pooled, time_ids = (rest.pop(0) for _ in range(3))
    return torch.cat([states, second], dim=-1), {"text_embeds": pooled, "time_ids": time_ids}


def _neighbour(folder: Path) -> Autoencoder:
    """The autoencoder beside a component."""
    config = read_json(folder.parent / "vae" / "config.json")
    return Autoencoder.of(str(config.get("_class_name")), config)


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


class Pooled(LastHidden):
    """CLIP text model: the state of the last token, after the final norm (FLUX)."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to (batch, width)."""
        out: Tensor = self.inner(input_ids).pooler_output
        return out


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
