"""Which engine and devices this environment has, and the conflict pip cannot see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.errors import DeviceMissing
from edgekit.runtime.backends import devices

ROOT = Path(__file__).resolve().parents[2]


def test_the_installed_engine_names_itself() -> None:
    """Exactly one onnxruntime wheel, and the CPU among its devices."""
    engine = devices.engine()
    assert engine.wheel in devices.WHEELS
    assert "cpu" in engine.devices


def test_auto_takes_a_device_that_opens_and_names_are_taken_at_their_word() -> None:
    """`auto` is decided here; anything else is left for the backend to accept or refuse."""
    assert devices.choose("auto") in devices.engine().devices
    assert devices.choose("cuda:3") == "cuda:3"


@pytest.mark.parametrize("wheels", [("onnxruntime", "onnxruntime-gpu"), ()])
def test_two_wheels_or_none_is_an_error_with_advice(tmp_path: Path, wheels: tuple[str, ...]) -> None:
    """Installed metadata decides: both wheels, or neither, is refused before anything is imported."""
    for wheel in wheels:
        info = tmp_path / f"{wheel.replace('-', '_')}-1.30.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: 1.30.0\n")
    script = f"""
import importlib.metadata, sys
keep = [path for path in sys.path if path]
from edgekit.runtime.backends import devices
sys.path[:] = [{str(tmp_path)!r}]
try:
    devices.engine()
except Exception as why:
    print(type(why).__name__, why)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith(DeviceMissing.__name__)
    assert "edgekit[cpu]" in done.stdout
