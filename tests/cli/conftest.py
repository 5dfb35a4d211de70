"""The command line is tested as a user types it: a new process, its exit code, its two streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(*args: object) -> list[str]:
    """`edgekit ARGS` with this interpreter."""
    return [sys.executable, "-m", "edgekit.cli", *map(str, args)]


@pytest.fixture(scope="session")
def edgekit() -> Run:
    """Run `edgekit ARGS`; keywords: input=, env=, cwd=."""

    def run(*args: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        everything = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", **(env or {})}
        return subprocess.run(
            command(*args), capture_output=True, text=True, timeout=300, env=everything, check=False, **options
        )

    return run


@pytest.fixture(scope="session")
def text_bundle(edgekit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped draft model, exported by the real command."""
    target = tmp_path_factory.mktemp("bundles") / "draft.bundle"
    done = edgekit("export", MODELS / "pycode-draft", "-o", target)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def image_bundle(edgekit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped emoji model, exported by the real command."""
    target = tmp_path_factory.mktemp("bundles") / "emoji.bundle"
    done = edgekit("export", MODELS / "emoji", "-o", target)
    assert done.returncode == 0, done.stderr
    return target


def only_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one object a `--json` verb printed."""
    value: dict[str, Any] = json.loads(done.stdout)
    assert value["schema_version"] == 1
    return value
