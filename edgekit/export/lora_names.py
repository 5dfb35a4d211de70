"""The names that LoRA files for SDXL give a UNet's modules: those of the model's first publication, by block number.

`down_blocks.1.attentions.0` of diffusers is `input_blocks.4.1` there: one block per layer and per resampling, counted
through, with the convolutional and the attention part numbered inside (Podell et al. 2023, the code published with it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

INSIDE = {  # of a residual block
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}


def first_published(modules: Iterable[str]) -> dict[str, str]:
    """The first publication's names of a UNet's modules, for those that have one: name there -> name here."""
    known = tuple(modules)
    depth = len({found[1] for name in known if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))})
    return {there: name for name in known if (there := _name(name, depth + 1, known)) is not None}


def _name(module: str, stride: int, known: tuple[str, ...]) -> str | None:
    """`stride` is the number of blocks per level: its layers and the resampling."""
    if module in OUTSIDE:
        return OUTSIDE[module]
    middle = re.match(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)", module)
    if middle:
        return f"middle_block.{MIDDLE[middle[1]]}.{_inner(middle[2])}" if middle[1] in MIDDLE else None
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", module)
    if not found:
        return None
    way, level, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * stride}.0.op" if rest == "conv" else None
    if kind == "upsamplers":
        attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in known)
        return f"output_blocks.{level * stride + stride - 1}.{1 + attends}.{rest}"
    number = level * stride + layer + (way == "down")
    return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{_inner(rest)}"


def _inner(rest: str) -> str:
    return INSIDE.get(rest, rest)
