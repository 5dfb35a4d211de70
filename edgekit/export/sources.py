"""What kind of model folder this is, read from its own index file and never from its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from edgekit import __version__
from edgekit.bundle.files import sha256_tree
from edgekit.bundle.manifest import Provenance
from edgekit.errors import BadSource

INDEX_LIMIT = 16 * 2**20


@dataclass(frozen=True)
class Source:
    """A model folder as `transformers` or `diffusers` saved it; `index` is its config.json or model_index.json.

    `weights` says what it holds besides: torch's files, or ready-made ONNX graphs as optimum writes them.
    """

    root: Path
    kind: Literal["language", "diffusion"]
    index: dict[str, Any]
    weights: Literal["torch", "onnx"] = "torch"

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """The JSON file of one component, e.g. `config("unet")`.

        Raises:
            BadSource: missing or malformed.
        """
        if component == "vae" and self.weights == "onnx" and not (self.root / component).is_dir():
            component = "vae_decoder"  # optimum makes two graphs of it, and gives each its config
        return read_json(self.root / component / name)

    def class_of(self, component: str) -> str | None:
        """The class model_index.json names for a component, None where the pipeline has none."""
        entry = self.index.get(component)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def read_source(path: Path) -> Source:
    """Recognise a folder.

    Raises:
        BadSource: not a folder, or neither index file is in it.
    """
    if not path.is_dir():
        raise BadSource(f"{path} is not a folder; give the folder that save_pretrained wrote (or a hub snapshot of it)")
    for name, kind in (("model_index.json", "diffusion"), ("config.json", "language")):
        if (path / name).is_file():
            weights = "onnx" if _is_ready_made(path, kind) else "torch"
            return Source(path, kind, read_json(path / name), weights)  # type: ignore[arg-type]
    raise BadSource(
        f"{path} has neither model_index.json (a diffusers pipeline) nor config.json (a transformers model); "
        f"give the folder itself, not the one above it"
    )


def _is_ready_made(path: Path, kind: str) -> bool:
    """Whether there are ONNX graphs where torch's weights would be: beside the config, or in component folders."""
    folders = [path, path / "onnx"] if kind == "language" else [each for each in path.iterdir() if each.is_dir()]
    stored = [file.suffix for folder in folders if folder.is_dir() for file in folder.iterdir()]
    return ".onnx" in stored and not {".safetensors", ".bin"} & set(stored)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file.

    Raises:
        BadSource: missing, unreadable, larger than any config, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > INDEX_LIMIT:
            raise BadSource(f"{path} has {path.stat().st_size:,} bytes; no config is that large")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as why:
        raise BadSource(f"{path} is missing; is the download complete?") from why
    except OSError as why:
        raise BadSource(f"{path} cannot be read: {why.strerror}") from why
    except (ValueError, RecursionError) as why:
        raise BadSource(f"{path} is not JSON ({why}); is the download complete?") from why
    if not isinstance(value, dict):
        raise BadSource(f"{path} must hold one JSON object, not {type(value).__name__}")
    return value


def read_json_if_any(path: Path) -> dict[str, Any]:
    """One JSON object; an absent file is an empty one. Raises BadSource."""
    return read_json(path) if path.is_file() else {}


def stated_licence(root: Path, config: Mapping[str, Any]) -> str:
    """As the model card's front matter or the configuration states it; "unknown" otherwise."""
    card = root / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    fields = dict(re.findall(r"^(license\w*):\s*[\"']?([^\"'\n]+?)[\"']?\s*$", front[1], re.MULTILINE)) if front else {}
    stated = fields.get("license", config.get("license"))
    if stated == "other":
        stated = fields.get("license_name", fields.get("license_link", stated))
    return stated if isinstance(stated, str) and stated else "unknown"


def provenance(source: Source, packages: Sequence[str], loras: tuple[str, ...] = ()) -> Provenance:
    """Where a bundle's graphs come from, and the installed packages, by name, that made it."""
    return Provenance(
        source=source.root.resolve().name,
        source_sha256=sha256_tree(source.root),
        licence=stated_licence(source.root, source.index),
        tools={"edgekit": __version__, **{name: version(name) for name in packages}},
        loras=loras,
    )
