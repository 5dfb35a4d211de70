"""`edgekit plan` on bundles and files that do not fit: an exit code, a sentence, and nothing written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekit.quant.mixed import PLAN_FILE, STUDY_FILE
from edgekit.quant.plan import PartChoices, PrecisionPlan, encode_plan, read_plan
from edgekit.quant.study import Study
from tests.bundle import tiny
from tests.cli.conftest import Run, only_json
from tests.cli.planned_bundles import own_plan, write_planned
from tests.quant.studies import made_up

STUDY = made_up(6)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of six layers."""
    return write_planned(tmp_path_factory.mktemp("plan") / "mixed.bundle", STUDY)


def refused(edgekit: Run, *arguments: object, code: int = 2) -> str:
    """What was said of a refusal, the same for people and for programs; no table, no trace."""
    done = edgekit("plan", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    told = only_json(edgekit("plan", *arguments, "--json"))["error"]
    assert told["exit_code"] == code
    return done.stderr


# --------------------------------------------------------------------------------------------------- the bundle


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "holds no study"),
        (b"not a study", "holds no study"),
        (STUDY.encode()[:-100], "holds no study"),
    ],
    ids=["empty", "text", "cut"],
)
def test_a_study_that_cannot_be_read_is_said(edgekit: Run, tmp_path: Path, raw: bytes, said: str) -> None:
    """It is what the manifest says, and no study all the same: the file, and how to make one."""
    told = refused(edgekit, write_planned(tmp_path / "odd.bundle", STUDY, raw_study=raw))
    assert f"odd.bundle/{STUDY_FILE} {said}" in told
    assert "--precision mixed" in told


def test_a_plan_that_cannot_be_read_is_said(edgekit: Run, tmp_path: Path) -> None:
    """Likewise of the plan."""
    told = refused(edgekit, write_planned(tmp_path / "odd.bundle", STUDY, raw_plan=b"{}"))
    assert f"odd.bundle/{PLAN_FILE} is no precision plan" in told


def test_a_plan_of_another_study_is_said(edgekit: Run, tmp_path: Path) -> None:
    """A unit that the study does not know."""
    other = encode_plan(PrecisionPlan("cpu:any", {"unet": PartChoices({"elsewhere": "fp16"})}))
    told = refused(edgekit, write_planned(tmp_path / "odd.bundle", STUDY, raw_plan=other))
    assert "unet/elsewhere, which this model does not have" in told


def test_a_text_bundle_without_a_study_is_said(edgekit: Run, tmp_path: Path) -> None:
    """Of every task alike: which precision it has, and what would make a study."""
    tiny.write(tmp_path / "text.bundle", tiny.text_draft)
    told = refused(edgekit, tmp_path / "text.bundle", "--budget", "4bits", "-o", tmp_path / "plan.json")
    assert "text.bundle was exported in fp32" in told
    assert not (tmp_path / "plan.json").exists()


def test_a_study_of_other_metrics_and_no_times_is_planned(edgekit: Run, tmp_path: Path) -> None:
    """Whatever metrics it has are the columns, and caps are on them."""
    language = replace(STUDY, errors={"kl": STUDY.errors["content"]})
    bundle = write_planned(tmp_path / "language.bundle", language)
    told = only_json(edgekit("plan", bundle, "--budget", "20bits", "--metric-cap", "kl=1", "--json"))
    assert list(told["chosen"]["errors"]) == ["kl"]
    assert told["chosen"]["errors"]["kl"] <= 1
    assert "this study has kl" in refused(edgekit, bundle, "--metric-cap", "content=1")


# --------------------------------------------------------------------------------------------------- the output


def test_a_folder_is_no_file(edgekit: Run, mixed: Path, tmp_path: Path) -> None:
    """Neither one that is there, forced or not, nor one that is not."""
    assert "exists already" in refused(edgekit, mixed, "-o", tmp_path)
    assert edgekit("plan", mixed, "-o", tmp_path, "--force").returncode != 0
    assert "make it first" in refused(edgekit, mixed, "-o", tmp_path / "none" / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_planned_replaces_nothing(edgekit: Run, mixed: Path, tmp_path: Path) -> None:
    """With --force, the old file stays until there is a new plan."""
    path = tmp_path / "plan.json"
    path.write_text("mine")
    told = refused(edgekit, mixed, "--budget", "0.5bits", "-o", path, "--force")
    assert "the smallest plan needs" in told
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_seen_first(edgekit: Run, tmp_path: Path) -> None:
    """Before a bundle is opened: whoever mistypes a name waits for nothing."""
    path = tmp_path / "plan.json"
    path.write_text("mine")
    assert "--force" in refused(edgekit, tmp_path / "nothing.bundle", "-o", path)


def test_force_alone_changes_nothing(edgekit: Run, mixed: Path, tmp_path: Path) -> None:
    """A plan is written where none is, with it or without, the same."""
    for name, more in (("one.json", ()), ("other.json", ("--force",))):
        assert edgekit("plan", mixed, "--budget", "12bits", "-o", tmp_path / name, *more).returncode == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()


# --------------------------------------------------------------------------------------------------- what is chosen


def chosen(study: Study, path: Path) -> np.ndarray:
    """The written plan as a pick."""
    return study.pick_of({name: part.units for name, part in read_plan(path).parts.items()})


def test_the_written_plan_is_the_one_told(edgekit: Run, mixed: Path, tmp_path: Path) -> None:
    """Choice by choice what --json counts, of a budget, a cap and protected layers together."""
    path = tmp_path / "plan.json"
    asked = ("--budget", "20bits", "--metric-cap", "quality=1", "--protect", "unet/block.4.*", "-o", path)
    told = only_json(edgekit("plan", mixed, *asked, "--json"))
    pick = chosen(STUDY, path)
    names = [STUDY.choices[column] for column in pick]
    assert told["chosen"]["counts"] == {name: names.count(name) for name in STUDY.choices if name in names}
    assert names[4] in ("fp32", "fp16")
    whole = STUDY.whole(STUDY.problem(), pick)
    assert told["chosen"]["bytes"] == whole.bytes
    assert told["chosen"]["errors"] == pytest.approx(dict(whole.errors))
    assert read_plan(path).caps == {"quality": 1.0}


def test_a_cap_alone_chooses(edgekit: Run, mixed: Path) -> None:
    """At the size and the time of plain int8, as an export without a budget would."""
    told = only_json(edgekit("plan", mixed, "--metric-cap", "content=1000", "--json"))
    assert told["chosen"]["bytes"] <= told["current"]["bytes"]
    assert told["chosen"]["milliseconds"] <= told["current"]["milliseconds"] * (1 + 1e-9)
    current = STUDY.whole(
        STUDY.problem(), STUDY.pick_of({name: part.units for name, part in own_plan(STUDY).parts.items()})
    )
    assert told["current"]["bytes"] == current.bytes


def test_the_object_is_one_line_of_plain_json(edgekit: Run, mixed: Path) -> None:
    """No table beside it, no NaN in it, and a name for each of its parts."""
    done = edgekit("plan", mixed, "--budget", "20bits", "--json")
    assert done.stderr == ""

    def strange(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    told = json.loads(done.stdout, parse_constant=strange)
    assert set(told) >= {"schema_version", "bundle", "target", "front", "current", "chosen", "output"}
    assert set(told["current"]) == {"bytes", "bits", "milliseconds", "errors", "counts"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "1MB", "--budget", "2MB"), "limited twice"),
        (("--metric-cap", "content=1", "--metric-cap", "content=2"), "limited twice"),
        (("--metric-cap", "content=inf"), "NAME=NUMBER"),
        (("--budget", "0MB"), "--budget '0MB'"),
    ],
)
def test_limits_that_limit_nothing_are_said(edgekit: Run, mixed: Path, arguments: tuple[str, ...], said: str) -> None:
    """A kind twice, no end, or none of it."""
    assert said in refused(edgekit, mixed, *arguments)
