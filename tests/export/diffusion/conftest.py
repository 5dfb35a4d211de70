"""One export of each tiny pipeline for the whole run: starting torch in a child is what costs."""

from __future__ import annotations

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
def exported(folders: dict[str, tuple[Any, Path]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`exported(name)`: the bundle of a tiny pipeline, made once."""
    root, made = tmp_path_factory.mktemp("bundles"), {}

    def get(name: str) -> Exported:
        if name not in made:
            made[name] = export_folder(name, *folders[name], root / name)
        return made[name]

    return get


def export_folder(name: str, pipeline: Any, folder: Path, target: Path, **options: Any) -> Exported:
    """Make a bundle of a saved pipeline; options are those of DiffusionOptions."""
    said: list[tuple[str, float]] = []
    with new_bundle(target) as draft:
        manifest = export_diffusion(
            read_source(folder),
            draft.root,
            options=DiffusionOptions(**options),
            progress=lambda text, part: said.append((text, part)),
        )
        provenance = msgspec.structs.replace(manifest.provenance, created="2026-01-01T00:00:00Z")
        draft.seal(msgspec.structs.replace(manifest, provenance=provenance))
    return Exported(name, pipeline, folder, read_bundle(target), tuple(said))
