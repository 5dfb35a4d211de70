"""The same graphs under another scheduler: what a family adds to a folder is its recipe, so one export serves many."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle.store import new_bundle, read_bundle
from edgekit.export.families import family_of
from edgekit.export.sources import read_source
from edgekit.runtime.diffusion.tables import compile_tables
from tests.export.diffusion.conftest import Exported


def rescheduled(
    example: Exported, scheduler: Any, root: Path, *, family: str | None = None, index: dict[str, Any] | None = None
) -> Exported:
    """A pipeline of the same components with another scheduler, its saved folder, and the bundle that folder makes.

    Args:
        example: whose components and graphs these are.
        scheduler: a diffusers scheduler.
        root: an empty folder for both.
        family: insisted on by name; None finds it.
        index: fields of model_index.json to change.

    Raises:
        AssertionError: the folder asks for other graphs than the example's.
    """
    pipeline = type(example.pipeline)(**{**example.pipeline.components, "scheduler": scheduler})
    pipeline.register_to_config(**(index or {}))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root / "folder")
    source = read_source(root / "folder")
    found = family_of(source, family)
    recipe, old = found.recipe(source), example.bundle.manifest
    made = {job.part: (job.inputs, job.outputs) for job in found.jobs(source)}
    assert made == {name: (part.inputs, part.outputs) for name, part in old.parts.items()}
    with new_bundle(root / "bundle") as draft:
        shutil.copytree(example.bundle.root, draft.root, dirs_exist_ok=True)
        (draft.root / "edgekit.json").unlink()
        draft.seal(
            msgspec.structs.replace(old, family=found.name, recipe=recipe, tables=compile_tables(recipe), files=())
        )
    return replace(example, pipeline=pipeline, folder=root / "folder", bundle=read_bundle(root / "bundle"))
