"""Few-step generators the exporter knows: one module each, one row in FAMILIES.

A family reads configs, never weights and never torch, and answers two questions about a model folder: what few-step
contract it was distilled for (a Recipe), and which graphs that contract needs (PartJobs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import msgspec

from edgekit.bundle.manifest import TensorSpec
from edgekit.bundle.recipe import Name, Recipe
from edgekit.errors import UnknownFamily
from edgekit.export.sources import Source

FAMILIES = {"lcm": "lcm", "turbo": "turbo", "emoji": "emoji"}  # family name -> module in this folder

Bounds = tuple[float, float]


class PartJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph to be traced, as a value that a child process can be told.

    `network` is `module:attribute` of a torch-side builder called with `folder`. `sizes` gives every dynamic axis one
    size per probe: all probes are compared after the export, the first is also the example that is traced. Inputs are
    filled with unit normals; those in `fill` with uniform numbers (integers below the upper bound) instead. `weights`
    are the key prefixes in the component's safetensors that this part uses, empty for all; `lora` is the component's
    name in LoRA files.
    """

    part: Name
    network: str
    folder: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: dict[str, tuple[int, ...]]
    fill: dict[str, Bounds] = {}
    weights: tuple[str, ...] = ()
    lora: str | None = None

    def shape(self, spec: TensorSpec, probe: int) -> tuple[int, ...]:
        """The sizes of a tensor in one probe."""
        return tuple(dim if isinstance(dim, int) else self.sizes[dim][probe] for dim in spec.shape)

    @property
    def probes(self) -> int:
        """How many shapes are compared."""
        return min((len(sizes) for sizes in self.sizes.values()), default=1)


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer folder of the source and the number of ids its text encoder takes."""

    folder: str
    length: int


@dataclass(frozen=True)
class Family:
    """One kind of few-step generator; every callable raises UnsupportedModel or BadSource for what it cannot mean."""

    name: str
    task: Literal["text-to-image", "super-resolution"]
    matches: Callable[[Source], bool]
    recipe: Callable[[Source], Recipe]
    jobs: Callable[[Source], tuple[PartJob, ...]]
    tokenizers: Callable[[Source], dict[str, PromptTokenizer]]


def family_of(source: Source, name: str | None = None) -> Family:
    """The family of a model folder, by what its model_index.json and scheduler say.

    Args:
        source: the folder.
        name: a name in FAMILIES to insist on.

    Raises:
        UnknownFamily: no family has this name, none claims the folder, or the named one does not.
    """
    if name is not None and name not in FAMILIES:
        raise UnknownFamily(f"there is no family {name!r}; known families: {', '.join(FAMILIES)}")
    for each in FAMILIES if name is None else (name,):
        family: Family = import_module(f"{__name__}.{FAMILIES[each]}").FAMILY
        if family.matches(source):
            return family
    pipeline, scheduler = source.index.get("_class_name"), source.class_of("scheduler")
    wanted = f"family {name!r} does not export" if name else "no family exports"
    raise UnknownFamily(
        f"{wanted} {source.root}: pipeline {pipeline!r} with scheduler {scheduler!r}. Known: lcm (a pipeline distilled "
        f"for LCMScheduler), turbo (SD-Turbo, SDXL-Turbo: Euler on a trailing grid), emoji. A LoRA that distils a "
        f"model needs the scheduler it was distilled for in the folder's scheduler_config.json and model_index.json."
    )
