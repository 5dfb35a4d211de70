"""One good bundle of each kind per run; a test that spoils one takes a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundle import tiny


@pytest.fixture(scope="session")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image bundle."""
    target = tmp_path_factory.mktemp("image") / "tiny.bundle"
    tiny.write(target, tiny.image_draft)
    return target


@pytest.fixture(scope="session", params=["ort", "std"])
def text_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-generation bundle, in each dialect."""
    target = tmp_path_factory.mktemp("text") / "tiny.bundle"
    tiny.write(target, tiny.text_draft, request.param)
    return target
