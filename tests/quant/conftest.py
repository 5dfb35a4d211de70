"""Bundles that several tests plan for, each exported or measured once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.bundle.store import Bundle, read_bundle
from edgekit.quant.flow import measure_bundle
from edgekit.quant.mixed import Measured
from edgekit.quant.targets import TARGETS
from tests.quant.small_bundle import write_bundle, write_prompts
from tests.sharing import made_once

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def emoji_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped emoji model in fp32, exported by the real command."""

    def export(target: Path) -> None:
        subprocess.run(
            [sys.executable, "-m", "edgekit.cli", "export", str(ROOT / "models" / "emoji"), "-o", str(target)],
            check=True,
            capture_output=True,
            timeout=900,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    return made_once(tmp_path_factory, "emoji.bundle", export)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Some 30 kB with all that mixed precision looks for; see tests/quant/small_bundle.py."""
    return read_bundle(write_bundle(tmp_path_factory.mktemp("small") / "small.bundle"))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration file in the words that the small bundle has."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "calibration.txt")


@pytest.fixture(scope="session")
def small_measured(small_bundle: Bundle, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Every measurement of the small bundle, by trials alone."""
    work = tmp_path_factory.mktemp("measured")
    return measure_bundle(small_bundle, TARGETS["cpu:any"], prompts, work, lambda what, share: None, None, 1)
