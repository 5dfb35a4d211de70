"""`--precision mixed` from a model's folder to a sealed bundle: what is kept, what goes on, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.files import cache_folder
from edgekit.bundle.store import read_bundle
from edgekit.errors import BadRequest, PlanRefused
from edgekit.export import mixed
from edgekit.export.build import MIXED_NOTE, ExportRequest, export
from edgekit.export.build import plan as plan_of
from edgekit.quant import requests
from edgekit.quant.mixed import PLAN_FILE, STUDY_FILE
from edgekit.quant.plan import PartChoices, PrecisionPlan, encode_plan, read_plan
from edgekit.quant.report import REPORT_FILE
from edgekit.quant.study import decode_study
from tests.export.diffusion.tiny_pipelines import FOREIGN, ONE_LEVEL, autoencoder_tiny, lcm, unet
from tests.sharing import made_once

pytestmark = [*FOREIGN, pytest.mark.slow]

SLOW = "1000x"  # of the floats' time: how fast a graph this small runs is left to chance


class Told:
    """What was reported; may stop the work at a trial."""

    def __init__(self, most: int = 10**9) -> None:
        self.lines: list[str] = []
        self.most = most

    def __call__(self, what: str, share: float) -> None:
        self.lines.append(what)
        if self.trials > self.most:
            raise KeyboardInterrupt

    @property
    def trials(self) -> int:
        """How many runs of a choice were begun."""
        return sum("trying" in line for line in self.lines)


def save_folder(target: Path) -> None:
    """A pipeline of one level, its graphs small enough for trials in a moment."""
    pipeline = lcm()
    pipeline.register_modules(unet=unet(**ONE_LEVEL, time_cond_proj_dim=32), vae=autoencoder_tiny())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(target)
    (target / "README.md").write_text("---\nlicense: openrail++\n---\n# A test\n")
    (target / mixed.CALIBRATION_FILE).write_text("a red apple\nthe cat\nblue sky\nan old house\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    return made_once(tmp_path_factory, "tiny-lcm", save_folder)


@pytest.fixture(scope="module")
def without_probes() -> Iterator[None]:
    """Trials alone, on two requests in each half: what is tested here is the way from a folder to a bundle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "find_spec", lambda name: None)
        patch.setattr(requests, "SIZES", ((50_000_000, 2, 1, 2),))
        yield


@pytest.fixture(scope="module")
def work(source: Path, without_probes: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, with a measurement in it that was stopped after a few trials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.mktemp("mixed-cache")))
        yield tmp_path_factory.mktemp("mixed-bundles")


def request(source: Path, target: Path, *budgets: str, **options: object) -> ExportRequest:
    return ExportRequest(source, target, precision="mixed", steps=1, budgets=(*budgets, SLOW), **options)  # type: ignore[arg-type]


def test_a_model_goes_through_all_of_it(source: Path, work: Path) -> None:
    """Stopped, gone on with, made, made again for another budget, refused, and left alone when nothing changed."""
    first = request(source, work / "a.bundle", "1GB")
    stopped = Told(most=20)
    with pytest.raises(KeyboardInterrupt):
        export(first, stopped)
    assert not first.target.exists()

    told = Told()
    manifest = export(first, told)
    assert manifest.precision.requested == "mixed"
    bundle = read_bundle(first.target)
    assert {PLAN_FILE, STUDY_FILE, REPORT_FILE} <= {file.path for file in bundle.manifest.files}
    assert bundle.manifest.provenance.request == first.fingerprint()
    study = decode_study((first.target / STUDY_FILE).read_bytes(), "a.bundle")
    total = sum(study.facts["trials"].values()) - sum(len(row.units) for row in study.rows)
    assert total - 21 <= told.trials < total, "what was finished before the stop was not tried again"

    floats = sum(file.bytes for file in read_bundle(next(cache_folder().rglob("float.bundle"))).manifest.files)
    smaller = request(source, work / "b.bundle", f"{0.8 * floats / 1000:.1f}KB")
    again = Told()
    export(smaller, again)
    assert again.trials == 0
    assert read_plan(smaller.target / PLAN_FILE).bytes <= 0.8 * floats

    untouched = Told()
    assert export(smaller, untouched) == read_bundle(smaller.target).manifest
    assert untouched.lines == []

    worst: dict[str, dict[str, str]] = {}
    for row, size in zip(study.rows, study.bytes, strict=True):
        worst.setdefault(row.part, {}).update(dict.fromkeys(row.units, study.choices[int(np.nanargmin(size))]))
    plan = PrecisionPlan(study.target, {name: PartChoices(units) for name, units in worst.items()})
    (work / "worst.json").write_bytes(encode_plan(plan))
    with pytest.raises(PlanRefused, match=r"error .* on held-out requests"):
        export(request(source, work / "c.bundle", plan=work / "worst.json", caps=("nsr=1e-5",)), Told())
    assert not (work / "c.bundle").exists()


def test_options_that_cannot_be_meant(source: Path, tmp_path: Path) -> None:
    """Refused at once: nothing is exported, nothing is kept."""
    target = tmp_path / "b.bundle"
    with pytest.raises(BadRequest, match="--budget is an option of --precision mixed"):
        ExportRequest(source, target, budgets=("1MB",))
    with pytest.raises(BadRequest, match=r"--plan .*: no such file"):
        request(source, target, plan=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    told = Told()
    with pytest.raises(BadRequest, match="is no precision plan"):
        export(request(source, target, plan=tmp_path / "bad.json"), told)
    with pytest.raises(BadRequest, match="--budget '3'"):
        request(source, target, "3")
    assert (told.lines, target.exists()) == ([], False)


def test_the_estimate_is_that_of_the_floats_and_says_so(source: Path, tmp_path: Path) -> None:
    """A dry run reads no weights, so it knows no plan."""
    made = plan_of(request(source, tmp_path / "b.bundle"))
    assert made.precision == "mixed"
    assert MIXED_NOTE in made.notes
