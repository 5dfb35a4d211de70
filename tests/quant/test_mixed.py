"""From measurements to a bundle: decided, made, verified, repaired, and refused where it is not good enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekit.bundle.store import Bundle, new_bundle, read_bundle
from edgekit.errors import BadRequest, BudgetTooSmall, PlanRefused
from edgekit.quant.budget import Budget
from edgekit.quant.metrics import errors
from edgekit.quant.mixed import (
    PLAN_FILE,
    REPAIRS,
    RIVALS,
    STUDY_FILE,
    Measured,
    MixedOptions,
    Outcome,
    check_patterns,
    quantize,
)
from edgekit.quant.pictures import PictureWorkload
from edgekit.quant.plan import PartChoices, PrecisionPlan, read_plan
from edgekit.quant.study import Study, decode_study
from edgekit.quant.verify import CAPS
from edgekit.quant.workload import reference_of
from edgekit.runtime.backends import open_session
from edgekit.runtime.diffusion.pipeline import FewStepPipeline

SLOW = 1000.0  # times the floats' time: how fast a graph of 30 kB runs is left to chance
BYTES = 50_000.0  # of 66 kB in floats
GUARD = "guard.encoder_hidden_states"


class Told(list[str]):
    """What was reported."""

    def __call__(self, what: str, share: float) -> None:
        self.append(what)


def sealed(bundle: Bundle, measured: Measured, options: MixedOptions, target: Path) -> tuple[Outcome, list[str]]:
    """As an export does it, without the page of the report."""
    told = Told()
    with new_bundle(target) as draft:
        made = quantize(bundle, measured, options, draft.root, told)
        draft.seal(made.manifest)
    return made, told


def with_errors(measured: Measured, factor: float) -> Measured:
    """Every sensitivity off by a factor."""
    study = measured.study
    changed = {name: table * factor for name, table in study.errors.items()}
    return replace(measured, study=replace(study, errors=changed, vectors={}))


@pytest.fixture(scope="module")
def small(
    small_bundle: Bundle, small_measured: Measured, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, Bundle]:
    """A bundle of three quarters of the floats' bytes."""
    target = tmp_path_factory.mktemp("mixed") / "mixed.bundle"
    made, _ = sealed(small_bundle, small_measured, MixedOptions(Budget(bytes=BYTES, times=SLOW)), target)
    return made, read_bundle(target)


def test_the_bundle_is_within_its_budget(small: tuple[Outcome, Bundle]) -> None:
    """By its files: everything but the report, graphs and what lowering added to them included."""
    outcome, bundle = small
    files = {file.path: file.bytes for file in bundle.manifest.files if not file.path.startswith("report/")}
    assert 0.9 * BYTES < sum(files.values()) <= BYTES
    assert outcome.plan.bytes == sum(files.values())
    assert outcome.plan.budgets == {"bytes": BYTES, "times": SLOW}
    (gate,) = [gate for gate in bundle.manifest.precision.gates if gate.what == "bytes of the bundle"]
    assert (gate.value, gate.limit) == (sum(files.values()), BYTES)


def test_the_manifest_says_what_was_made(small: tuple[Outcome, Bundle], small_bundle: Bundle) -> None:
    """Parts are mixed, the guard is an output that the recipe does not know, and the rest is as it was."""
    _, bundle = small
    manifest, before = bundle.manifest, small_bundle.manifest
    assert manifest.precision.requested == "mixed"
    assert {name: part.precision for name, part in manifest.parts.items()} == dict.fromkeys(before.parts, "mixed")
    unet = manifest.parts["unet"]
    assert [(spec.name, spec.shape) for spec in unet.outputs][1:] == [(GUARD, ())]
    assert unet.answers == ("out_sample",)
    for name, part in before.parts.items():
        assert manifest.parts[name].inputs == part.inputs
        assert manifest.parts[name].parameters == part.parameters
    assert (manifest.recipe, manifest.tables, manifest.tokenizers) == (before.recipe, before.tables, before.tokenizers)


def test_plan_and_study_are_in_the_bundle(small: tuple[Outcome, Bundle], small_measured: Measured) -> None:
    """The plan as it was made, with predicted and measured errors; the study, so that another budget takes a moment."""
    outcome, bundle = small
    plan = read_plan(bundle.root / PLAN_FILE)
    assert plan == outcome.plan
    assert plan.calibration == small_measured.calibration
    assert {error.metric: error.measured for error in plan.errors} == outcome.verified.measured
    assert all(error.predicted is not None for error in plan.errors)
    assert {each.part.part: dict(each.choices) for each in outcome.made} == {
        name: part.units for name, part in plan.parts.items()
    }
    assert len({choice for part in plan.parts.values() for choice in part.units.values()}) > 1
    study = decode_study((bundle.root / STUDY_FILE).read_bytes(), "here")
    for name, table in small_measured.study.errors.items():
        np.testing.assert_array_equal(study.errors[name], table)


def test_what_was_measured_is_what_the_bundle_does(small: tuple[Outcome, Bundle], small_measured: Measured) -> None:
    """The sealed graphs, opened once more and run on the held-out requests."""
    outcome, bundle = small
    held_out = small_measured.held_out
    sessions = {name: open_session(bundle.graph(name), threads=1) for name in bundle.manifest.parts}
    found = errors(held_out.metrics, reference_of(held_out), held_out.run(sessions))
    for name, value in outcome.verified.measured.items():
        assert found[name] == pytest.approx(value, rel=0.01)
        assert 0 < value < CAPS[name]


def test_the_bundle_draws(small: tuple[Outcome, Bundle], small_bundle: Bundle) -> None:
    """By the runtime alone, its guard satisfied, nearly the same picture."""
    results = []
    for bundle in (small_bundle, small[1]):
        with FewStepPipeline(bundle, threads=1) as pipeline:
            results.append(np.asarray(pipeline.generate("red pear", seed=9).latents))
    missed = float(np.square(results[1] - results[0]).sum() / np.square(results[0]).sum())
    assert 0 < missed < 0.01


def test_rivals_are_measured_plans_that_are_no_larger(
    small_bundle: Bundle, small_measured: Measured, tmp_path: Path
) -> None:
    """One choice for everything, on the same held-out requests: worse on every metric. It leaves no file."""
    options = MixedOptions(Budget(bytes=BYTES, times=SLOW))
    (tmp_path / "here").mkdir()
    outcome = quantize(small_bundle, small_measured, options, tmp_path / "here" / "staging", Told())
    assert len(outcome.rivals) == 1
    for name, theirs in outcome.rivals.items():
        assert name in RIVALS
        assert all(outcome.verified.measured[metric] < value for metric, value in theirs.items())
    assert [each.name for each in (tmp_path / "here").iterdir()] == ["staging"]


def test_protected_units_keep_their_floats(small_bundle: Bundle, small_measured: Measured, tmp_path: Path) -> None:
    """Whatever it costs elsewhere; a pattern that names nothing is refused."""
    options = MixedOptions(Budget(bytes=44_000, times=SLOW), protect=("unet/node.ff_*", "node.fc1"))
    made, _ = sealed(small_bundle, small_measured, options, tmp_path / "b")
    for part, unit in (("unet", "node.ff_in"), ("unet", "node.ff_out"), ("text_encoder", "node.fc1")):
        assert made.plan.parts[part].units[unit] in ("fp32", "fp16")
    with pytest.raises(BadRequest, match="names no unit"):
        check_patterns(small_measured.study, ["decoder/*"])
    check_patterns(small_measured.study, options.protect)


def given(study: Study, parts: Mapping[str, Mapping[str, str]]) -> MixedOptions:
    """Choices to take as they are."""
    plan = PrecisionPlan(study.target, {name: PartChoices(dict(units)) for name, units in parts.items()})
    return MixedOptions(Budget(times=SLOW), plan=plan)


def test_a_given_plan_is_taken_as_it_is(small_bundle: Bundle, small_measured: Measured, tmp_path: Path) -> None:
    """Its choices and no others; what it does not name stays as it was."""
    asked = {"unet": {"node.to_k": "w4a16-32", "node.ff_in": "w8a8"}, "text_encoder": {"node.fc2": "fp16"}}
    made, told = sealed(small_bundle, small_measured, given(small_measured.study, asked), tmp_path / "b")
    for part in small_measured.parts:
        wanted = {unit.id: asked.get(part.part, {}).get(unit.id, "fp32") for unit in part.units}
        assert made.plan.parts[part.part].units == wanted
    data = {unit.id: unit for unit in small_measured.parts[1].units}["node.ff_in"].data
    assert data in made.plan.parts["unet"].ranges
    assert not any("repairing" in what for what in told)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"unet": {"node.to_x": "fp16"}}, "unet/node.to_x, which this model does not have"),
        ({"unet": {"node.conv1": "w4a16-32"}}, "node.conv1 w4a16-32, which cpu:any cannot run there"),
    ],
)
def test_a_plan_for_another_model_is_refused(
    small_bundle: Bundle, small_measured: Measured, tmp_path: Path, parts: dict[str, dict[str, str]], words: str
) -> None:
    """Before anything is written."""
    with pytest.raises(BadRequest, match=words):
        sealed(small_bundle, small_measured, given(small_measured.study, parts), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_plan_leaves_no_bundle(small_bundle: Bundle, small_measured: Measured, tmp_path: Path) -> None:
    """The fewest bits everywhere, the sensitive layers too: the gate names the metrics, and the target stays absent."""
    study = small_measured.study
    worst: dict[str, dict[str, str]] = {}
    for row, size in zip(study.rows, study.bytes, strict=True):
        worst.setdefault(row.part, {})[row.units[0]] = study.choices[int(np.nanargmin(size))]
    with pytest.raises(PlanRefused, match=r"content error .* over the limit of 0.02") as why:
        sealed(small_bundle, small_measured, given(study, worst), tmp_path / "b")
    assert why.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_cap_of_ones_own_is_a_gate(
    small: tuple[Outcome, Bundle], small_bundle: Bundle, small_measured: Measured, tmp_path: Path
) -> None:
    """The very plan that passed is refused below what it was measured to lose."""
    cap = 0.5 * small[0].verified.measured["quality"]
    options = MixedOptions(Budget(times=SLOW, caps={"quality": cap}), plan=small[0].plan)
    with pytest.raises(PlanRefused, match=f"quality error .* limit of {cap:.3g}"):
        sealed(small_bundle, small_measured, options, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_no_plan_fits(small_bundle: Bundle, small_measured: Measured, tmp_path: Path) -> None:
    """A budget below the smallest choices of all."""
    with pytest.raises(BudgetTooSmall):
        sealed(small_bundle, small_measured, MixedOptions(Budget(bytes=10_000, times=SLOW)), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_prediction_that_is_off_is_repaired(small_bundle: Bundle, small_measured: Measured, tmp_path: Path) -> None:
    """Sensitivities a hundred times too small: the largest shares are measured again, and the prediction is right."""
    options = MixedOptions(Budget(bytes=44_000, times=SLOW))
    _, told = sealed(small_bundle, small_measured, options, tmp_path / "right")
    made, repaired = sealed(small_bundle, with_errors(small_measured, 0.01), options, tmp_path / "wrong")
    times = sum("repairing" in what for what in repaired)
    assert sum("repairing" in what for what in told) < times <= REPAIRS
    for error in made.plan.errors:
        assert error.predicted is not None
        assert error.measured is not None
        assert error.measured < 10 * error.predicted, "it was a hundred times more"


def test_the_first_token_is_that_of_the_encoder_that_ships(
    small: tuple[Outcome, Bundle], small_measured: Measured
) -> None:
    """The rows in the UNet are those of the quantized encoder, not those that were calibrated."""
    outcome, bundle = small
    assert isinstance(small_measured.workload, PictureWorkload)
    encoder = open_session(bundle.graph("text_encoder"), threads=1)
    tokens = small_measured.workload.record(["text_encoder"])["text_encoder"][0].feeds
    first = encoder.run(tokens)["last_hidden_state"][0, 0]
    (unet,) = (each.part for each in outcome.made if each.part.part == "unet")
    ships = unet.constants.rows["encoder_hidden_states"].values[0]
    np.testing.assert_array_equal(ships, first)
    before = small_measured.parts[1].constants.rows["encoder_hidden_states"].values[0]
    assert np.abs(ships - before).max() > 0
    assert msgspec.to_builtins(bundle.manifest.parts["unet"].outputs[1])["name"] == GUARD
