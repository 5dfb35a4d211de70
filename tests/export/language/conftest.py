"""Tiny models and their exports, each made once per run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle.manifest import Manifest
from edgekit.export.language.export import export_language
from tests.export.language import tiny

Export = tuple[Path, Manifest]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """case -> (transformers model, the folder it was saved to)."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(case: str) -> tuple[Any, Path]:
        if case not in made:
            model = tiny.make_model(case)
            made[case] = model, tiny.save_model(model, tmp_path_factory.mktemp(case))
        return made[case]

    return get


@pytest.fixture(scope="session")
def export_of(
    model_of: Callable[[str], tuple[Any, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Export]:
    """(case, dialect) -> the float32 export: folder and manifest."""
    made: dict[tuple[str, str], Export] = {}

    def get(case: str, dialect: Any) -> Export:
        if (case, dialect) not in made:
            folder = tmp_path_factory.mktemp(f"{case}-{dialect}")
            made[case, dialect] = folder, export_language(model_of(case)[1], folder, dialect=dialect)
        return made[case, dialect]

    return get
