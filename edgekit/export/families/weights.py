"""Which files a component's weights lie in, and how many there are, from safetensors headers alone."""

from __future__ import annotations

import math
from pathlib import Path

from edgekit.errors import BadSource
from edgekit.export.headers import read_header
from edgekit.export.sources import read_json

STEMS = ("diffusion_pytorch_model", "model")
PICKLED = (".bin", ".pt", ".ckpt", ".pth")
VARIANTS = (None, "fp16")  # full precision first: half is upcast, and only where it is all there is


def variant_of(folder: Path) -> str | None:
    """The `variant` that from_pretrained must be told: None, or fp16 where only `*.fp16.safetensors` is there.

    Raises:
        BadSource: no safetensors weights, or only pickled ones.
    """
    for variant in VARIANTS:
        if _files(folder, variant):
            return variant
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled:
        raise BadSource(
            f"{folder} has only pickled weights ({', '.join(pickled)}), which can run code when opened; load the model "
            f"once in a place you trust and save_pretrained(..., safe_serialization=True)"
        )
    raise BadSource(f"{folder} has no *.safetensors weights; is the download complete?")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component. Raises BadSource."""
    return _files(folder, variant_of(folder))


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape, from the headers of a component's files.

    Raises:
        BadSource: no weights, or a header that is not safetensors'.
    """
    files = weight_files(folder)
    return {name: entry.shape for path in files for name, entry in read_header(path).entries.items()}


def parameters_of_file(path: Path) -> int:
    """Number of weights in one safetensors file. Raises BadSource."""
    return sum(math.prod(entry.shape) for entry in read_header(path).entries.values())


def parameters(folder: Path, prefixes: tuple[str, ...]) -> int:
    """Number of weights under any of the key prefixes (all if none are given). Raises BadSource."""
    return sum(math.prod(shape) for name, shape in shapes(folder).items() if not prefixes or name.startswith(prefixes))


def _files(folder: Path, variant: str | None) -> tuple[Path, ...]:
    middle = f".{variant}" if variant else ""
    for stem in STEMS:
        single = folder / f"{stem}{middle}.safetensors"
        if single.is_file():
            return (single,)
        index = folder / f"{stem}.safetensors.index{middle}.json"
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            files = tuple(folder / Path(name).name for name in names)
            missing = [path.name for path in files if not path.is_file()]
            if missing or not files:
                raise BadSource(
                    f"{index} names {', '.join(missing) or 'no files'}, not there; is the download complete?"
                )
            return files
    return ()
