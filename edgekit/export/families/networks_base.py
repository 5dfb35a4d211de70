"""What all torch-side builders share: the module behind a graph's signature, and the ways to load a component into it.

Everything is float32 and in evaluation mode. Only safetensors on this disk are read.
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


class Part(nn.Module):  # type: ignore[misc]
    """A component behind a graph's signature; `inner` is what LoRA files and attention processors address."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner


def from_diffusers(name: str, folder: Path) -> Any:
    """A diffusers model by class name."""
    import diffusers

    model = getattr(diffusers, name).from_pretrained(
        folder, torch_dtype=torch.float32, variant=variant_of(folder), use_safetensors=True, local_files_only=True
    )
    return model.eval()


def from_transformers(name: str, folder: Path, attention: str = "sdpa") -> Any:
    """A transformers model by class name.

    `sdpa` attention leaves one operator each, which the exporter catches; `eager` a plain softmax, without the IsNaN
    guard that fused attention of what is not caught decomposes to.
    """
    import transformers

    model = getattr(transformers, name).from_pretrained(
        folder,
        dtype=torch.float32,
        variant=variant_of(folder),
        use_safetensors=True,
        local_files_only=True,
        attn_implementation=attention,
    )
    return model.eval()


def streamed(name: str, folder: Path) -> Any:
    """A diffusers model by class name, its weights read one by one.

    from_pretrained holds the stored and the widened copy at once.

    Raises:
        BadSource: the files hold other weights than the config asks for.
    """
    import accelerate
    import diffusers

    with accelerate.init_empty_weights(include_buffers=False):
        model = getattr(diffusers, name).from_config(read_json(folder / "config.json"))
    read_into(model, folder, folder.name)
    return model.eval()


def read_into(model: nn.Module, folder: Path, name: str) -> None:
    """Give a model without weights those of a component's files, one by one and in float32.

    Raises:
        BadSource: the files hold other weights than the model, `name`, has.
    """
    awaited = {key: value.shape for key, value in model.state_dict().items()}
    buffers = {key for key, _ in model.named_buffers()}
    for path in weight_files(folder):
        for key, tensor in tensors(path):
            if awaited.pop(key, None) != tensor.shape:
                raise BadSource(f"{path}: {key} {tuple(tensor.shape)} is no weight of the {name} its config describes")
            module, _, leaf = key.rpartition(".")
            kept = tensor if key in buffers else nn.Parameter(tensor, requires_grad=False)
            setattr(model.get_submodule(module), leaf, kept)
    if missing := awaited.keys() - buffers:
        raise BadSource(f"{folder}: {len(missing)} weights are missing, among them {min(missing)}")


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a safetensors file in float32, each read when asked for and then let go."""
    for name, entry in read_header(path).entries.items():
        if entry.dtype not in STORED:
            raise BadSource(f"{path}: {name} is stored as {entry.dtype}; weights must be {', '.join(STORED)}")
        raw = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset)
        yield name, torch.from_numpy(raw).view(STORED[entry.dtype]).reshape(entry.shape).to(torch.float32)
