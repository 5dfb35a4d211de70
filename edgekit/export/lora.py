"""Low-rank adapters folded into the weights before export: W + scale * alpha / r * B A (Hu et al. 2021, section 4.1).

Two spellings of the same thing: kohya's (`lora_unet_<name with underscores>.lora_down.weight`, with an `.alpha`) and
diffusers' or peft's (`unet.<name>.lora_A.weight`, `.lora.down.weight`). Without an alpha the scale is 1, as in both.
Modules of a UNet go by diffusers' names or by those of the model's first publication.
A key that belongs to no weight is an error: half a style is not what was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.headers import read_header
from edgekit.export.lora_names import first_published

if TYPE_CHECKING:
    from torch import Tensor, nn

COMPONENTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
DOWN, UP, ALPHA = "down", "up", "alpha"
ROLES = {
    "lora_down.weight": DOWN,
    "lora_A.weight": DOWN,
    "lora_A.default.weight": DOWN,
    "lora.down.weight": DOWN,
    "lora_linear_layer.down.weight": DOWN,
    "lora_up.weight": UP,
    "lora_B.weight": UP,
    "lora_B.default.weight": UP,
    "lora.up.weight": UP,
    "lora_linear_layer.up.weight": UP,
    "alpha": ALPHA,
}
OTHER_KINDS = (
    "dora_scale",
    "lora_magnitude_vector",
    "hada_",
    "lokr_",
    "lora_mid",
    "oft_",
    "boft_",
    "bias",
    "lora_bias",
)
SHOWN = 5  # keys an error names


@dataclass(frozen=True)
class Adapter:
    """The keys of one adapted weight in a LoRA file; `module` is dotted, or flat with underscores (kohya)."""

    component: str
    module: str
    down: str
    up: str
    alpha: str | None = None


def adapters(path: Path) -> tuple[Adapter, ...]:
    """The adapters of a LoRA file, from its header alone.

    Raises:
        BadSource: not safetensors, a key of no known spelling, or a pair with one half missing.
        UnsupportedModel: another kind of adapter (DoRA, LoHa, LoKr...), by name.
    """
    groups: dict[tuple[str, str], dict[str, str]] = {}
    unknown = []
    for key in read_header(path).entries:
        parsed = _parse(key)
        if parsed is None:
            other = [kind for kind in OTHER_KINDS if kind in key]
            if other:
                raise UnsupportedModel(f"{path}: {key} is not plain LoRA ({other[0].strip('_')}); only LoRA is folded")
            unknown.append(key)
            continue
        component, module, role = parsed
        groups.setdefault((component, module), {})[role] = key
    halves = [f"{'.'.join(name)} ({', '.join(keys)})" for name, keys in groups.items() if not {DOWN, UP} <= set(keys)]
    for what, bad in (("keys of no known spelling", unknown), ("adapters with a half missing", halves)):
        if bad:
            raise BadSource(f"{path} has {len(bad)} {what}: {_some(bad)}")
    if not groups:
        raise BadSource(f"{path} has no adapters")
    return tuple(
        Adapter(component, module, keys[DOWN], keys[UP], keys.get(ALPHA))
        for (component, module), keys in sorted(groups.items())
    )


def targets(found: Iterable[Adapter], component: str, weights: Iterable[str]) -> dict[Adapter, str | None]:
    """The weight each adapter of a component belongs to, by name; None where there is none.

    Args:
        found: of one file.
        component: `unet`, `text_encoder` or `text_encoder_2`.
        weights: names of the component's weights, as in its safetensors or `named_parameters`.
    """
    dotted = {_canonical(name.removesuffix(".weight")): name for name in weights if name.endswith(".weight")}
    if component == "unet":
        dotted = {there: dotted[here] for there, here in first_published(dotted).items()} | dotted
    flat = {name.replace(".", "_"): weight for name, weight in dotted.items()}
    return {
        adapter: dotted.get(name) or flat.get(name)
        for adapter in found
        if adapter.component == component
        for name in (_canonical(adapter.module),)
    }


def check(path: Path, weights: Mapping[str, Iterable[str]]) -> None:
    """Insist that every adapter of a file belongs to a weight of the model, before anything is loaded.

    Args:
        path: the LoRA file.
        weights: weight names by component.

    Raises:
        BadSource: naming the keys that match nothing.
        UnsupportedModel: as `adapters`.
    """
    found = adapters(path)
    homes: dict[Adapter, str | None] = dict.fromkeys(found)
    for component, names in weights.items():
        homes |= targets(found, component, names)
    homeless = [adapter.down for adapter, home in homes.items() if home is None]
    if homeless:
        raise BadSource(
            f"{path}: {len(homeless)} of {len(found)} adapters belong to no weight of this model: {_some(homeless)}. "
            f"Was it made for another architecture?"
        )


def fold(model: nn.Module, component: str, path: Path, scale: float) -> int:
    """Add a file's adapters for one component to its weights, in place and in float32.

    Returns:
        How many weights changed.

    Raises:
        BadSource: an adapter of this component that matches no weight, or has another shape than its weight.
        UnsupportedModel: as `adapters`; also rank-stabilised scaling.
    """
    import torch
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    homes = targets(adapters(path), component, parameters)
    declared = _declared(path, component)
    with safe_open(path, "pt") as file, torch.no_grad():
        for adapter, home in homes.items():
            if home is None:
                raise BadSource(f"{path}: {adapter.down} belongs to no weight of {component}")
            weight = parameters[home]
            down, up = (file.get_tensor(key).to(torch.float32) for key in (adapter.down, adapter.up))
            alpha = float(file.get_tensor(adapter.alpha)) if adapter.alpha else declared.of(home, down.shape[0])
            weight += scale * alpha / down.shape[0] * _product(path, adapter, down, up, weight)
    return len(homes)


@dataclass(frozen=True)
class _Declared:
    """Alphas from the adapter config that peft and diffusers keep in the file's metadata."""

    alpha: float | None
    patterns: Mapping[str, float]

    def of(self, weight: str, rank: int) -> float:
        """The alpha of one weight; the rank itself where none is declared."""
        module = weight.removesuffix(".weight")
        for pattern, alpha in self.patterns.items():
            if re.search(rf"(^|\.)({pattern})$", module):
                return float(alpha)
        return float(rank if self.alpha is None else self.alpha)


def _declared(path: Path, component: str) -> _Declared:
    metadata = read_header(path).metadata
    try:
        config: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as why:
        raise BadSource(f"{path}: lora_adapter_metadata is not JSON: {why}") from why
    for trick in ("use_rslora", "use_dora"):
        if config.get(f"{component}.{trick}"):
            raise UnsupportedModel(f"{path}: {component} was trained with {trick}; only plain LoRA is folded")
    return _Declared(config.get(f"{component}.lora_alpha"), config.get(f"{component}.alpha_pattern") or {})


def _product(path: Path, adapter: Adapter, down: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """B A in the weight's shape; a convolution's A is (r, in, kh, kw), its B (out, r, 1, 1)."""
    flat_up, flat_down = up.flatten(1), down.flatten(1)
    fits = flat_up.shape[1] == flat_down.shape[0] and flat_up.shape[0] == weight.shape[0]
    if not fits or flat_up.shape[0] * flat_down.shape[1] != weight.numel():
        raise BadSource(
            f"{path}: {adapter.down} {tuple(down.shape)} and {adapter.up} {tuple(up.shape)} do not make a "
            f"{tuple(weight.shape)} weight; was it made for another architecture?"
        )
    return (flat_up @ flat_down).view_as(weight)


def _parse(key: str) -> tuple[str, str, str] | None:
    """(component, module, role) of a key, None if it has no known spelling."""
    for suffix, role in ROLES.items():
        name = key.removesuffix(f".{suffix}") if key.endswith(f".{suffix}") else _old_processor(key, suffix)
        if name is None:
            continue
        kohya = re.fullmatch(r"lora_(unet|te1|te2|te)_(.+)", name)
        if kohya:
            return COMPONENTS[kohya[1]], kohya[2], role
        dotted = re.fullmatch(r"(unet|text_encoder_2|text_encoder)\.(.+)", name)
        if dotted:
            return dotted[1], dotted[2], role
    return None


def _old_processor(key: str, suffix: str) -> str | None:
    """diffusers before 0.20 kept LoRA in processors: `attn1.processor.to_q_lora.down.weight` adapts `attn1.to_q`."""
    match = re.fullmatch(rf"(.+)\.processor\.(to_q|to_k|to_v|to_out)_{re.escape(suffix)}", key)
    if match is None:
        return None
    return f"{match[1]}.{match[2]}{'.0' if match[2] == 'to_out' else ''}"


def _canonical(module: str) -> str:
    """A module's name without the level that transformers versions differ in."""
    for level in ("text_model.", "text_model_"):
        module = module.removeprefix(level)
    return module


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
