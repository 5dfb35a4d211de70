"""One bundle of every folder for the whole run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgekit.bundle.store import Bundle
from tests.export.onnx_folder import folders


@pytest.fixture(scope="session")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """`adopted(name)`: the bundle of one of optimum's folders, made once."""
    root, made = tmp_path_factory.mktemp("adopted"), {}

    def get(name: str) -> Bundle:
        if name not in made:
            made[name] = folders.adopt(folders.FOLDERS / name, root / name)
        return made[name]

    return get
