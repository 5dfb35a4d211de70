"""The measurement of a whole bundle: what it refuses, and that it is not done twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest
from edgekit.quant.flow import measure_bundle
from edgekit.quant.mixed import Measured
from edgekit.quant.requests import digest, picture_requests
from edgekit.quant.targets import TARGETS

ELSEWHERE = [name for name, target in TARGETS.items() if target.engine not in ("ort-cpu", "openvino")]


class Listener:
    """Writes down what is reported."""

    def __init__(self, told: list[tuple[str, float]]) -> None:
        self.told = told

    def __call__(self, what: str, share: float) -> None:
        self.told.append((what, share))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_devices_that_are_not_here_are_refused(small_bundle: Bundle, name: str, tmp_path: Path) -> None:
    """By name and with a way out, before anything is run or written."""
    with pytest.raises(BadRequest, match=rf"mixed precision for {name} is measured on that device.*one precision"):
        measure_bundle(small_bundle, TARGETS[name], None, tmp_path / "work", lambda what, share: None, None)
    assert not (tmp_path / "work").exists()


def test_what_a_study_is_about(small_bundle: Bundle, small_measured: Measured, prompts: Path) -> None:
    """Every part with weights, in the metrics of pictures; the calibration is named by its hash."""
    assert [part.part for part in small_measured.parts] == ["text_encoder", "unet", "vae_decoder"]
    study = small_measured.study
    assert list(study.errors) == ["content", "quality"]
    assert study.target == "cpu:any"
    assert small_measured.calibration == digest(picture_requests(small_bundle, prompts)[0])
    assert study.facts["method"] == dict.fromkeys(("text_encoder", "unet", "vae_decoder"), "scan")
    assert study.facts["runs"] == {"text_encoder": 1.0, "unet": 2.0, "vae_decoder": 1.0}
    assert study.fixed_ms >= 0
    stored = sum(file.bytes for file in small_bundle.manifest.files)
    assert study.fixed_bytes + np.nansum(study.bytes[:, study.choices.index("fp32")]) == stored


def test_progress_goes_up_and_nothing_is_tried_twice(
    small_bundle: Bundle, small_measured: Measured, prompts: Path, tmp_path: Path
) -> None:
    """The share never falls; with the same folder the second measurement tries nothing and says the same."""
    studies, trials = [], []
    for _ in range(2):
        told: list[tuple[str, float]] = []
        measured = measure_bundle(small_bundle, TARGETS["cpu:any"], prompts, tmp_path, Listener(told), None, 1)
        shares = [share for _, share in told]
        assert all(0 <= share <= 1 for share in shares)
        assert shares == sorted(shares)
        studies.append(measured.study)
        trials.append(sum("trying" in what for what, _ in told))
    assert trials[0] > 50
    assert trials[1] == 0
    for name, table in studies[0].errors.items():
        np.testing.assert_array_equal(studies[1].errors[name], table)
        np.testing.assert_allclose(table, small_measured.study.errors[name], rtol=1e-3, atol=1e-10)
    np.testing.assert_array_equal(studies[0].bytes, studies[1].bytes)
