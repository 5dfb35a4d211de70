"""From a request to a bundle: what is recognised, what is refused, what a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.bundle.store import read_bundle
from edgekit.errors import BadRequest, BadSource, UnknownDevice
from edgekit.export import build
from edgekit.export.sources import read_source

ROOT = Path(__file__).resolve().parents[2]
DRAFT = ROOT / "models" / "pycode-draft"


def quiet(_what: str, _fraction: float) -> None:
    """Progress nobody looks at."""


def test_a_folder_is_recognised_by_its_index_file(tmp_path: Path) -> None:
    """config.json is a language model, model_index.json a pipeline, whatever the folder is called."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_source(tmp_path).kind == "language"
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    source = read_source(tmp_path)
    assert source.kind == "diffusion"
    assert source.class_of("unet") == "UNet2DConditionModel"
    assert source.class_of("vae") is None


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": ' * 5000, "\x00"])
def test_a_malformed_index_is_a_bad_source(tmp_path: Path, content: str) -> None:
    """Whatever is in config.json, the answer is one clear error that names the file."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadSource, match=r"config\.json"):
        read_source(tmp_path)


def test_progress_only_moves_forward_to_the_end(tmp_path: Path) -> None:
    """A bar fed with these fractions never jumps back and ends full."""
    seen: list[float] = []
    build.export(build.ExportRequest(DRAFT, tmp_path / "x.bundle"), lambda _, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)


def test_equal_requests_are_one_work_and_any_difference_is_another(tmp_path: Path) -> None:
    """The fingerprint covers source bytes and every option that shapes the bundle, not where it is written."""
    request = build.ExportRequest(DRAFT, tmp_path / "a.bundle")
    assert request.fingerprint() == replace(request, target=tmp_path / "b.bundle").fingerprint()
    others = (replace(request, precision="int4"), replace(request, device="trt"), replace(request, steps=2))
    assert len({request.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_a_changed_source_is_exported_anew(tmp_path: Path) -> None:
    """One changed byte in the source makes the bundle stale."""
    import shutil

    source = tmp_path / "model"
    shutil.copytree(DRAFT, source)
    request = build.ExportRequest(source, tmp_path / "x.bundle", overwrite=True)
    build.export(request, quiet)
    assert build.current(request) is not None
    config = source / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "temperature": 0.5}))
    assert build.current(request) is None


def test_options_a_language_model_lacks_are_refused(tmp_path: Path) -> None:
    """--lora and --steps do not vanish in silence."""
    lora = tmp_path / "x.safetensors"
    lora.touch()
    request = build.ExportRequest(DRAFT, tmp_path / "x.bundle")
    for wrong in (replace(request, steps=4), replace(request, loras=(build.LoraFile(lora),))):
        with pytest.raises(BadRequest):
            build.export(wrong, quiet)
    assert not (tmp_path / "x.bundle").exists()


def test_the_wrong_task_and_unknown_devices_are_refused(tmp_path: Path) -> None:
    """--task that the source does not have, and a device no exporter knows."""
    with pytest.raises(BadRequest, match="text-generation"):
        build.export(build.ExportRequest(DRAFT, tmp_path / "x.bundle", task="text-to-image"), quiet)
    with pytest.raises(UnknownDevice, match="npu"):
        build.ExportRequest(DRAFT, tmp_path / "x.bundle", device="npu")


@pytest.mark.parametrize("after", [0.5, 0.9, 1.3])
def test_a_killed_export_leaves_no_bundle(tmp_path: Path, after: float) -> None:
    """SIGKILL at any moment: the target is complete or absent, and the next export succeeds and cleans up."""
    target = tmp_path / "x.bundle"
    args = [sys.executable, "-m", "edgekit.cli", "export", str(ROOT / "models" / "pycode"), "-o", str(target)]
    with subprocess.Popen(args, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL) as process:
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
    if target.exists():
        read_bundle(target)
    build.export(build.ExportRequest(DRAFT, target, overwrite=True), quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["x.bundle"]
