"""`edgekit.load`: the public door."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import edgekit
from edgekit.errors import BadRequest, BundleError
from edgekit.export import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped draft model as a bundle."""
    target = tmp_path_factory.mktemp("load") / "draft.bundle"
    build.export(build.ExportRequest(ROOT / "models" / "pycode-draft", target), lambda _what, _fraction: None)
    return target


def test_five_lines_complete_text(draft: Path) -> None:
    """The README's example works on a real bundle, streamed and whole."""
    model = edgekit.load(draft, task="text-generation")
    streamed = "".join(chunk.text for chunk in model.stream("import ", max_new_tokens=8, seed=1))
    assert streamed == model.generate("import ", max_new_tokens=8, seed=1).text
    assert streamed


def test_a_bundle_of_another_task_is_refused(draft: Path) -> None:
    """Asking a text bundle for pictures says what it is instead."""
    with pytest.raises(BadRequest, match="text-generation"):
        edgekit.load(draft, task="text-to-image")


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    """A missing path and an empty folder are integrity errors, not tracebacks from deep inside."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BundleError):
            edgekit.load(path)


def test_loading_needs_no_exporter(draft: Path) -> None:
    """With torch, onnx and friends made unimportable, a bundle loads and answers."""
    script = f"""
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "diffusers", "safetensors", "scipy"):
    sys.modules[name] = None
import edgekit
print(edgekit.load({str(draft)!r}, task="text-generation").generate("import ", max_new_tokens=4).text)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
