"""Few-step recipes of published models, as data: one JSON file per entry beside this module.

An entry holds what a bundle of that model would hold but for its files: the recipe, the signature of every network, the
lengths of its tokenizers. `edgekit recipes` shows them, `docs/families.md` lists them, and the tests run every one of
them on random networks of these signatures.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from typing import Annotated, Literal

import msgspec

from edgekit.bundle.manifest import AxisRange, Task, TensorSpec
from edgekit.bundle.recipe import Name, Recipe, Value
from edgekit.errors import BadManifest, BadRequest

State = Literal["verified", "from the paper"]
Sentence = Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]


class Signature(Value, frozen=True):
    """What a network must take and give: a Part without its files.

    A dimension that is a sum or product of names (`height*8`) is that of the axes so called.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Entry(Value, frozen=True):
    """One model's few-step contract.

    `family` is the name docs/families.md lists it under; several entries may share one. `paper` is authors, year and
    arXiv number. `source` is what is public: the name of weights, the authors' checkpoints or code, or "none". `state`
    is "verified" where rule, grid, step counts and guidance were read in public code or configs of the authors, and
    "from the paper" where they could not be. `exporter` is the name in edgekit.export.families.FAMILIES that makes
    bundles of this recipe, with reference parity.
    """

    name: Name
    family: Sentence
    title: Sentence
    paper: Sentence
    task: Task
    source: Sentence
    state: State
    recipe: Recipe
    parts: dict[Name, Signature]
    notes: tuple[Sentence, ...] = ()
    tokenizers: dict[Name, Annotated[int, msgspec.Meta(ge=2, le=2**20)]] = {}
    axes: dict[str, AxisRange] = {}
    exporter: Sentence | None = None


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Names of all entries, in alphabetical order."""
    return tuple(sorted(file.name.removesuffix(".json") for file in files(__name__).iterdir() if _is_entry(file.name)))


def entry(name: str) -> Entry:
    """One entry, read from its file.

    Raises:
        BadRequest: no entry has this name; the message lists close ones.
        BadManifest: the file is not an entry, or is called like another.
    """
    if name not in names():
        close = get_close_matches(name.lower().replace("-", "_"), names(), n=5, cutoff=0.5)
        hint = f"close ones: {', '.join(close)}" if close else "`edgekit recipes ls` lists them all"
        raise BadRequest(f"the catalogue has no recipe {name!r}; {hint}")
    raw = files(__name__).joinpath(f"{name}.json").read_bytes()
    try:
        found = msgspec.json.decode(raw, type=Entry)
    except msgspec.DecodeError as why:
        raise BadManifest(f"catalogue entry {name}.json: {why}; install edgekit again") from why
    if found.name != name:
        raise BadManifest(f"catalogue entry {name}.json calls itself {found.name!r}; install edgekit again")
    return found


def _is_entry(file: str) -> bool:
    return file.endswith(".json")
