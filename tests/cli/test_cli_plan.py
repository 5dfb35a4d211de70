"""`edgekit plan`: the front of a bundle's study, a plan within a budget, and the file that `export --plan` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgekit.bundle.store import pack_zip, read_bundle
from edgekit.quant.choices import CHOICES
from edgekit.quant.mixed import PLAN_FILE, STUDY_FILE
from edgekit.quant.plan import read_plan
from edgekit.quant.study import Study
from tests.bundle import tiny
from tests.cli.conftest import Run, only_json
from tests.cli.planned_bundles import RANGES, REWRITES, write_planned
from tests.quant.studies import made_up


@pytest.fixture(scope="module")
def study() -> Study:
    """Twelve units in two parts, two of which share weights."""
    return made_up(shared=True)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, study: Study) -> Path:
    """A bundle with a study in it."""
    return write_planned(tmp_path_factory.mktemp("plan") / "mixed.bundle", study)


def test_without_a_budget_it_prints_the_front_and_this_bundle(edgekit: Run, mixed: Path, study: Study) -> None:
    """A table by size with errors, and one of layers by choice; nothing is chosen."""
    done = edgekit("plan", mixed)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.startswith("│")
    ]
    figures, counts = ([cells for cells in lines if len(cells) == width] for width in (6, 1 + len(study.choices)))
    assert "content error" in done.stdout
    assert "chosen" not in done.stdout
    assert [cells[0] for cells in figures].count("this bundle") == 1
    assert [cells[1] for cells in figures] == [cells[0] for cells in counts]
    assert all(sum(int(cell or 0) for cell in cells[1:]) == 13 for cells in counts)


def test_the_front_is_a_front(edgekit: Run, mixed: Path, study: Study) -> None:
    """Bytes rise, the score of errors falls, and every figure is the study's own."""
    told = only_json(edgekit("plan", mixed, "--json"))
    assert (told["target"], told["chosen"], told["output"]) == ("cpu:any", None, None)
    sizes = [each["bytes"] for each in told["front"]]
    assert sizes == sorted(sizes)
    assert len(sizes) > 3
    errors = [each["errors"]["content"] + each["errors"]["quality"] / 9 for each in told["front"]]
    assert errors == sorted(errors, reverse=True)
    for each in told["front"]:
        assert each["bits"] == pytest.approx(8 * (each["bytes"] - study.fixed_bytes) / study.params)
        assert sum(each["counts"].values()) == 13
        assert list(each["counts"]) == [name for name in CHOICES if name in each["counts"]]


def test_this_bundle_is_what_the_study_says_of_its_plan(edgekit: Run, mixed: Path, study: Study) -> None:
    """Sums over rows, one by one; a shared matrix is stored once and counted as the two layers it serves."""
    told = only_json(edgekit("plan", mixed, "--json"))["current"]
    column = study.choices.index("w8a8")
    assert told["bytes"] == study.fixed_bytes + sum(study.bytes[at, column] for at in range(len(study.rows)))
    for name, table in study.errors.items():
        assert told["errors"][name] == pytest.approx(sum(table[at, column] for at in range(len(study.rows))))
    assert told["counts"] == {"w8a8": 13}


@pytest.mark.parametrize("budget", ["6bits", "50KB", "0.9x"])
def test_a_budget_chooses_a_plan_within_it(edgekit: Run, mixed: Path, study: Study, budget: str) -> None:
    """The chosen plan is the study's own decision, keeps its budget, and is printed in a line."""
    found = only_json(edgekit("plan", mixed, "--budget", budget, "--json"))["chosen"]
    whole = study.whole(study.problem(), study.pick_of({})).milliseconds
    assert whole is not None
    kept = {
        "6bits": found["bits"] <= 6,
        "50KB": found["bytes"] <= 50_000,
        "0.9x": found["milliseconds"] <= 0.9 * whole * (1 + 1e-9),
    }
    assert kept[budget]
    shown = edgekit("plan", mixed, "--budget", budget).stdout
    assert f"{found['bits']:.2f} bits a weight" in shown.splitlines()[-1]
    assert shown.splitlines()[-1].startswith("chosen: ")


def test_a_cap_and_protection_are_kept(edgekit: Run, mixed: Path) -> None:
    """Protected layers are floats in the plan and everywhere on the front; the capped error is no larger."""
    free = only_json(edgekit("plan", mixed, "--budget", "20bits", "--json"))["chosen"]["errors"]["content"]
    asked = ("--protect", "text_encoder/*", "--metric-cap", f"content={free * 2}", "--budget", "20bits")
    told = only_json(edgekit("plan", mixed, *asked, "--json"))
    assert told["chosen"]["errors"]["content"] <= free * 2
    for each in (told["chosen"], *told["front"]):
        assert each["counts"].get("fp32", 0) + each["counts"].get("fp16", 0) >= 4


def test_the_written_plan_goes_back_into_an_export(edgekit: Run, mixed: Path, study: Study, tmp_path: Path) -> None:
    """It reads back, names every unit, keeps what is known of the old one, and says nothing was measured of it."""
    path = tmp_path / "small.json"
    asked = ("--budget", "6bits", "--metric-cap", "content=0.5", "-o", path)
    done = edgekit("plan", mixed, *asked, "--json")
    found = only_json(done)
    assert found["output"] == str(path)
    plan = read_plan(path)
    assert (plan.budgets, plan.caps) == ({"bits": 6.0}, {"content": 0.5})
    assert plan.bytes == found["chosen"]["bytes"]
    assert {error.metric: error.predicted for error in plan.errors} == found["chosen"]["errors"]
    assert all(error.measured is None for error in plan.errors)
    assert (plan.calibration, plan.method) == ("c" * 64, "unet: scan")
    for part in plan.parts.values():
        assert (part.ranges, part.rewrites) == (RANGES, REWRITES)
    again = study.whole(study.problem(), study.pick_of({name: part.units for name, part in plan.parts.items()}))
    assert again.bytes == plan.bytes
    assert plan.parts["text_encoder"].units["block.1.proj"] == plan.parts["text_encoder"].units["block.1.tied"]
    assert sum(len(part.units) for part in plan.parts.values()) == 13


def test_a_file_is_replaced_only_when_asked(edgekit: Run, mixed: Path, tmp_path: Path) -> None:
    """Exit code 2 and the old bytes; with --force the new plan, and no draft beside it either way."""
    path = tmp_path / "plan.json"
    path.write_text("mine")
    done = edgekit("plan", mixed, "-o", path)
    assert (done.returncode, path.read_text()) == (2, "mine")
    assert "--force" in done.stderr
    done = edgekit("plan", mixed, "-o", path, "--force")
    assert done.returncode == 0, done.stderr
    assert f"--plan {path}" in done.stderr
    assert json.loads(path.read_text())["target"] == "cpu:any"
    assert list(tmp_path.iterdir()) == [path]


def test_a_zip_is_planned_alike(edgekit: Run, mixed: Path, tmp_path: Path) -> None:
    """The same bundle in one file gives the same figures."""
    packed = tmp_path / "mixed.zip"
    pack_zip(read_bundle(mixed), packed)
    own = {"EDGEKIT_CACHE": str(tmp_path / "cache")}
    one, other = (only_json(edgekit("plan", path, "--json", env=own)) for path in (mixed, packed))
    assert one["front"] == other["front"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "much"), "--budget 'much'"),
        (("--budget", "1bits"), "the smallest plan needs"),
        (("--metric-cap", "beauty=1"), "content, quality"),
        (("--protect", "nothing.*", "--budget", "6bits"), "names no unit"),
        (("--protect", "nothing.*"), "names no unit"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(
    edgekit: Run, mixed: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Exit code 2, in words, for people and for programs; no table."""
    done = edgekit("plan", mixed, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert only_json(edgekit("plan", mixed, *arguments, "--json"))["error"]["exit_code"] == 2


def test_a_bundle_without_a_study_says_how_to_get_one(edgekit: Run, tmp_path: Path) -> None:
    """Exit code 2, and which export makes one."""
    tiny.write(tmp_path / "plain.bundle", tiny.image_draft)
    done = edgekit("plan", tmp_path / "plain.bundle")
    assert (done.returncode, done.stdout) == (2, "")
    assert "was exported in fp32; export with --precision mixed to have something to plan from" in done.stderr


def test_a_changed_study_is_an_integrity_error(edgekit: Run, mixed: Path, tmp_path: Path) -> None:
    """Only the two files that are read are hashed, and those are."""
    for number, name in enumerate((STUDY_FILE, PLAN_FILE)):
        copy = tmp_path / f"{number}.bundle"
        for path in mixed.rglob("*"):
            if path.is_file():
                (copy / path.relative_to(mixed)).parent.mkdir(parents=True, exist_ok=True)
                (copy / path.relative_to(mixed)).write_bytes(path.read_bytes())
        raw = bytearray((copy / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (copy / name).write_bytes(raw)
        done = edgekit("plan", copy)
        assert (done.returncode, done.stdout) == (5, "")
        assert name in done.stderr


def test_what_is_no_bundle_is_an_integrity_error(edgekit: Run, tmp_path: Path) -> None:
    """As for every other verb."""
    assert edgekit("plan", tmp_path).returncode == 5
    assert edgekit("plan", tmp_path / "nothing").returncode == 5
