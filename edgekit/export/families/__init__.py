"""Few-step generators the exporter knows: one module each, one row in FAMILIES.

A family reads configs, never weights and never torch, and answers two questions about a model folder: what few-step
contract it was distilled for (a Recipe), and which graphs that contract needs (PartJobs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import msgspec

from edgekit.bundle.manifest import Task, TensorSpec
from edgekit.bundle.recipe import Name, Recipe
from edgekit.errors import UnknownFamily
from edgekit.export.sources import Source

FAMILIES = {  # family name -> module in this folder
    "lcm": "lcm",
    "tcd": "tcd",
    "hyper-sd": "hyper_sd",
    "hyper-sd-unified": "hyper_unified",
    "turbo": "turbo",
    "lightning": "lightning",
    "dmd2": "dmd2",
    "instaflow": "instaflow",
    "zero-snr": "zero_snr",
    "emoji": "emoji",
    "pixart": "pixart",
    "sd3": "sd3",
    "flux": "flux",
    "animatediff": "animatediff",
    "svd": "svd",
    "amused": "amused",
    "sana-sprint": "sana",
    "zimage": "zimage",
    "audioldm": "audioldm",
}

Bounds = tuple[float, float]


class PartJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph to be traced, as a value that a child process can be told.

    `network` is `module:attribute` of a torch-side builder called with `folder`. `sizes` gives every dynamic axis one
    size per probe: all probes are compared after the export, the first is also the example that is traced. Inputs are
    filled with unit normals; those in `fill` with uniform numbers (integers below the upper bound) instead. `weights`
    are the key prefixes in the component's safetensors that this part uses, empty for all; `lora` is the component's
    name in LoRA files. `most` is the largest size of axes that have one (positions over time). `beside` are folders of
    components that are loaded into the same graph; `adapter` is a safetensors file that is, with which the builder is
    also called.
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
    most: dict[str, int] = {}
    beside: tuple[str, ...] = ()
    adapter: str | None = None

    def shape(self, spec: TensorSpec, probe: int) -> tuple[int, ...]:
        """The sizes of a tensor in one probe."""
        return tuple(dim if isinstance(dim, int) else self.sizes[dim][probe] for dim in spec.shape)

    @property
    def probes(self) -> int:
        """How many shapes are compared."""
        return min((len(sizes) for sizes in self.sizes.values()), default=1)


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer folder of the source, the number of ids its text encoder takes, and what it sees around a prompt.

    `template` and `lower` are those of edgekit.bundle.manifest.Tokenizer.
    """

    folder: str
    length: int
    template: str | None = None
    lower: bool = False


@dataclass(frozen=True)
class Family:
    """One kind of few-step generator; every callable raises UnsupportedModel or BadSource for what it cannot mean.

    `matches` finds a folder by what it says of itself; `by_name` is what `--family` may claim beyond that. `distils`
    are the scheduler fields a LoRA of this family goes with, where there are such LoRAs.
    """

    name: str
    task: Task
    matches: Callable[[Source], bool]
    recipe: Callable[[Source], Recipe]
    jobs: Callable[[Source], tuple[PartJob, ...]]
    tokenizers: Callable[[Source], dict[str, PromptTokenizer]]
    by_name: Callable[[Source], bool] | None = None
    distils: Mapping[str, Any] | None = None

    def claims(self, source: Source) -> bool:
        """Whether a folder is this family's when it is asked for by name."""
        return self.matches(source) or (self.by_name is not None and self.by_name(source))


def named_family(name: str) -> Family:
    """A family of FAMILIES. Raises UnknownFamily."""
    if name not in FAMILIES:
        raise UnknownFamily(f"there is no family {name!r}; known families: {', '.join(FAMILIES)}")
    family: Family = import_module(f"{__name__}.{FAMILIES[name]}").FAMILY
    return family


def family_of(source: Source, name: str | None = None) -> Family:
    """The family of a model folder, by what its model_index.json and scheduler say.

    Args:
        source: the folder.
        name: a name in FAMILIES to insist on.

    Raises:
        UnknownFamily: no family has this name, none claims the folder, or the named one does not.
    """
    found = (named_family(each) for each in (FAMILIES if name is None else (name,)))
    for family in found:
        if family.matches(source) if name is None else family.claims(source):
            return family
    pipeline, scheduler = source.index.get("_class_name"), source.class_of("scheduler")
    wanted = f"family {name!r} does not export" if name else "no family exports"
    raise UnknownFamily(
        f"{wanted} {source.root}: pipeline {pipeline!r} with scheduler {scheduler!r}. Known: {', '.join(FAMILIES)}; "
        f"docs/few-step-export.md says what each is found by. A base model takes a LoRA that distils it: add --lora "
        f"FILE and --family with the LoRA's kind, such as lcm, tcd, hyper-sd or lightning. A model that is distilled "
        f"already needs its few-step scheduler in its model_index.json and scheduler_config.json: save it with that."
    )
