"""One export of each tiny pipeline for the whole run: starting torch in a child is what costs."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekit.bundle.store import Bundle, new_bundle, read_bundle
from edgekit.export.families.export import DiffusionOptions, export_diffusion
from edgekit.export.sources import read_source
from tests.export.diffusion import tiny_pipelines as tiny


@dataclass(frozen=True)
class Exported:
    """A torch pipeline, the folder it was saved in, and the bundle made of that folder."""

    name: str
    pipeline: Any
    folder: Path
    bundle: Bundle
    said: tuple[tuple[str, float], ...]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Every tiny pipeline and its saved folder, by name."""
    root = tmp_path_factory.mktemp("pipelines")
    made = {}
    for name, build in tiny.PIPELINES.items():
        pipeline = build()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(root / name)
        (root / name / "README.md").write_text("---\nlicense: openrail++\n---\n# A test\n")
        made[name] = (pipeline, root / name)
    words = made["sd-turbo"][0].tokenizer
    tiny.save_slow_tokenizer(words, root / "sd-turbo" / "tokenizer")
    return made


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share: what one of them exported, the others read."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-bundles"
    root.mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="session")
def exported(folders: dict[str, tuple[Any, Path]], shared_root: Path) -> Any:
    """`exported(name)`: the bundle of a tiny pipeline, made once."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            made[name] = export_folder(name, *folders[name], shared_root / name)
        return made[name]

    return get


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; whoever comes second waits."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def export_folder(name: str, pipeline: Any, folder: Path, target: Path) -> Exported:
    """The bundle of a saved pipeline: made by the first worker that asks, read by the others.

    Weights are seeded, so every worker's pipeline is the one that was exported.
    """
    said = target.with_suffix(".said.json")
    with locked(target.with_suffix(".lock")):
        if not said.exists():
            said.write_text(json.dumps(_export(folder, target)))
    told = tuple((str(text), float(part)) for text, part in json.loads(said.read_text()))
    return Exported(name, pipeline, folder, read_bundle(target), told)


def _export(folder: Path, target: Path) -> list[tuple[str, float]]:
    """Make a bundle; what the exporter said of its progress."""
    said: list[tuple[str, float]] = []
    with new_bundle(target) as draft:
        manifest = export_diffusion(
            read_source(folder),
            draft.root,
            options=DiffusionOptions(),
            progress=lambda text, part: said.append((text, part)),
        )
        provenance = msgspec.structs.replace(manifest.provenance, created="2026-01-01T00:00:00Z")
        draft.seal(msgspec.structs.replace(manifest, provenance=provenance))
    return said
